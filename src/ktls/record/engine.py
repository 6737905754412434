"""Records protected by the handshake engine itself, for connections that give us no keys: CBC suites, no key log.

Data and close only: the engine (an ``ssl.SSLObject`` between two memory BIOs) answers KeyUpdates and takes tickets by itself, and shows neither
keys nor counts. Same methods as ``driver.Driver``, so that a front end need not know which one it has.

The records of either direction are one stream of bytes: what leaves the engine's BIO, or TCP, is noted in the same step (see ``interruption``), so that no signal handler's
exception makes a hole in it. What a reader makes the engine say goes out by the reader, or, if a sender holds the lock, by that one when it has released it.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
from typing import Final, cast, final

from ktls.protocol.errors import LocalProtocolError, TruncatedError
from ktls.protocol.limits import DirectionUsage, KeyUsage

from .interface import DEAD_ERRNOS, LayerName, ReadBuffer, WriteBuffer
from .interruption import acquire_and_note, of_a_handler

__all__ = ("EngineDriver",)

_READ_SIZE: Final = 64 * 1024
_BATCH: Final = 64 * 1024
_UNKNOWN: Final = DirectionUsage(generation=0, records=0, limit=None)


@final
class EngineDriver:
    """One connection that stays with its engine. Thread-safe.

    ``incoming`` and ``outgoing`` are the engine's BIOs; what is in them already (read past the handshake, or not yet sent) is kept.
    """

    __slots__ = (
        "_ahead",
        "_came",
        "_engine",
        "_engine_lock",
        "_error",
        "_incoming",
        "_out",
        "_outgoing",
        "_peer_closed",
        "_rx_error",
        "_rx_lock",
        "_sent",
        "_sock",
        "_tx_closed",
        "_tx_lock",
    )

    tx_layer: LayerName = "engine"
    rx_layer: LayerName = "engine"
    #: As of a driver: it keeps its failures to itself.
    failure: Final = None
    refused_in_kernel: Final = False
    stuck_in_kernel: Final = False
    #: As of a driver's halves: everything takes a look first.
    grant: Final = 0

    def __init__(
        self,
        sock: socket.socket,
        engine: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        self._sock = sock
        self._engine = engine
        self._incoming = incoming
        self._outgoing = outgoing
        #: What was taken from the engine, and how much of it TCP has.
        self._out, self._sent = b"", 0
        #: What was read from TCP and not given to the engine yet: one piece, or none.
        self._came: list[bytes] = []
        #: Data that the engine had opened when our side was closed: from then on it would count as an error.
        self._ahead = b""
        #: What every further call raises: the network's error, and what was wrong with what came.
        self._error: OSError | None = None
        self._rx_error: OSError | None = None
        self._tx_closed = False
        self._peer_closed = False
        # rx, then tx, then engine; the engine's own calls never wait.
        self._rx_lock = threading.Lock()
        self._tx_lock = threading.Lock()
        self._engine_lock = threading.Lock()

    @property
    def sending(self) -> EngineDriver:
        """Itself: there are no two halves here."""
        return self

    @property
    def receiving(self) -> EngineDriver:
        """Itself."""
        return self

    @property
    def owes(self) -> bool:
        """Whether something of the engine's waits for room in TCP's buffer."""
        return self._sent < len(self._out) or self._outgoing.pending > 0

    @property
    def tx_closed(self) -> bool:
        """Whether our close_notify has been sent."""
        return self._tx_closed and not self.owes

    @property
    def unsent(self) -> bool:
        """The same: the engine's messages and the application's data are one stream of bytes."""
        return self.owes

    @property
    def peer_closed(self) -> bool:
        """Whether the peer's close_notify was received."""
        return self._peer_closed

    def pending(self) -> int:
        """Return how many bytes are held in this process, invisible to ``poll``."""
        return len(self._ahead) + self._engine.pending() + self.unread()

    def key_usage(self) -> KeyUsage:
        """The engine counts its records but does not tell: always zero."""
        return KeyUsage(tx=_UNKNOWN, rx=_UNKNOWN)

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """Send application data; return how many bytes were accepted. Raises as ``Driver.send``."""
        if not len(data):
            return 0
        try:
            with self._tx_lock:
                return self._send(data, flags)
        finally:
            self._released()

    def _send(self, data: ReadBuffer, flags: int) -> int:
        if self._error is not None:
            raise self._error.with_traceback(None)
        failed = self._rx_error
        if isinstance(failed, ssl.SSLError) and not isinstance(failed, TruncatedError):
            raise failed.with_traceback(None)
        if self._tx_closed:
            raise LocalProtocolError("the sending side is closed")
        self._push(flags)
        with self._engine_lock:
            accepted = self._engine.write(memoryview(data).cast("B")[:_BATCH])
        try:
            self._push(flags)
        except OSError as error:
            if self._error is not None or of_a_handler(error):
                raise
            # Accepted is accepted: the rest goes out with the next call, which also reports an error that lasts (no memory).
        return accepted

    def send_vector(self, buffers: list[ReadBuffer], flags: int = 0) -> int:
        """Send ``buffers`` as if they were one piece; return how many bytes were accepted. Raises as ``Driver.send``."""
        return self.send(b"".join(buffers), flags)

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """Send up to ``count`` bytes of a file from ``offset``; 0 at the end of the file."""
        data = os.pread(fd, min(count, _BATCH), offset)
        return self.send(data)

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive application data; return the count, 0 after close_notify. Raises as ``Driver.recv_into``."""
        view = memoryview(buffer).cast("B")
        with self._rx_lock:
            while not self._peer_closed:
                if self._came:
                    self._feed()
                if isinstance(self._rx_error, ssl.SSLError):
                    raise self._rx_error.with_traceback(None)
                try:
                    with self._engine_lock:
                        count = self._read(view[: nbytes or None])
                    # 0 is how it says close_notify, as long as we have not sent ours.
                    self._peer_closed = not count and len(view) > 0
                    return count
                except ssl.SSLWantReadError:
                    self.run_owed()
                    self._pull(flags)
                except ssl.SSLZeroReturnError:
                    self._peer_closed = True
                except ssl.SSLEOFError:
                    self._rx_error = TruncatedError(
                        "the TCP connection ended without close_notify: the data may be incomplete"
                    )
                    raise self._rx_error from None
                except ssl.SSLError as error:
                    self._rx_error = error  # the engine says something else the next time
                    self.run_owed()  # the alert
                    raise
            return 0

    def _read(self, view: memoryview) -> int:
        """Read what is here. Under the engine's lock."""
        if not self._ahead:
            # With a buffer it returns a count, which typeshed does not say.
            return cast(int, self._engine.read(len(view), view))
        count = min(len(view), len(self._ahead))
        view[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def read_now(self, buffer: WriteBuffer) -> int:
        """As ``recv_into``, but -1 if nothing is there."""
        try:
            return self.recv_into(buffer)
        except BlockingIOError:
            return -1

    def splice(self, pipe: int, count: int) -> int:
        """Not possible here: ``LocalProtocolError``."""
        raise LocalProtocolError("only kernel TLS can splice")

    def settle(self, *, read_ahead: bool = False) -> None:
        """Nothing hides from ``poll`` here that ``pending`` would not tell."""

    def refresh_traffic_keys(self, request_peer: bool = False, flags: int = 0) -> None:
        """Not possible here: ``LocalProtocolError``; the ``ssl`` module has no such call."""
        raise LocalProtocolError("the engine protects this connection and can't refresh keys")

    def unread(self) -> int:
        """Return how many bytes were read from TCP that the engine has not taken: after the peer's close_notify, what follows it in plain text."""
        return self._incoming.pending + sum(map(len, self._came))

    def close_notify(self, flags: int = 0, *, patience: float = -1) -> None:
        """Close our side. ``BlockingIOError``: call again; doing so repeats nothing. ``patience``: as in ``Driver.close_notify``."""
        held: list[bool] = []
        try:
            if not acquire_and_note(held, self._tx_lock, patience):
                raise BlockingIOError(errno.EAGAIN, "another thread is sending")
            if not self._tx_closed:
                with self._engine_lock:
                    self._unwrap()
                self._tx_closed = True
            self._push(flags)
        finally:
            if held and held[0]:
                self._tx_lock.release()
                self._released()

    def _unwrap(self) -> None:
        """Have the engine say close_notify; a second time it says nothing. It looks for the peer's then, and fails if it finds data, which is lost: so it is to find nothing. Under the engine's lock."""
        hidden: list[bytes] = []
        try:
            while count := self._engine.pending():
                self._ahead += self._engine.read(count)
            hidden += map(self._incoming.read, (-1,))
            self._engine.unwrap()
        except (ssl.SSLError, ValueError):
            pass  # wants the peer's close_notify, or has failed before
        finally:
            if hidden and hidden[0]:
                self._incoming.write(hidden[0])

    def flush(self, flags: int = 0) -> None:
        """Hand to TCP whatever is still held here; ``BlockingIOError`` if that can't be done yet."""
        try:
            with self._tx_lock:
                self._push(flags)
        finally:
            self._released()

    def _released(self) -> None:
        """To be called after the tx lock was released, always: a reader that owed something in the meantime found it taken, and went on."""
        if self._outgoing.pending:
            self.run_owed()

    def run_owed(self) -> None:
        """Send what the engine wants to send as far as it goes without waiting. Never raises."""
        while self.owes:
            held: list[bool] = []
            try:
                if not acquire_and_note(held, self._tx_lock, 0):
                    return
                self._push(socket.MSG_DONTWAIT)
            except OSError as error:
                if of_a_handler(error):
                    raise
                return  # kept in _error, or tried again with the next call
            finally:
                if held and held[0]:
                    self._tx_lock.release()

    def _push(self, flags: int) -> None:
        """Send the engine's output. Under the tx lock."""
        while True:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if self._sent == len(self._out) and not self._take():
                return
            rest = memoryview(self._out)[self._sent :]
            sent: list[int] = []
            try:
                sent += map(self._sock.send, (rest,), (flags,))
            except OSError as error:
                if error.errno in DEAD_ERRNOS:
                    self._error = error
                raise
            finally:
                if sent:
                    self._sent += sent[0]

    def _take(self) -> bool:
        """Take what the engine wants to send, when all before it has gone; return whether there was anything."""
        taken: list[bytes] = []
        with self._engine_lock:
            try:
                taken += map(self._outgoing.read, (-1,))
            finally:
                if taken:
                    self._out, self._sent = taken[0], 0
        return self._out != b""

    def _pull(self, flags: int) -> None:
        """Read from TCP for the engine. Under the rx lock."""
        if self._rx_error is not None:
            raise self._rx_error.with_traceback(None)
        try:
            self._came += map(self._sock.recv, (_READ_SIZE,), (flags,))
        except OSError as error:
            if error.errno in DEAD_ERRNOS:  # TCP reports it once, and then an orderly end
                self._rx_error = error
                self._error = self._error or error
            raise

    def _feed(self) -> None:
        """Give the engine what came. Under the rx lock."""
        fed: list[int] = []
        with self._engine_lock:
            if not self._came[0]:
                self._incoming.write_eof()
                self._came = []
                return
            try:
                fed += map(self._incoming.write, self._came)
            finally:
                if fed:
                    self._came = []
