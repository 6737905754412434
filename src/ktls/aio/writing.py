"""The sending side of the asyncio transport.

Theory of operation
-------------------
``write`` is one ``send``, as with plain TCP. What TCP has no room for waits here, in one queue of buffers and files, and goes out as the loop reports room: buffers together, by
one ``sendmsg``; files by ``os.sendfile``, a piece at a time. The order of the calls is the order on the wire; so data may be written while a file is under way.

In front of the queue is what the driver owes (a KeyUpdate and its key, an alert): it runs that by itself before any data, and when there is no data ``_on_writable`` makes it. Layers in this
process may hold accepted data (``unsent``), which also takes further calls. Both keep us waiting for room.

Flow control counts the buffers, not the files: those take no memory. Its rules, and its code, are asyncio's own.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias, TypeVar, final

from ktls.handshake.handoff import RecordDriver
from ktls.record.interface import DEAD_ERRNOS, ReadBuffer
from ktls.record.meter import MAX_PIECE

from .reading import AGAIN, ReadingTransport

__all__ = ("FilePart", "Mark", "WritingTransport", "say_close_notify")

_log = logging.getLogger("ktls.aio")

#: The defaults of asyncio's own TLS transport, in bytes.
_HIGH_WATER: Final = 512 * 1024
_LOW_WATER: Final = _HIGH_WATER // 4
#: Writes to a connection that is lost are dropped in silence; this many are an application's bug worth a warning. As in asyncio.
_WARN_AFTER_WRITES: Final = 5
#: Bytes above which it pays to hold partial segments back (TCP_CORK, two system calls) while several records go out by one call. With TCP_NODELAY each record would
#: end a segment of its own: 15 % of the whole cost of a bulk transfer.
_CORK_ABOVE: Final = 32 * 1024
#: Buffers given to one system call; the rest waits for the next event.
_MAX_VECTOR: Final = 256

_T = TypeVar("_T")
_R = TypeVar("_R")
_Data: TypeAlias = bytes | bytearray | memoryview


@final
class FilePart:
    """A part of a file in the queue. ``done`` gets the number of bytes sent, less than asked for if the file is shorter."""

    __slots__ = ("_fd", "_left", "_offset", "done", "sent")

    def __init__(self, fd: int, offset: int, count: int | None, done: asyncio.Future[int]) -> None:
        self._fd = fd
        self._offset = offset
        self._left = count
        self.done = done
        self.sent = 0

    @property
    def is_big(self) -> bool:
        """Whether what is left makes several records."""
        return self._left is None or self._left > _CORK_ABOVE

    def send(self, driver: RecordDriver) -> bool:
        """Send one piece; return whether that was the last. ``BlockingIOError`` if there is no room, ``OSError``."""
        left = self._left
        piece = MAX_PIECE if left is None else min(left, MAX_PIECE)
        sent = driver.sendfile(self._fd, self._offset, piece)
        self._offset += sent
        self.sent += sent
        if left is not None:
            self._left = left - sent
        return not sent or self._left == 0


@final
class Mark:
    """A place in the queue: ``done`` tells when everything in front of it has gone."""

    __slots__ = ("done",)

    sent: Final = 0
    is_big: Final = False

    def __init__(self, done: asyncio.Future[int]) -> None:
        self.done = done

    def send(self, driver: RecordDriver) -> bool:
        """Be gone."""
        return True


class WritingTransport(ReadingTransport):
    """A transport that writes. ``_direct``: the kernel seals, so that nothing accepted is ever held in this process."""

    __slots__ = ("_direct", "_eof", "_lost", "_queue", "_size", "_watching")

    _protocol_paused: bool
    _high_water: int
    _low_water: int

    def _init_writing(self) -> None:
        self._direct = self._driver.tx_layer == "kernel"
        #: None, which is what it is most of the time and takes no memory: nothing waits.
        self._queue: deque[_Data | FilePart | Mark] | None = None
        #: Bytes in the queue, files not counted.
        self._size = 0
        #: Whether the loop watches for room.
        self._watching = False
        #: ``write_eof`` was called.
        self._eof = False
        #: Greater than 0 once the connection is lost; then it counts the writes.
        self._lost = 0
        self._protocol_paused = False
        self._high_water, self._low_water = _HIGH_WATER, _LOW_WATER

    # --- what the protocol calls -------------------------------------------------------------------------------

    def write(self, data: _Data) -> None:
        """Send ``data``, now or as soon as there is room. Never blocks and raises only for misuse: errors go to ``connection_lost``."""
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"data: expecting a bytes-like instance, got {type(data).__name__}")
            if type(data) is memoryview and (data.itemsize != 1 or data.ndim != 1):
                data = data.cast("B")
        if not data or ((self._closing or self._eof) and not self._may_write()):
            return
        if self._queue is None:
            try:
                if len(data) > _CORK_ABOVE and self._direct:
                    sent = self._corked(self._driver.sending.send, data)
                else:
                    sent = self._driver.sending.send(data)
            except AGAIN:
                sent = 0
            except OSError as error:
                self._write_failed(error)
                return
            if sent == len(data):
                if not self._direct and self._driver.unsent:
                    self._wait_for_room()
                return
            data = memoryview(data)[sent:]
        self._enqueue(data)

    def writelines(self, list_of_data: Iterable[_Data]) -> None:
        """Send all of ``list_of_data``; in the kernel that is one system call, and the pieces share records."""
        buffers: list[ReadBuffer] = []
        for data in list_of_data:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"data: expecting a bytes-like instance, got {type(data).__name__}")
            if data:
                buffers.append(memoryview(data).cast("B"))
        if not buffers or not self._may_write():
            return
        if self._queue is None:
            try:
                sent = self._send_buffers(buffers[:_MAX_VECTOR])
            except AGAIN:
                sent = 0
            except OSError as error:
                self._write_failed(error)
                return
            buffers = _behind(buffers, sent)
        if buffers:
            self._enqueue(*buffers)
        elif not self._direct and self._driver.unsent:
            self._wait_for_room()

    def send_file(self, part: FilePart | Mark) -> None:
        """Send ``part`` of a file behind everything written so far; ``part.done`` tells the end of it, or the error."""
        if not self._may_write():
            part.done.set_exception(ConnectionResetError(errno.ECONNRESET, "connection lost"))
            return
        if self._queue is None:
            self._queue = deque((part,))
            self._on_writable()
        else:
            self._queue.append(part)

    def drop_file(self, part: FilePart | Mark) -> None:
        """Send no more of ``part``: whoever waited for it has given up."""
        if self._queue is not None and part in self._queue:
            self._queue.remove(part)
            self._settle_queue()

    def write_eof(self) -> None:
        """Close our direction with close_notify, behind everything written; reading goes on (TLS 1.3).

        ``NotImplementedError`` where the version knows no half close, as on asyncio's own TLS transport; ask ``can_write_eof``.
        """
        if not self.can_write_eof():
            raise NotImplementedError
        if self._closing or self._eof:
            return
        self._eof = True
        if self._queue is None:
            self._say_goodbye()

    def can_write_eof(self) -> bool:
        """Whether ``write_eof`` works: TLS 1.3 has a half close, TLS 1.2 has none."""
        raise NotImplementedError

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait for room in TCP's buffer."""
        return self._size

    # --- the queue ---------------------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        """Whether the connection takes data. ``RuntimeError`` after ``write_eof``."""
        if self._eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not self._closing:
            return True
        if self._lost >= _WARN_AFTER_WRITES:
            _log.warning("write() on a connection that is closed")
        self._lost += 1 if self._lost else 0
        return False

    def _enqueue(self, *buffers: _Data) -> None:
        """Add all of ``buffers``, then look at the limit: the protocol may write more, or end it all, when it is told."""
        if self._queue is None:
            self._queue = deque()
        for data in buffers:
            # Whoever keeps writing into a bytearray must not change what was written.
            mutable = isinstance(data, bytearray) or (
                isinstance(data, memoryview) and not isinstance(data.obj, bytes)
            )
            self._queue.append(bytes(data) if mutable else data)
            self._size += len(data)
        self._wait_for_room()
        self._maybe_pause_protocol()

    def _send_buffers(self, buffers: list[ReadBuffer]) -> int:
        """Send one or more buffers together; return how many bytes were accepted."""
        if self._direct and sum(map(len, buffers)) > _CORK_ABOVE:
            return self._corked(self._driver.send_vector, buffers)
        return self._driver.send_vector(buffers)

    def _corked(self, send: Callable[[_T], _R], what: _T) -> _R:
        """Call ``send`` with ``what``, and let TCP make full segments of it."""
        self._cork(1)
        try:
            return send(what)
        finally:
            self._cork(0)

    def _cork(self, held: int) -> None:
        """Never raises: what was sent was sent, whatever comes of that. (TCP lets go by itself after 200 ms.)"""
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, held)
        except OSError:
            pass

    def _wait_for_room(self) -> None:
        if not self._watching and not self._lost:
            self._watching = True
            self._loop.add_writer(self._fd, self._on_writable)

    def _stop_writing(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_writer(self._fd)

    def _on_writable(self) -> None:
        if self._lost:
            return
        try:
            if self._queue:
                self._send_queued(self._queue)
            elif self._driver.owes:
                self._driver.run_owed()
                if self._driver.unsent and not self._closing:
                    # Says if the connection is gone, which the other never does: TCP would have room for ever.
                    self._driver.flush()
        except AGAIN:
            pass
        except OSError as error:
            self._write_failed(error)
            return
        self._settle_queue()

    def _send_queued(self, queue: deque[_Data | FilePart | Mark]) -> None:
        """Send the buffers in front, or a piece of the file there."""
        head = queue[0]
        if isinstance(head, FilePart | Mark):
            self._send_piece(queue, head)
            return
        buffers: list[ReadBuffer] = []
        for entry in queue:
            if isinstance(entry, FilePart | Mark) or len(buffers) == _MAX_VECTOR:
                break
            buffers.append(entry)
        sent = self._send_buffers(buffers)
        self._size -= sent
        while sent:
            entry = queue.popleft()
            assert not isinstance(entry, FilePart | Mark)
            if len(entry) > sent:
                queue.appendleft(memoryview(entry)[sent:])
                break
            sent -= len(entry)

    def _send_piece(self, queue: deque[_Data | FilePart | Mark], part: FilePart | Mark) -> None:
        try:
            last = (
                self._corked(part.send, self._driver)
                if self._direct and part.is_big
                else part.send(self._driver)
            )
        except AGAIN:
            raise
        except OSError as error:
            if isinstance(error, ssl.SSLError) or error.errno in DEAD_ERRNOS:
                raise
            # The file's error, not the connection's.
            queue.popleft()
            if not part.done.done():
                part.done.set_exception(error)
            return
        if last:
            queue.popleft()
            if not part.done.done():
                part.done.set_result(part.sent)
        elif self._paused:
            # Nobody reads: a KeyUpdate must not wait for the end of a long file.
            self._driver.settle()

    def _settle_queue(self) -> None:
        """After something has left the queue: let the protocol go on, see what is still to be waited for, and end what waits for the end of the queue."""
        if self._protocol_paused:
            self._maybe_resume_protocol()  # may write
        if self._lost:
            return
        if self._queue:
            self._wait_for_room()
            return
        self._queue = None
        if self._closing or self._eof:
            self._say_goodbye()
        elif self._driver.owes:
            self._wait_for_room()
        else:
            self._stop_writing()

    def _drop_queue(self, error: BaseException | None) -> None:
        """Nothing of it will be sent any more."""
        queue, self._queue, self._size = self._queue, None, 0
        for entry in queue or ():
            if isinstance(entry, FilePart | Mark) and not entry.done.done():
                entry.done.set_exception(_as_connection_error(error))

    # --- the subclass's ----------------------------------------------------------------------------------------

    def _say_goodbye(self) -> None:
        """The queue is empty, and no more will come: go on with ``write_eof`` or ``close``."""
        raise NotImplementedError

    def _write_failed(self, error: OSError) -> None:
        raise NotImplementedError


def say_close_notify(driver: RecordDriver) -> bool:
    """Send close_notify if there is room; return whether it has gone. ``OSError`` from the network."""
    try:
        driver.close_notify(socket.MSG_DONTWAIT, patience=0)
    except AGAIN:
        return False
    return True


def _as_connection_error(error: BaseException | None) -> ConnectionError:
    """What waits for a file is told in this form, which servers know to be no bug of theirs."""
    if isinstance(error, ConnectionError):
        return error
    lost = ConnectionAbortedError(errno.ECONNABORTED, "the connection was closed")
    lost.__cause__ = error
    return lost


def _behind(buffers: list[ReadBuffer], count: int) -> list[ReadBuffer]:
    """Return what follows the first ``count`` bytes of ``buffers``."""
    for position, buffer in enumerate(buffers):
        if len(buffer) > count:
            return [memoryview(buffer)[count:], *buffers[position + 1 :]]
        count -= len(buffer)
    return []
