"""A connection under test: a driver, a peer that checks every record, and an application that goes on after whatever may pass."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Final, TypeVar

from ktls.closing import drop_unread, shut_down, try_finish
from ktls.files import FileCopier, FileMover, FileSplicer, Pipe
from ktls.handshake.handoff import RecordDriver
from ktls.protocol.enums import ContentType, Direction
from ktls.protocol.errors import KTLSError
from ktls.record.driver import Driver
from ktls.record.interface import DEAD_ERRNOS
from ktls.testing import RecordPeer, is_key_update, loopback_pair, pattern, turns

from .layers import Layers, Options
from .seam import Seam

__all__ = ("PIECE", "Died", "Seen", "World", "make_world")

_T = TypeVar("_T")
#: What an application offers at once.
PIECE: Final = 64 * 1024
#: How often it tries again after an error that says nothing about the connection.
_RETRIES: Final = 3


class Died(Exception):
    """The connection is of no more use: the last error of the operation that told."""

    def __init__(self, error: OSError, reading: bool) -> None:
        super().__init__(repr(error))
        self.error = error
        self.reading = reading


@dataclass
class Seen:
    """What the peer has opened, in order: data, and a word for each other record."""

    data: bytearray = field(default_factory=bytearray)
    #: (octets of data in front of it, the record).
    control: list[tuple[int, str]] = field(default_factory=list)
    #: How TCP ended: "fin", "cut" (inside a record), "reset"; "" if it has not.
    end: str = ""

    @property
    def words(self) -> list[str]:
        return [word for _, word in self.control]


class World:
    """Driver, peer and application. Everything happens in one thread."""

    def __init__(
        self, sock: socket.socket, peer: RecordPeer, layers: Layers, options: Options, seam: Seam
    ) -> None:
        self.sock = sock
        self.peer = peer
        self.layers = layers
        self.options = options
        self.seam = seam
        self.seen = Seen()
        self.got = bytearray()
        self.offered = 0
        self.accepted = 0
        #: Data that the peer has sent.
        self.from_peer = 0
        #: The end of what comes, as the application was told.
        self.peer_closed = False
        self.raised: list[str] = []
        self._driver: RecordDriver | None = None
        self._files = contextlib.ExitStack()

    @property
    def driver(self) -> RecordDriver:
        assert self._driver is not None
        return self._driver

    def set_up(self) -> None:
        """Hand the connection over to its layers."""
        self.seam.armed = (
            self.layers.policy is not None
        )  # else it is put together for this test only
        self._driver = self.layers.start(self.sock, self.peer, self.options)
        self.seam.armed = True

    # --- the peer ----------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Let the peer take what has come so far, and acknowledge it."""
        if self.seen.end:
            return
        try:
            alive = self.peer.pull()
            while (message := self.peer.next_record()) is not None:
                if message.content_type == ContentType.APPLICATION_DATA:
                    self._in_time()
                    self.seen.data += message.fragment
                    continue
                name = ContentType(message.content_type).name
                self.seen.control.append((len(self.seen.data), f"{name} {message.fragment.hex()}"))
                if is_key_update(message):
                    self.peer.next_rx_key()
            # Else the closing would wait for a delayed one.
            self.peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except ConnectionResetError:
            self.seen.end = "reset"
        else:
            if not alive:
                self.seen.end = "cut" if self.peer._buffer else "fin"

    def _in_time(self) -> None:
        last = self.seen.control[-1][1] if self.seen.control else ""
        assert not last.startswith(("ALERT 0100", "ALERT 02")), "data after the end"

    # --- the application ---------------------------------------------------------------------------------------

    def retry(self, call: Callable[[], _T], *, reading: bool = False, idle: bool = False) -> _T:
        """Call until it says neither "wait" nor something that may pass; ``Died`` if it says something else. ``idle``: the peer takes nothing meanwhile."""
        tries = 0
        for _ in turns("the operation ends"):
            try:
                return call()
            except BlockingIOError:
                if not idle:
                    self.pump()
                self._wait()
            except OSError as error:
                self.raised.append(repr(error))
                tries += 1
                gone = isinstance(error, ssl.SSLError) or error.errno in DEAD_ERRNOS
                if gone or tries > _RETRIES:
                    raise Died(error, reading) from error
        raise AssertionError("unreachable")

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        poller.poll(1)

    def send(self, size: int, *, vector: bool = False) -> None:
        """Send the next ``size`` bytes of the pattern."""
        data = memoryview(pattern(size, self.offered))
        self.offered += size
        while data:
            piece = data[:PIECE]
            count = self.retry(lambda piece=piece: self._send(piece, vector))  # type: ignore[misc]  # mypy does not infer a lambda with a default
            self._took(count, len(piece))
            data = data[count:]

    def _send(self, piece: memoryview, vector: bool) -> int:
        if not vector:
            return self.driver.sending.send(piece)
        half = max(1, len(piece) // 2)
        return self.driver.send_vector([part for part in (piece[:half], piece[half:]) if part])

    def _took(self, count: int, offered: int) -> None:
        assert 0 < count <= offered
        self.accepted += count

    def fill(self, most: int) -> None:
        """Send, up to ``most`` bytes, until TCP takes nothing more; the peer takes nothing."""
        end = self.offered + most
        refusals = 0
        while self.offered < end and refusals < 3:
            piece = memoryview(pattern(min(16384, end - self.offered), self.offered))
            try:
                count = self.driver.sending.send(piece)
            except BlockingIOError:
                refusals += 1
                continue
            except OSError as error:
                self.raised.append(repr(error))
                if isinstance(error, KTLSError) or error.errno in DEAD_ERRNOS:
                    raise Died(error, reading=False) from error
                refusals += 1
                continue
            self._took(count, len(piece))
            self.offered += count

    def send_file(self, size: int, *, ask: int | None = None, cut: int | None = None) -> None:
        """Send a file that holds the next ``size`` bytes, asking for ``ask`` bytes (None: up to its end). ``cut``: it loses all behind that after the first piece."""
        file = self._file()
        file.write(pattern(size, self.offered))
        fd = file.fileno()
        self.seam.watch(fd)
        wanted = size if ask is None else ask
        offset = 0
        while offset < wanted:
            count = self.retry(
                lambda offset=offset: self.driver.sendfile(fd, offset, min(wanted - offset, PIECE))  # type: ignore[misc]  # mypy does not infer a lambda with a default
            )
            if not count:
                break
            offset += count
            self.accepted += count
            if cut is not None:
                file.truncate(max(cut, offset))
                cut = None
        self.offered += offset

    def receive(self, size: int, *, piece: int = PIECE, now: bool = False) -> None:
        """Receive ``size`` bytes; ``now``: as the asyncio transport reads, which needs no exception for "nothing there"."""
        buffer = bytearray(piece)
        end = len(self.got) + size
        while len(self.got) < end:
            with memoryview(buffer)[: end - len(self.got)] as view:
                count = self.retry(
                    lambda view=view: self._receive(view, now),  # type: ignore[misc]  # mypy does not infer a lambda with a default
                    reading=True,
                )
                assert count, "an end of the stream too early"
                self.got += view[:count]

    def _receive(self, view: memoryview, now: bool) -> int:
        if not now:
            return self.driver.recv_into(view)
        count = self.driver.receiving.read_now(view)
        if count < 0:
            raise BlockingIOError
        return count

    def receive_file(self, size: int) -> None:
        """Receive ``size`` bytes into a file, through a pipe."""
        file = self._file()
        mover: FileMover = FileCopier(self.driver, file, 0)
        if self.driver.rx_layer == "kernel":
            mover = FileSplicer(self.driver, Pipe(), file)
        moved = 0
        try:
            while moved < size:
                want = size - moved
                count = self.retry(lambda want=want: mover.move(want), reading=True)  # type: ignore[misc]  # mypy does not infer a lambda with a default
                assert count, "an end of the stream too early"
                moved += count
        finally:
            mover.finish()
            self.got += os.pread(file.fileno(), size, 0)

    def _file(self) -> IO[bytes]:
        """A file that is closed when the world ends."""
        return self._files.enter_context(tempfile.TemporaryFile(buffering=0))

    def receive_end(self) -> None:
        """The peer's close_notify."""
        assert self.retry(lambda: self.driver.recv_into(bytearray(10)), reading=True) == 0
        assert self.driver.peer_closed
        self.peer_closed = True

    def refresh(self, request_peer: bool = False) -> None:
        """Change our key; a change that would block is left to happen by itself."""

        def attempt() -> None:
            with contextlib.suppress(BlockingIOError):
                self.driver.refresh_traffic_keys(request_peer)

        before = self._generation()
        # An application that was told of an error looks whether the change is on its way before it asks again.
        try:
            attempt()
        except OSError as error:
            self.raised.append(repr(error))
            if isinstance(error, KTLSError) or error.errno in DEAD_ERRNOS:
                raise Died(error, reading=False) from error
            assert self.driver.owes or self._generation() == before + 1

    def _generation(self) -> int:
        assert isinstance(self.driver, Driver)
        return self.driver.connection.installed_generation(Direction.TX)

    def settle(self) -> None:
        """What an application that polls by itself does after a read."""
        self.driver.settle(read_ahead=True)

    # --- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close in order, as the front ends do; the peer reads to the end."""

        def attempt() -> None:
            if not try_finish(self.sock, self.driver):
                raise BlockingIOError

        self.retry(attempt)
        self.gone()

    def gone(self) -> None:
        """Close the descriptor, whatever state it is in, and let the peer see the end."""
        self.seam.armed = False
        drop_unread(self.sock)
        self.sock.close()
        for _ in turns("TCP ends"):
            self.pump()
            if self.seen.end:
                break

    def give_up(self) -> None:
        """Close after the connection has died: what can still be said is said."""
        self.seam.armed = False
        with contextlib.suppress(OSError):
            for _ in range(20):
                if try_finish(self.sock, self.driver):
                    break
                self.pump()
                self._wait()
        with contextlib.suppress(OSError):
            shut_down(self.sock)
        self.gone()

    def clean_up(self) -> None:
        """Nothing is left."""
        self.seam.forget()
        self._files.close()


@contextlib.contextmanager
def make_world(layers: Layers, options: Options, seam: Seam) -> Iterator[World]:
    """A connection whose descriptors are watched; the seam is open only meanwhile."""
    size = 16 * 1024 if options.small else None
    with loopback_pair(sndbuf=size, rcvbuf=size) as (sock, theirs):
        sock.setblocking(False)
        world = World(sock, RecordPeer(theirs, options.suite), layers, options, seam)
        seam.watch(sock.fileno())
        try:
            yield world
        finally:
            world.clean_up()
