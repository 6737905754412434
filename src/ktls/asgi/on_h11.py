"""uvicorn's HTTP protocol on h11, with files."""

from __future__ import annotations

from typing import Any, ClassVar, Final, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from .seam import FileProtocolMixin, check_uvicorn
from .sender import Cycle, FileSender, Message

__all__ = ("H11FileSender", "H11PathSendProtocol")

check_uvicorn(H11Protocol, RequestResponseCycle, "conn")


#: Responses that have no body, whatever their head says.
_BODILESS: Final = {204, 304}


@final
class _Gap:
    """Stands for bytes that h11 counts and never sees."""

    __slots__ = ("_size",)

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


@final
class H11FileSender(FileSender):
    """Lets h11 frame what it doesn't see: it has an interface for that. How much may still come it doesn't tell, so that is counted here."""

    __slots__ = ("_left",)

    _cycle: Any

    def __init__(self, cycle: Cycle) -> None:
        super().__init__(cycle)
        self._left: int | None = None

    def allowance(self) -> int | None:
        """How many bytes of body may still come; None if the response has no Content-Length."""
        return self._left

    def frame(self, count: int) -> tuple[bytes, bytes]:
        """Count ``count`` bytes of body as sent; return what goes before and behind them."""
        self._count(count)
        gap: Any = _Gap(count)
        pieces = self._cycle.conn.send_with_data_passthrough(h11.Data(data=gap))
        index = pieces.index(gap)
        return b"".join(pieces[:index]), b"".join(pieces[index + 1 :])

    async def send(self, message: Message) -> None:
        """ASGI's ``send``, see ``FileSender``."""
        await super().send(message)
        if message["type"] == "http.response.start":
            self._left = _content_length(message)
        elif message["type"] == "http.response.body":
            self._count(len(message.get("body", b"")))

    def _count(self, count: int) -> None:
        if self._left is not None:
            self._left -= count


def _content_length(message: Message) -> int | None:
    if message["status"] in _BODILESS:
        return 0
    headers = {name.lower(): value for name, value in message.get("headers", ())}
    if b"transfer-encoding" in headers or b"content-length" not in headers:
        return None
    return int(headers[b"content-length"])


class H11PathSendProtocol(FileProtocolMixin, H11Protocol):
    """``H11Protocol`` that offers ``http.response.pathsend`` and ``http.response.zerocopysend``."""

    file_sender: ClassVar[type[FileSender]] = H11FileSender
