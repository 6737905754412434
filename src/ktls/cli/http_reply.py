"""The reply to one HTTP/1.1 request, read so that it is always known which bytes were taken from the socket.

``http.client`` buffers what it reads, and bytes in somebody's buffer can't be spliced by the kernel. Here the
buffer is ours: the head is read, the few body bytes that came with it are handed over, the rest stays in the socket.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from .failure import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("Reader", "Reply", "read_reply")

_READ_SIZE: Final = 16 * 1024
_MAX_LINE: Final = 64 * 1024
_MAX_INTERIM: Final = 16
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[0-9] ([1-5][0-9]{2})(?: ([^\r\n]*))?\r?\n")
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", re.ASCII)
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r?\n")
#: Repr-Digest (RFC 9530) or its predecessor Digest (RFC 3230).
_SHA256: Final = re.compile(r"(?:^|,)\s*sha-256=:?([A-Za-z0-9+/]{43}=)", re.IGNORECASE)


@final
class Reader:
    """Reads from ``recv``, keeping what is ahead where it can be had back."""

    def __init__(self, recv: Callable[[int], bytes]) -> None:
        self._recv = recv
        self._ahead = bytearray()

    def readline(self, limit: int = _MAX_LINE) -> bytes:
        """Return a line with its end, or its first ``limit`` bytes: what ``http.client.parse_headers`` asks for. ``EOFError`` if it is cut."""
        start = 0
        while True:
            end = self._ahead.find(b"\n", start, limit)
            if end >= 0:
                return self.take(end + 1)
            if len(self._ahead) >= limit:
                return self.take(limit)
            start = len(self._ahead)
            data = self._recv(_READ_SIZE)
            if not data:
                raise EOFError
            self._ahead += data

    def take(self, size: int) -> bytes:
        """Return up to ``size`` bytes of what was read ahead."""
        taken = bytes(self._ahead[:size])
        del self._ahead[:size]
        return taken

    def read(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes, b"" at the end of the stream."""
        return self.take(size) or self._recv(size)

    def chunks(self) -> Iterator[bytes]:
        """Yield the data of a chunked body (RFC 9112 §7.1), to its end; ``EOFError`` if it is cut."""
        while True:
            size = self._chunk_size()
            if size == 0:
                break
            while size:
                data = self.read(min(size, _READ_SIZE))
                if not data:
                    raise EOFError
                size -= len(data)
                yield data
            self._end_line()
        while self.readline().strip(b"\r\n"):  # trailer fields
            pass

    def _chunk_size(self) -> int:
        match = _CHUNK_SIZE.fullmatch(self.readline(1024))
        if match is None:
            raise Failure("the server's answer is not HTTP: a chunk has no size")
        return int(match[1], 16)

    def _end_line(self) -> None:
        if self.readline(2) not in (b"\r\n", b"\n"):
            raise Failure("the server's answer is not HTTP: a chunk has no end")


@final
@dataclass(frozen=True, slots=True)
class Reply:
    """Status and header fields; the body is still to be read."""

    status: int
    phrase: str
    headers: http.client.HTTPMessage

    @property
    def chunked(self) -> bool:
        """Whether the body is in chunks; ``Failure`` for what nobody asked for."""
        coding = self.headers.get("Transfer-Encoding")
        if coding is None:
            return False
        if coding.strip().lower() != "chunked":
            raise Failure(f"the server sends a transfer coding that was not asked for: {coding}")
        return True

    @property
    def length(self) -> int | None:
        """Length of the body, or None if it ends with the connection (or is chunked)."""
        values = {value.strip() for value in self.headers.get_all("Content-Length", [])}
        if self.chunked or not values:
            return None
        value = values.pop()
        if values or not re.fullmatch("[0-9]{1,19}", value, re.ASCII):
            raise Failure("the server's answer is not HTTP: its Content-Length is not one number")
        return int(value)

    @property
    def content_range(self) -> tuple[int, int, int] | None:
        """(first byte, last byte, size of the whole) of a 206, if it says so."""
        match = _CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", "").strip())
        return None if match is None else (int(match[1]), int(match[2]), int(match[3]))

    @property
    def validator(self) -> str | None:
        """What If-Range may hold: a strong entity tag, else the date (RFC 9110 §13.1.5)."""
        etag: str = self.headers.get("ETag", "").strip()
        if etag:
            return etag if etag.startswith('"') else None
        return self.headers.get("Last-Modified")

    @property
    def sha256(self) -> bytes | None:
        """SHA-256 of the whole file, if the server says it."""
        for name in ("Repr-Digest", "Digest"):
            match = _SHA256.search(self.headers.get(name, ""))
            if match is not None:
                try:
                    return base64.b64decode(match[1], validate=True)
                except binascii.Error:
                    return None
        return None


def read_reply(reader: Reader) -> Reply:
    """Read the head of the final answer; interim ones (100, 103) are skipped."""
    for _ in range(_MAX_INTERIM):
        match = _STATUS_LINE.fullmatch(reader.readline())
        if match is None:
            raise Failure("the server's answer is not HTTP/1.1")
        try:
            headers = http.client.parse_headers(reader)
        except http.client.HTTPException as error:
            raise Failure(f"the server's answer is not HTTP: {error}") from error
        if match[1][0:1] != b"1":
            return Reply(int(match[1]), (match[2] or b"").decode("latin-1").strip(), headers)
    raise Failure("the server never comes to its answer")
