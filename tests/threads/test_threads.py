"""Many threads on one connection: readers, writers, a sender of files, refreshers, observers; and then it is closed under them."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls

from ..sockets.helpers import Case, Link, Net, descriptors
from ..support import HOST, TLS12, TlsStat, has_kernel_tls, has_rekey
from .crew import FRAME, PATIENCE, Crew, Frames, frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

#: With this set, a hundred times as much.
LONG: Final = os.environ.get("KTLS_TRUST") is not None
SEEDS: Final = range(20 if LONG else 1)
WRITERS: Final = 3
FRAMES: Final = 1500 if LONG else 30
REFRESHES: Final = 12 if LONG else 6

CASES: Final = [
    Case(peer="ktls"),
    Case(peer="ktls", role="server"),
    Case(peer="ktls", version=TLS12),
    *([Case(peer="ktls", offload="userspace")] if has_kernel_tls() else []),
]


def write(sock: ktls.KTLSSocket, writer: int) -> None:
    for number in range(FRAMES):
        # A small piece is sent whole, so writers need no lock of their own.
        sent = sock.send(frame(writer, number))
        if sent != FRAME:
            raise AssertionError(f"{sent} of {FRAME} bytes were taken")


def send_files(sock: ktls.KTLSSocket, writer: int, directory: Path) -> None:
    path = directory / f"{writer} {id(sock)}"
    path.write_bytes(b"".join(frame(writer, number) for number in range(FRAMES)))
    with path.open("rb") as file:
        for number in range(FRAMES):
            assert sock.sendfile(file, number * FRAME, FRAME) == FRAME


def refresh(sock: ktls.KTLSSocket, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(REFRESHES):
        sock.refresh_traffic_keys(request_peer=chance.random() < 0.5)
        threading.Event().wait(chance.random() / 1000)  # lets the others go on


def look(sock: ktls.KTLSSocket, done: threading.Event) -> None:
    before = (0, 0)
    while not done.wait(0.001):
        usage = sock.key_usage
        now = (usage.tx.generation, usage.rx.generation)
        assert now >= before or now[1] >= before[1]
        before = now
        assert sock.pending() >= 0
        assert sock.version() is not None


def read(sock: ktls.KTLSSocket, frames: Frames) -> None:
    while data := sock.recv(FRAME):
        frames.feed(data)


class Battle:
    """One connection; at each end the same crew."""

    def __init__(self, link: Link, seed: int, directory: Path, *, may_refresh: bool) -> None:
        self.link = link
        self.crew = Crew()
        self._seed = seed
        self._directory = directory
        self._may_refresh = may_refresh
        self._done = threading.Event()
        self._both = threading.Barrier(2)
        self._senders: list[threading.Thread] = []
        self.came: dict[Any, Frames] = {}

    def join(self, sock: Any, readers: int) -> None:
        """Put a crew to work at one end."""
        spawn = self.crew.spawn
        frames = self.came[sock] = Frames(ordered=readers == 1)
        for _ in range(readers):
            spawn(read, sock, frames)
        spawn(look, sock, self._done)
        senders = [spawn(write, sock, writer) for writer in range(WRITERS)]
        senders.append(spawn(send_files, sock, WRITERS, self._directory))
        if self._may_refresh:
            senders += [spawn(refresh, sock, self._seed + turn) for turn in range(2)]
        spawn(self._end, sock, senders)
        self._senders += senders

    def _end(self, sock: ktls.KTLSSocket, senders: list[threading.Thread]) -> None:
        for sender in senders:
            sender.join(PATIENCE)
        self._both.wait(PATIENCE)  # in TLS 1.2 the end of one is the end of the other
        sock.shutdown(socket.SHUT_WR)

    def fight(self) -> None:
        """Wait for the senders, then for everybody."""
        for sender in self._senders:
            sender.join(PATIENCE)
        self._done.set()
        self.crew.finish()

    def check(self) -> None:
        """Every byte has come once, and both ends are at the same keys."""
        ours, theirs = self.link.ours, self.link.theirs
        for frames in self.came.values():
            frames.check(WRITERS + 1, FRAMES)
        assert ours.key_usage.tx.generation == theirs.key_usage.rx.generation
        assert ours.key_usage.rx.generation == theirs.key_usage.tx.generation
        if self._may_refresh:
            assert ours.key_usage.tx.generation >= 2 * REFRESHES


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "timeout"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_everybody_at_once(
    net: Net,
    restless: None,
    case: Case,
    timeout: float | None,
    seed: int,
    tmp_path: Path,
    tls_stat: TlsStat,
) -> None:
    for role in ("client", "server"):
        net.context("ktls", role, case.version)  # each has descriptors of its own
    gc.collect()
    before = descriptors()
    seed += timeout is None  # both kinds of it, also in the short form
    buffers = 32 * 1024 if seed % 2 else None
    link = net.link(case, timeout=timeout, buffers=buffers, changing_peer=case.may_refresh)
    link.theirs.settimeout(PATIENCE)
    battle = Battle(link, seed, tmp_path, may_refresh=case.may_refresh)
    battle.join(link.ours, readers=1 + seed % 2)
    battle.join(link.theirs, readers=2 - seed % 2)
    battle.fight()
    battle.check()
    link.ours.close()
    link.theirs.close()
    assert tls_stat["TlsDecryptError"] == 0
    net.sockets.clear()
    assert descriptors() <= before


BLOCKED: Final[dict[str, Callable[[ktls.KTLSSocket, Path], object]]] = {
    "recv": lambda sock, path: sock.recv(1),
    "recvfile": lambda sock, path: _into(sock, path),
    "sendall": lambda sock, path: sock.sendall(bytes(1 << 24)),
    "sendfile": lambda sock, path: _out_of(sock, path),
}


def _into(sock: ktls.KTLSSocket, path: Path) -> int:
    with path.open("wb") as file:
        return sock.recvfile(file)


def _out_of(sock: ktls.KTLSSocket, path: Path) -> int:
    path.write_bytes(bytes(1 << 24))
    with path.open("rb") as file:
        return sock.sendfile(file)


@pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "timeout"])
@pytest.mark.parametrize("call", BLOCKED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_ends_what_other_threads_wait_in(
    net: Net, case: Case, call: str, timeout: float | None, tmp_path: Path
) -> None:
    """The peer does nothing at all: whoever waits for it is woken, and gets an error."""
    # Nobody takes what is being sent: that waits for all of it.
    settings = ktls.Settings(
        offload=case.offload, shutdown_timeout=0.2 if call.startswith("send") else 10
    )
    link = net.link(case, timeout=timeout, buffers=16 * 1024, settings=settings)
    crew, errors, started = Crew(), list[OSError](), threading.Event()

    def wait() -> None:
        started.set()
        try:
            BLOCKED[call](link.ours, tmp_path / "file")
        except OSError as error:
            errors.append(error)

    def close() -> None:
        try:
            link.ours.close()
        except TimeoutError:
            assert call.startswith("send")  # the peer has not taken what was accepted

    crew.spawn(wait)
    started.wait(PATIENCE)
    threading.Event().wait(0.05)  # now it waits, or will find the socket closed: either is right
    crew.spawn(close)
    crew.finish()
    assert link.ours.fileno() == -1
    assert len(errors) == 1
    known = (errno.EBADF, errno.EPIPE, errno.ECONNRESET)
    assert isinstance(errors[0], ktls.LocalProtocolError) or errors[0].errno in known
    for use in (lambda: link.ours.recv(1), lambda: link.ours.send(b"x")):
        with pytest.raises(OSError, match="Bad file descriptor"):
            use()


def until_closed(call: Callable[[Any], object], argument: object) -> None:
    """Go on until it says, by an error, that the socket is closed."""
    try:
        while call(argument) != b"":
            pass
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EPIPE) and not isinstance(
            error, ktls.LocalProtocolError
        ):
            raise


def close_and_take(sock: ktls.KTLSSocket, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Close ``sock``, and give its number to another socket."""
    number = sock.fileno()
    with contextlib.suppress(TimeoutError):  # somebody is sending
        sock.close()
    while not pairs or number > max(end.fileno() for end in pairs[-1]):
        pairs.append(socket.socketpair())


