"""Files over an asyncio connection: ``os.sendfile`` into the kernel, or copies where something stands in the way."""

from __future__ import annotations

import asyncio
from typing import IO, Final

from ktls.files import regular_file

from .transport import KTLSTransport
from .writing import FilePart, Mark

__all__ = ("sendfile",)

#: Read and written at once where a file has no descriptor that ``os.sendfile`` takes.
_COPY_SIZE: Final = 256 * 1024


async def sendfile(
    destination: asyncio.WriteTransport | asyncio.StreamWriter,
    file: IO[bytes],
    offset: int = 0,
    count: int | None = None,
    *,
    fallback: bool = True,
) -> int:
    """Send ``count`` bytes of ``file`` from ``offset``, or up to its end; return how many were sent, less than ``count`` if the file is shorter.

    What was written before goes out before, what is written meanwhile after it. It returns when everything is accepted for delivery, as ``drain`` does at a limit of 0. With the
    sending direction in the kernel nothing is copied, keys are metered and refreshed on the way. The file's position is then behind the last byte sent, also after an error.

    Without ``fallback``: ``asyncio.SendfileNotAvailableError`` for a file that is not a regular one. ``RuntimeError`` if the transport is closing, ``ConnectionError`` if the connection is lost on the way. When cancelled,
    or after an error of the file, a part has been sent: nobody but the application knows what the peer makes of that.
    """
    transport = (
        destination.transport if isinstance(destination, asyncio.StreamWriter) else destination
    )
    if "b" not in getattr(file, "mode", "b"):
        raise ValueError("file should be opened in binary mode")
    if count is not None and count <= 0:
        raise ValueError(f"count must be a positive integer (got {count!r})")
    if transport.is_closing():
        raise RuntimeError("Transport is closing")
    loop = asyncio.get_running_loop()
    if not isinstance(transport, KTLSTransport):
        return await loop.sendfile(transport, file, offset, count, fallback=fallback)
    fd = regular_file(file)
    if fd is not None:
        return await _send(loop, transport, file, fd, offset, count)
    if not fallback:
        raise asyncio.SendfileNotAvailableError("not a regular file")
    return await _copy(loop, transport, file, offset, count)


async def _send(
    loop: asyncio.AbstractEventLoop,
    transport: KTLSTransport,
    file: IO[bytes],
    fd: int,
    offset: int,
    count: int | None,
) -> int:
    part = FilePart(fd, offset, count, loop.create_future())
    transport.send_file(part)
    try:
        return await part.done
    except asyncio.CancelledError:
        transport.drop_file(part)
        raise
    finally:
        if part.sent:
            file.seek(offset + part.sent)


async def _copy(
    loop: asyncio.AbstractEventLoop,
    transport: KTLSTransport,
    file: IO[bytes],
    offset: int,
    count: int | None,
) -> int:
    """Read in a thread, write, wait for room."""
    # As asyncio, from ``offset`` and not from where the file stands; but a pipe stands where it stands.
    seekable = hasattr(file, "seek") and getattr(file, "seekable", lambda: True)()
    if offset or seekable:
        file.seek(offset)
    total = 0
    try:
        while count is None or total < count:
            size = _COPY_SIZE if count is None else min(_COPY_SIZE, count - total)
            data = await _read(loop, file, size, to_the_end=seekable)
            if not data:
                break
            transport.write(data)
            total += len(data)
            mark = Mark(loop.create_future())
            transport.send_file(mark)
            await mark.done
    except BaseException:
        if seekable:
            file.seek(offset + total)  # more may have been read
        raise
    return total


async def _read(
    loop: asyncio.AbstractEventLoop, file: IO[bytes], size: int, *, to_the_end: bool
) -> bytes:
    """Read in a thread. ``to_the_end``: also when cancelled, so that nobody moves the file's position any more."""
    reading = loop.run_in_executor(None, file.read, size)
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        if to_the_end:
            await asyncio.wait((reading,))
        if reading.done() and not reading.cancelled():
            reading.exception()  # nobody else will ask
        else:
            reading.cancel()
        raise
