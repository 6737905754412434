"""The files of a directory as an aiohttp server: one request in, one answer out.

Theory of operation
    aiohttp does HTTP/1.1: parsing, keep-alive, pipelining, discarding bodies. Its ``FileResponse`` is not used: it takes an ``If-Range`` that holds an
    entity tag for none at all (a resumed download would be put together from two versions), it does not look at what ``sendfile`` returns (a file that shrank is
    answered short on a connection that goes on, and the client takes the next answer for the rest), and it goes through threads three times per request.

    A body up to ``ONE_RECORD`` goes out with the header by one ``write``: one TLS record. A bigger one goes by ``loop.sendfile``, which the loops of
    ``ktls.aio`` do in the kernel, in pieces, so that the count of bytes grows while a download runs.

    A body that can't be sent as promised ends its connection by ``abort``, without close_notify: the client must see that what it has is not all.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, final

from aiohttp import hdrs, web
from aiohttp.abc import AbstractAccessLogger

from .http_files import Body, answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.abc import AbstractStreamWriter

    from .http_files import Answer
    from .metrics import Metrics

__all__ = ("ONE_RECORD", "AccessLog", "FileResponse", "Request", "handler_for", "printable")

#: Largest body that is read and sent with its header: together they fit into one record of 16 KiB. Measured on kernel TLS, a record costs 21 000
#: instructions, so that a second one outweighs what ``sendfile`` saves up to about 16 KiB, and no more above.
ONE_RECORD: Final = 15 * 1024
#: Bytes per ``sendfile``: a multiple of 16 KiB, so that no record is cut short; enough for its fixed cost not to count.
_PIECE: Final = 16 * 2**20
#: No versions: they help only attackers.
_SERVER: Final = "ktls"
#: A line of the access log stays below PIPE_BUF, so that it is written as one piece.
_MAX_SHOWN: Final = 2000


def printable(text: str) -> str:
    """Escape what could forge log lines or drive a terminal; cut what is very long."""
    shown = "".join(
        char if " " <= char <= "~" and char not in '"\\' else f"\\x{ord(char):02x}"
        for char in text[: _MAX_SHOWN + 1]
    )
    return shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "..."


class _FileShrank(ConnectionAbortedError):
    """Fewer bytes than promised: nothing may be sent in their place, so the connection ends here."""


@final
class Request(web.BaseRequest):
    """A request whose answer, aiohttp's own refusals included, names the server our way."""

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers[hdrs.SERVER] = _SERVER


@final
class FileResponse(web.StreamResponse):
    """A header, and a part of a file by ``loop.sendfile``. ``sent`` bytes of the body were accepted by the transport."""

    def __init__(self, content: Answer, body: Body, complain: Callable[[BaseException], None]):
        super().__init__(status=content.status, headers=content.fields)
        self.content_length = len(body.part)
        self.sent = 0
        self._file_body = body
        self._complain = complain

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send everything. A ``ConnectionError`` if it could not be; the connection is aborted then."""
        if self.prepared:
            return await super().prepare(request)
        transport = request.transport
        with self._file_body.file:
            if transport is None:
                raise ConnectionResetError("the client has gone")
            log = request.protocol.access_logger
            try:
                writer = await super().prepare(request)
                await self._send(transport, log if isinstance(log, AccessLog) else None)
            except BaseException as error:
                lost = transport.is_closing()
                transport.abort()
                if not isinstance(error, Exception):
                    raise
                if not lost:  # else its end is reported by itself
                    self._complain(error)
                # Of a ConnectionError, aiohttp says nothing.
                raise ConnectionAbortedError("the body could not be sent") from error
        return writer

    async def _send(self, transport: asyncio.Transport, log: AccessLog | None) -> None:
        loop = asyncio.get_running_loop()
        file, part = self._file_body.file, self._file_body.part
        while self.sent < len(part):
            start, count = part.start + self.sent, min(_PIECE, len(part) - self.sent)
            file.seek(start)
            try:
                await loop.sendfile(transport, file, start, count)
            finally:
                sent = file.tell() - start  # right after an error, too
                self.sent += sent
                if log is not None:
                    log.count(sent)
            if sent < count:
                raise _FileShrank(f"the file shrank: {self.sent} of {len(part)} bytes sent")


@final
class AccessLog(AbstractAccessLogger):
    """One line per request: who protected the records, and how many bytes of the body went out. aiohttp makes one of these per connection.

    ``begin`` says what the connection is; the transport may have gone when the line is written.
    """

    def __init__(self, logger: Any, log_format: str) -> None:
        super().__init__(logger, log_format)
        self._peer = "-"
        self._tls: Any = None
        self._write: Callable[[str], None] | None = None
        self._metrics: Metrics | None = None

    def begin(
        self, peer: str, tls: Any, write: Callable[[str], None], metrics: Metrics | None
    ) -> None:
        """Set the connection's address and its ``ktls`` object, and where lines go."""
        self._peer, self._tls, self._write, self._metrics = peer, tls, write, metrics

    def count(self, size: int) -> None:
        """``size`` bytes of a body were sent."""
        if self._metrics is not None:
            self._metrics.body_bytes("-" if self._tls is None else self._tls.offload.tx, size)

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """See ``AbstractAccessLogger``."""
        if self._write is None:
            return
        sent = 0
        if isinstance(response, FileResponse):
            sent = response.sent
        elif isinstance(response, web.Response) and isinstance(response.body, bytes):
            sent = 0 if request.method == hdrs.METH_HEAD else len(response.body)
            self.count(sent)
        offload = ("-", "-") if self._tls is None else (self._tls.offload.tx, self._tls.offload.rx)
        version = request.version
        line = printable(f"{request.method} {request.raw_path}")
        self._write(
            f'{self._peer} "{line} HTTP/{version.major}.{version.minor}"'
            f" {response.status} {sent} tx={offload[0]} rx={offload[1]}\n"
        )
        if self._metrics is not None:
            self._metrics.request(request.method, response.status)


def handler_for(
    root: str, complain: Callable[[str | None, BaseException], None]
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """Return aiohttp's handler for the files below ``root``; ``complain(address, error)`` is told what ends a connection early."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            response: web.StreamResponse = web.Response(
                status=405, headers={hdrs.ALLOW: "GET, HEAD"}
            )
        else:
            content = answer(root, request.method, request.raw_path, request.headers)
            response = _response(
                content, request.method, lambda error: complain(request.remote, error)
            )
        if request.body_exists:
            # Nobody reads it, and a client that waits for "100 Continue" never sends it.
            response.force_close()
        return response

    return handle


def _response(
    content: Answer, method: str, complain: Callable[[BaseException], None]
) -> web.StreamResponse:
    body = content.body
    if not isinstance(body, Body):
        phrase = "File not found" if content.status == 404 else None
        return web.Response(status=content.status, reason=phrase, headers=content.fields, body=body)
    size = len(body.part)
    if method == hdrs.METH_HEAD:
        body.file.close()
        content.fields[hdrs.CONTENT_LENGTH] = str(size)
        return web.Response(status=content.status, headers=content.fields)
    if size > ONE_RECORD:
        return FileResponse(content, body, complain)
    with body.file:
        body.file.seek(body.part.start)
        data = body.file.read(size)
    if len(data) == size:
        return web.Response(status=content.status, headers=content.fields, body=data)
    # It shrank since it was opened: to begin anew is right, and simpler than to mend what was decided.
    return web.Response(status=503)
