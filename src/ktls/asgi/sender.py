"""The ASGI messages that send files, put into the terms that uvicorn understands.

Theory of operation
-------------------

``http.response.pathsend`` names a file; ``http.response.zerocopysend`` gives a descriptor with an optional part of it, and may be mixed with body messages.
A ``FileSender`` takes the place of uvicorn's ``send`` for one request. All other messages go to uvicorn's own, and so do these as far as possible: an empty
response to HEAD, the small file and the end of a response are ordinary body messages, so that their framing, errors and
log lines are uvicorn's. What remains is the middle of a big file.

- The number of bytes is fixed before the first is sent, from ``fstat``: it is the size of the chunk if the response is chunked. A file that grows meanwhile
  is sent as it was. One that shrinks can't be completed any more: the connection is aborted, so that no client takes what came for the whole.
- A response with a Content-Length gets no more than that: a file that is longer is cut there, and then the application sees the same error as for a body
  that is too long (uvicorn logs it and closes the connection). One that is shorter is sent and then is the error of a body that is too short.
- A small file is read and sent as a body, together with the response's head that is still held (``cork``): one record, one system call.
- ``send`` returns when the transport has taken all bytes, so the application may close its descriptor then.
- A client that leaves is no error: ``send`` returns, everything sent later is ignored and ``receive`` gives ``http.disconnect``, as uvicorn has it.
  Whoever sends a file doesn't read meanwhile on some transports, so it is often here, by a failing ``sendfile``, that this is noticed first.
- An application that is cancelled while a file is being sent leaves a response that nobody can complete: the connection is aborted.
"""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from .moving import move, regular_size

if TYPE_CHECKING:
    from .cork import Cork

__all__ = ("EXTENSIONS", "Cycle", "FileSender", "Flow", "Message")

#: What an application finds in ``scope["extensions"]``.
EXTENSIONS: Final = ("http.response.pathsend", "http.response.zerocopysend")

#: A record holds at most this much. A response that fits is read and written whole, since its head and its file would need two records otherwise;
#: of a bigger one the head's record is a small part, and copying the file costs more.
_RECORD_SIZE: Final = 16 * 1024

#: Errors of the network that are neither ``ConnectionError`` nor ``TimeoutError``.
_NETWORK_ERRORS: Final = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET}

Message: TypeAlias = Mapping[str, Any]


class Flow(Protocol):
    """What is used of uvicorn's ``FlowControl``."""

    write_paused: bool

    async def drain(self) -> None:
        """Wait until the transport wants more."""
        ...


class Cycle(Protocol):
    """What is used of uvicorn's ``RequestResponseCycle``, of both its HTTP implementations."""

    scope: Any
    transport: Any
    flow: Any
    disconnected: bool
    response_started: bool
    response_complete: bool

    async def send(self, message: Any) -> None:
        """uvicorn's ASGI ``send``."""
        ...


class FileSender:
    """Sends what one application answers to one request. What depends on uvicorn's implementation of HTTP is its subclasses'."""

    __slots__ = ("_cork", "_cycle")

    def __init__(self, cycle: Cycle) -> None:
        self._cycle = cycle
        self._cork: Cork = cycle.transport

    def allowance(self) -> int | None:
        """How many bytes of body may still come; None if the response doesn't say."""
        raise NotImplementedError

    def frame(self, count: int) -> tuple[bytes, bytes]:
        """Count ``count`` bytes of body as sent; return what goes before and behind them."""
        raise NotImplementedError

    async def send(self, message: Message) -> None:
        """ASGI's ``send``. Raises as uvicorn's; ``OSError`` if a file can't be opened or read, ``ValueError`` if it isn't a regular one."""
        match message["type"]:
            case "http.response.start":
                with self._cork.holding():
                    await self._cycle.send(message)
            case "http.response.pathsend":
                await self._send_path(message)
            case "http.response.zerocopysend":
                await self._send_open_file(message)
            case _:
                await self._cycle.send(message)

    async def _send_path(self, message: Message) -> None:
        if not await self._expected(message):
            return
        # Not to be stopped by a FIFO; means nothing for a regular file.
        fd = os.open(message["path"], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            await self._send_part(fd, 0, None, more_body=False)
        finally:
            os.close(fd)

    async def _send_open_file(self, message: Message) -> None:
        if not await self._expected(message):
            return
        file, count = message["file"], message.get("count")
        fd = file if isinstance(file, int) else file.fileno()
        more_body = message.get("more_body", False)
        if (offset := message.get("offset")) is not None:
            await self._send_part(fd, offset, count, more_body=more_body)
        elif isinstance(file, int):
            offset = os.lseek(fd, 0, os.SEEK_CUR)
            sent = await self._send_part(fd, offset, count, more_body=more_body)
            os.lseek(fd, offset + sent, os.SEEK_SET)
        else:
            offset = file.tell()
            sent = await self._send_part(fd, offset, count, more_body=more_body)
            file.seek(offset + sent)

    async def _expected(self, message: Message) -> bool:
        """Whether a file is to be sent now; if not, all has been done that should be."""
        cycle = self._cycle
        if not cycle.response_started or cycle.response_complete:
            await cycle.send(message)  # which raises
            return False
        if cycle.disconnected:
            return False
        if self._cork.is_closing():
            cycle.disconnected = True
            return False
        if cycle.scope["method"] == "HEAD":
            await self._send_body(b"", more_body=message.get("more_body", False))
            return False
        return True

    async def _send_part(self, fd: int, offset: int, count: int | None, *, more_body: bool) -> int:
        available = max(regular_size(fd) - offset, 0)
        if count is not None:
            available = min(available, count)
        allowance = self.allowance()
        promised = available if allowance is None else min(available, allowance)
        too_long = promised < available

        if promised + self._cork.held <= _RECORD_SIZE:
            data = os.pread(fd, promised, offset)
            await self._send_body(data, more_body=more_body or too_long)
            sent = len(data)
        else:
            sent = await self._send_big_part(fd, offset, promised)
            if not self._cycle.disconnected and not too_long:
                await self._send_body(b"", more_body=more_body)
        if too_long and not self._cycle.disconnected:
            raise RuntimeError("Response content longer than Content-Length")
        return sent

    async def _send_big_part(self, fd: int, offset: int, count: int) -> int:
        before, after = self.frame(count)
        self._cork.write(before)
        self._cork.flush()
        try:
            sent = await move(self._cork.transport, self._cycle.flow, fd, offset, count)
        except BaseException as error:
            left = self._cycle.disconnected or self._cork.is_closing() or _is_network_error(error)
            self._cut()
            if left and isinstance(error, Exception):
                return 0
            raise
        if self._cork.is_closing():
            self._cycle.disconnected = (
                True  # and what has been sent gets the time that closing takes
            )
        elif sent < count:
            self._cut()
            raise RuntimeError(
                "Response content shorter than Content-Length"
                if self.allowance() is not None
                else "File became shorter while it was being sent"
            )
        else:
            with self._cork.holding():
                self._cork.write(after)
        return sent

    async def _send_body(self, body: bytes, *, more_body: bool) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": more_body})

    def _cut(self) -> None:
        """Give the connection up: nothing may look like an end, and nothing that is sent from now on may reach the client."""
        self._cycle.disconnected = True
        self._cork.abort()


def _is_network_error(error: BaseException) -> bool:
    """Whether it is the connection that failed, and not the file."""
    return isinstance(error, ConnectionError | TimeoutError | ssl.SSLError) or (
        isinstance(error, OSError) and error.errno in _NETWORK_ERRORS
    )