def test_descriptor_is_never_used_after_close(net: Net, restless: None) -> None:
    """Another socket gets the number at once; nothing of ours goes there, and nothing is taken from it."""
    for turn in range(200 if LONG else 4):
        link = net.link(Case(peer="ktls"), timeout=None)
        crew = Crew()
        strangers: list[tuple[socket.socket, socket.socket]] = []
        number = link.ours.fileno()

        crew.spawn(until_closed, link.ours.send, b"ours")
        crew.spawn(until_closed, link.ours.recv, 100)
        crew.spawn(read_all, link.theirs)
        threading.Event().wait(turn / 10_000)
        crew.spawn(close_and_take, link.ours, strangers)
        crew.finish()
        assert any(number in (left.fileno(), right.fileno()) for left, right in strangers)
        for pair in strangers:
            for end in pair:
                with pytest.raises(BlockingIOError):
                    end.recv(1, socket.MSG_DONTWAIT)
        for pair in strangers:
            for end in pair:
                end.close()


def read_all(sock: Any) -> None:
    while sock.recv(65536):
        pass


def test_many_handshakes_on_one_context(net: Net, restless: None, tls_stat: TlsStat) -> None:
    """The key log of the context is one file; every connection finds its own secrets in it."""
    client, server = net.context("ktls", "client"), net.context("ktls", "server")
    crew, connections = Crew(), 100 if LONG else 12

    def one(number: int) -> None:
        mine, their = net.tcp()
        mine.settimeout(PATIENCE)
        their.settimeout(PATIENCE)

        def serve() -> None:
            with server.wrap_socket(their, server_side=True) as tls:
                tls.sendall(tls.recv(FRAME))

        peer = crew.spawn(serve)
        with client.wrap_socket(mine, server_hostname=HOST) as tls:
            tls.sendall(frame(number, 0))
            assert tls.recv(FRAME) == frame(number, 0)
            assert tls.offload.tx == ("kernel" if has_kernel_tls() else "userspace")
            assert tls.offload.rx == ("kernel" if has_rekey() else "userspace")
            peer.join(PATIENCE)

    for number in range(connections):
        crew.spawn(one, number)
    crew.finish()
    assert tls_stat["TlsDecryptError"] == 0


