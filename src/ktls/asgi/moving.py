"""Ways to get a part of a file into a transport: through the kernel where the transport and the loop can do that, else by reading and writing.

Theory of operation
-------------------

``move`` sends bytes that lie between two offsets of a descriptor, behind whatever was written to the transport before, and returns when the
transport has taken them all. There are three kinds of transports:

- ours: ``ktls.aio.sendfile``, and the kernel encrypts. On a connection that stayed in user space that function reads and writes by itself.
- plain TCP on a loop that has ``sendfile`` (asyncio's): the loop's own. uvloop has none.
- everything else (asyncio's or uvloop's TLS): read in a thread, write, and wait for the transport's flow control.

The traps:

- ``sendfile`` functions move the position of the file that they are given, and the application may have a buffered reader on the same descriptor, which would
  then read the wrong bytes. So no file object of the application goes down there, but a ``Cursor``, which has a position of its own and reads with ``pread``.
  asyncio's own moves the descriptor's position besides; it is put back.
- A thread can't be cancelled. If the application is, while a thread reads, the descriptor must stay open until the thread is done, or it would read whatever
  file was given that number next. ``_read`` therefore waits for its thread, cancelled or not.
- ``sendfile`` reads from the disk in the event loop if the file isn't in the page cache. This is how ``sendfile`` is, in every server. For the same
  reason files are opened in the loop: the application has usually just stat'ed the file, so the path is cached and opening it takes microseconds, while
  a hop to a thread takes longer than that; and where the disk is slow, the loop would wait for the contents all the same.

Not here: what HTTP says about these bytes (``sender``).
"""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING, Any, Final, final

import ktls.aio

if TYPE_CHECKING:
    from .sender import Flow

__all__ = ("Cursor", "move", "regular_size")

#: How much is read at once where bytes have to be copied: a hop to a thread and back should not cost more than the copying.
_COPY_SIZE: Final = 256 * 1024


@final
class Cursor:
    """A file object over a descriptor that belongs to somebody else: the position is its own, the descriptor's isn't moved."""

    __slots__ = ("_fd", "_position")

    mode: Final = "rb"

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position, from the start or relative to where it is."""
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def read(self, size: int, /) -> bytes:
        """Read up to ``size`` bytes at the position, and move it."""
        data = os.pread(self._fd, size, self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` from the position, and move that; return how many bytes there were."""
        count = os.preadv(self._fd, [buffer], self._position)
        self._position += count
        return count


def regular_size(fd: int) -> int:
    """Return the size of a regular file. ``ValueError`` for whatever else the descriptor may be."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("only regular files can be sent")
    return status.st_size


async def move(transport: asyncio.Transport, flow: Flow, fd: int, offset: int, count: int) -> int:
    """Send ``count`` bytes of ``fd`` from ``offset``, at least one; return how many were sent, less if the file ended or the transport was closed.

    Raises what the transport or the file raises. The descriptor must stay open until then, and its position is left alone.
    """
    file: Any = Cursor(fd)  # has all of a file that is used below
    if transport.get_extra_info("ktls") is not None:
        return await ktls.aio.sendfile(transport, file, offset, count)
    if transport.get_extra_info("sslcontext") is None:
        position = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            loop = asyncio.get_running_loop()
            return await loop.sendfile(transport, file, offset, count, fallback=False)
        except RuntimeError:
            pass  # this loop, this transport or this file system has no sendfile; nothing was sent
        finally:
            os.lseek(fd, position, os.SEEK_SET)
    return await _copy(transport, flow, fd, offset, count)


async def _copy(transport: asyncio.Transport, flow: Flow, fd: int, offset: int, count: int) -> int:
    sent = 0
    while sent < count and not transport.is_closing():
        data = await _read(fd, min(_COPY_SIZE, count - sent), offset + sent)
        if not data:
            break
        transport.write(data)
        sent += len(data)
        if flow.write_paused:
            await flow.drain()
    return sent


async def _read(fd: int, size: int, offset: int) -> bytes:
    reading = asyncio.get_running_loop().run_in_executor(None, os.pread, fd, size, offset)
    cancelled: asyncio.CancelledError | None = None
    while not reading.done():
        try:
            await asyncio.wait((reading,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        reading.exception()  # nobody will ask for it
        raise cancelled
    return reading.result()
