"""The receiving side of the asyncio transport.

Theory of operation
-------------------
A level-triggered loop calls us when the socket is readable, and that is all that plain TCP needs. Kernel TLS breaks it in two places (measured on Linux 7.2):

- The kernel may have *decrypted* a KeyUpdate while it filled our buffer with the data in front of it. From then on it opens no further record, and ``poll`` is silent, until
  ``TLS_RX`` is set again: who reads once per event waits for ever. So after a read that left room in the buffer we have to read again. (A read that filled the buffer can't have looked
  ahead, and nothing else is ever hidden.) But that read nearly always finds nothing, and a system call that fails is the dearest part of a small request. So it is put off: a few milliseconds later all
  connections of the loop that were read from in the meantime are read once more. Until then an event costs what it costs over plain TCP, one read; a busy connection pays
  for the second one a hundred times a second at most; and data behind a KeyUpdate comes that much later, once per key.
- A record that can't be opened keeps the socket readable for ever, with the same error. So the first fatal error ends the reading for good.

Layers in this process read ahead, and what they hold is not shown by ``poll`` either: there we read until nothing is left, at once.

A peer may send records without data as fast as we read them. So an event ends after some of them (``MORE``), as it does after ``MAX_READS`` of data: a flood costs the other connections time, never their turn.

Plain text goes through one buffer for all connections of a loop; an idle connection owns none. ``BufferedProtocol`` gets it in its own buffer, uncopied.

Reading stops (the loop is not asked any more) while the protocol has it paused, and after the end of the stream. ``resume_reading`` always looks at once: what ``poll`` hid before the pause, it hides
after it.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, final

from ktls.protocol.errors import TruncatedError
from ktls.record.receiving import MORE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ktls.handshake.handoff import RecordDriver
    from ktls.record.interface import WriteBuffer

__all__ = ("AGAIN", "MAX_READS", "ReadingTransport", "Shared", "shared_by")

#: As asyncio's own transports (``max_size``): sixteen full records in one system call.
_BUFFER_SIZE: Final = 256 * 1024
#: Reads of one event, at most; the others get their turn, and we come back.
MAX_READS: Final = 16
#: What is tried again at the next event.
AGAIN: Final = (BlockingIOError, InterruptedError)
#: Seconds after which what ``poll`` may hide is looked for.
_LOOK_AFTER: Final = 0.01


@final
class Shared:
    """What all connections of a loop have in common: they run in one thread, one after the other."""

    __slots__ = ("_unsettled", "buffer", "lock")

    def __init__(self) -> None:
        self._unsettled: set[ReadingTransport] = set()
        #: What is read into it is to be copied out before anything else runs.
        self.buffer = memoryview(bytearray(_BUFFER_SIZE))
        #: In the place of the locks that a driver would have.
        self.lock = threading.RLock()

    def look_later(self, transport: ReadingTransport) -> None:
        """Have ``transport`` read once more, soon: the kernel may hide a KeyUpdate. See the theory above."""
        if not self._unsettled:
            transport._loop.call_later(_LOOK_AFTER, self._look)
        self._unsettled.add(transport)

    def _look(self) -> None:
        unsettled, self._unsettled = self._unsettled, set()
        for transport in unsettled:
            transport._look_again()


_shared: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Shared]] = (
    weakref.WeakKeyDictionary()
)


def shared_by(loop: asyncio.AbstractEventLoop) -> Shared:
    """Return what the connections of ``loop`` share."""
    shared = _shared.get(loop)
    if shared is None:
        shared = _shared[loop] = Shared()
    return shared


class ReadingTransport(asyncio.transports._FlowControlMixin):
    """A transport that reads. What happens to errors, and to the connection at its end, is its subclass's.

    The base class is asyncio's own flow control of writing: the same rules, by the same code.
    """

    __slots__ = (
        "__weakref__",
        "_buffered",
        "_closing",
        "_driver",
        "_ended",
        "_fd",
        "_looking",
        "_paused",
        "_plain",
        "_protocol",
        "_reading",
        "_shared",
        "_sock",
    )

    if TYPE_CHECKING:  # of the base class; typeshed leaves them out

        def _maybe_pause_protocol(self) -> None: ...

        def _maybe_resume_protocol(self) -> None: ...

    _loop: asyncio.AbstractEventLoop
    _driver: RecordDriver
    _sock: socket.socket
    _protocol: Any

    def _init_reading(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, driver: RecordDriver
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._driver = driver
        self._shared = shared_by(loop)
        #: The kernel opens the records: one read for an event will do, for now.
        self._plain = driver.rx_layer == "kernel"
        #: Whether the loop watches the socket for us.
        self._reading = False
        #: Whether the next turn of the loop looks anyway.
        self._looking = False
        #: Whether the protocol wants no data for now.
        self._paused = False
        #: Whether there is nothing more to read: the end of the stream, or an error.
        self._ended = False
        #: ``close`` was called, or something else has begun to end the connection.
        self._closing = False

    # --- what the protocol calls -------------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Set another protocol; from the next event on it gets what comes."""
        self._protocol = protocol
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol; None once ``connection_lost`` was called."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def is_closing(self) -> bool:
        """Whether the connection is closed, or about to be."""
        return self._closing

    def is_reading(self) -> bool:
        """Whether the protocol gets data as it comes."""
        return not (self._paused or self._closing or self._ended)

    def pause_reading(self) -> None:
        """Deliver no more data for now. TCP's window then holds the peer back."""
        if not self.is_reading():
            return
        self._paused = True
        self._stop_reading()

    def resume_reading(self) -> None:
        """Deliver data again."""
        if self._closing or not self._paused:
            return
        self._paused = False
        self._start_reading()

    # --- the events --------------------------------------------------------------------------------------------

    def _start_reading(self) -> None:
        """Watch the socket, and look at once: the loop can't see what a layer holds, nor what the kernel hides."""
        if not (self._reading or self._paused or self._ended or self._closing):
            self._reading = True
            self._loop.add_reader(self._fd, self._on_readable)
            self._loop.call_soon(self._look_again)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _look_soon(self, look: Callable[[], None]) -> None:
        """Call ``look`` in the next turn of the loop. Once: there are the events, too, and each might ask for one more."""
        if not self._looking:
            self._looking = True
            self._loop.call_soon(look)

    def _look_again(self) -> None:
        self._looking = False
        if self._reading and not self._closing:
            self._on_readable()

    def _on_readable(self) -> None:
        """Read and deliver: once in the kernel, elsewhere until nothing is there. See the theory above."""
        driver = self._driver
        for _ in range(MAX_READS):
            buffer = self._get_buffer() if self._buffered else self._shared.buffer
            if buffer is None:
                return
            size = len(buffer)  # a protocol may resize it when it is told
            try:
                count = driver.receiving.read_now(buffer)
            except TruncatedError as error:
                self._end_of_stream(error)
                return
            except InterruptedError:
                self._look_soon(self._look_again)
                return
            except OSError as error:
                self._read_failed(error)
                return
            if count <= 0:
                if count == MORE:
                    self._look_soon(self._look_again)
                if count < 0:
                    break
                self._end_of_stream(None)
                return
            self._deliver(count)
            if self._paused or self._closing:
                return
            if self._plain:
                if count < size:
                    self._shared.look_later(self)
                break
            if count == size and not driver.pending():
                break
        else:
            self._look_soon(self._look_again)
        # With a grant nothing is owed: that is quicker to see.
        if not driver.sending.grant and driver.owes:
            self._wait_for_room()

    def _deliver(self, count: int) -> None:
        try:
            if self._buffered:
                self._protocol.buffer_updated(count)
            else:
                self._protocol.data_received(bytes(self._shared.buffer[:count]))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            name = "buffer_updated" if self._buffered else "data_received"
            self._fatal_error(error, f"Fatal error: protocol.{name}() call failed.")

    def _get_buffer(self) -> WriteBuffer | None:
        """Return the protocol's buffer, or None if that was its end."""
        try:
            buffer = self._protocol.get_buffer(-1)
            if not len(buffer):
                raise RuntimeError("get_buffer() returned an empty buffer")
            # A view would keep it from being resized.
            return buffer if type(buffer) is bytearray else memoryview(buffer).cast("B")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fatal_error(error, "Fatal error: protocol.get_buffer() call failed.")
            return None

    def _end_of_stream(self, truncation: TruncatedError | None) -> None:
        """The peer's close_notify came, or TCP ended without one (``truncation``)."""
        self._ended = True
        self._stop_reading()
        if self._refuse_truncation(truncation):
            return
        try:
            keep_open = self._protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fatal_error(error, "Fatal error: protocol.eof_received() call failed.")
            return
        if not self.can_write_eof():
            self._closed_by_peer()
        elif not keep_open:
            self.close()

    # --- the subclass's ----------------------------------------------------------------------------------------

    def _refuse_truncation(self, truncation: TruncatedError | None) -> bool:
        """End the connection if a stream without close_notify is not to be taken for a whole one; return whether that is so."""
        raise NotImplementedError

    def _closed_by_peer(self) -> None:
        """The end of the peer's direction is the end of ours."""
        raise NotImplementedError

    def _read_failed(self, error: OSError) -> None:
        raise NotImplementedError

    def _wait_for_room(self) -> None:
        """Have what the driver owes sent as soon as TCP has room."""
        raise NotImplementedError

    def _fatal_error(self, error: BaseException, message: str) -> None:
        raise NotImplementedError