class Pause:
    """Lets something happen in another thread, once, after ``ktls`` has asked a socket for its descriptor and before it does anything more: there Python may go on with any other thread."""

    def __init__(self, function: str, action: Callable[[], object]) -> None:
        self._function = function
        self._action: Callable[[], object] | None = action

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        action = self._action
        if action is None or event != "c_return" or frame.f_code.co_name != self._function:
            return
        if argument.__name__ == "fileno" and frame.f_globals["__name__"] == "ktls.record.kernel":
            self._action = None
            other = threading.Thread(target=action)
            other.start()
            other.join(PATIENCE)


@pytest.mark.rekey
@pytest.mark.parametrize("function", ["sendfile", "splice"])
def test_number_of_a_descriptor_is_used_at_once(net: Net, tmp_path: Path, function: str) -> None:
    """A file is not sent to, nor filled by, a stranger who has got the number meanwhile."""
    link = net.link(Case(peer="ktls"), timeout=0.1)
    strangers: list[tuple[socket.socket, socket.socket]] = []

    link.theirs.sendall(b"data")
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"secret")
        file.flush()
        sys.setprofile(Pause(function, lambda: close_and_take(link.ours, strangers)))
        try:
            if function == "sendfile":
                link.ours.sendfile(file)
            else:
                link.ours.recvfile(file, 4)
        except OSError:
            pass  # it was closed in between
        finally:
            sys.setprofile(None)
    ends = [end for pair in strangers for end in pair]
    for end in ends:
        with pytest.raises(BlockingIOError):
            end.recv(1, socket.MSG_DONTWAIT)
    for end in ends:
        end.close()
    assert not ends, "a number was asked for first, and used afterwards"
