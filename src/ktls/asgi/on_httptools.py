"""uvicorn's HTTP protocol on httptools, with files."""

from __future__ import annotations

from typing import Any, ClassVar, final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .seam import FileProtocolMixin, check_uvicorn
from .sender import FileSender

__all__ = ("HttpToolsFileSender", "HttpToolsPathSendProtocol")

check_uvicorn(
    HttpToolsProtocol, RequestResponseCycle, "chunked_encoding", "expected_content_length"
)


@final
class HttpToolsFileSender(FileSender):
    """Keeps the accounts of uvicorn's cycle, which frames by itself."""

    __slots__ = ()

    _cycle: Any

    def allowance(self) -> int | None:
        """How many bytes of body may still come; None if the response is chunked."""
        cycle = self._cycle
        return None if cycle.chunked_encoding else cycle.expected_content_length

    def frame(self, count: int) -> tuple[bytes, bytes]:
        """Count ``count`` bytes of body as sent; return what goes before and behind them."""
        cycle = self._cycle
        if cycle.chunked_encoding:
            return b"%x\r\n" % count, b"\r\n"
        cycle.expected_content_length -= count
        return b"", b""


class HttpToolsPathSendProtocol(FileProtocolMixin, HttpToolsProtocol):
    """``HttpToolsProtocol`` that offers ``http.response.pathsend`` and ``http.response.zerocopysend``."""

    file_sender: ClassVar[type[FileSender]] = HttpToolsFileSender
