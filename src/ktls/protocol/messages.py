"""Handshake messages and alerts as bytes: build, parse, and put together what was split over records.

Does not know what may follow what (``connection`` does), and parses only what a post-handshake connection meets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, final

from .enums import AlertDescription, AlertLevel, HandshakeType, KeyUpdateRequest
from .errors import RemoteProtocolError

__all__ = (
    "MAX_HANDSHAKE_MESSAGE",
    "Alert",
    "HandshakeMessage",
    "HandshakeReassembler",
    "build_alert",
    "build_key_update",
    "check_new_session_ticket",
    "parse_alert",
    "parse_key_update",
)

_HEADER: Final = 4
#: Body of the largest legal NewSessionTicket (RFC 9846 §4.7.1): lifetime, age_add, nonce 255, ticket 2^16-1, extensions 2^16-2 bytes. Nothing that is
#: accepted after the handshake is larger.
MAX_HANDSHAKE_MESSAGE: Final = 4 + 4 + 1 + 255 + 2 + 0xFFFF + 2 + 0xFFFE


@final
@dataclass(frozen=True, slots=True)
class HandshakeMessage:
    """One whole handshake message; ``body`` is without the 4-byte header."""

    type: HandshakeType
    body: bytes = field(repr=False)

    def encode(self) -> bytes:
        """Return the message with its header."""
        return bytes((self.type,)) + len(self.body).to_bytes(3, "big") + self.body


@final
class HandshakeReassembler:
    """Cuts handshake messages out of record fragments, however they were split or joined.

    Memory is bounded: a message whose type is not acceptable, or which announces more than ``MAX_HANDSHAKE_MESSAGE`` bytes, is refused as soon
    as its header shows that.
    """

    __slots__ = ("_accept", "_pending")

    def __init__(self, accept: Callable[[int], HandshakeType]) -> None:
        """``accept`` turns the type byte into a ``HandshakeType``, or raises ``RemoteProtocolError``."""
        self._accept = accept
        self._pending = bytearray()

    @property
    def pending(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._pending)

    def feed(self, fragment: bytes) -> list[HandshakeMessage]:
        """Take the fragment of one record; return the messages that it completes, in order.

        Raises ``RemoteProtocolError``; the reassembler is not to be used after that.
        """
        buffer = self._pending
        buffer += fragment
        messages: list[HandshakeMessage] = []
        start = 0
        while start < len(buffer):
            message_type = self._accept(buffer[start])
            if len(buffer) - start < _HEADER:
                break
            length = int.from_bytes(buffer[start + 1 : start + _HEADER], "big")
            if length > MAX_HANDSHAKE_MESSAGE:
                raise RemoteProtocolError(
                    f"handshake message of {length} bytes", AlertDescription.ILLEGAL_PARAMETER
                )
            end = start + _HEADER + length
            if len(buffer) < end:
                break
            messages.append(HandshakeMessage(message_type, bytes(buffer[start + _HEADER : end])))
            start = end
        del buffer[:start]
        return messages


def build_key_update(request: KeyUpdateRequest) -> bytes:
    """Encode a KeyUpdate message (RFC 9846 §4.7.3)."""
    return HandshakeMessage(HandshakeType.KEY_UPDATE, bytes((request,))).encode()


def parse_key_update(body: bytes) -> KeyUpdateRequest:
    """Decode the body of a KeyUpdate; raises ``RemoteProtocolError`` (decode_error, illegal_parameter)."""
    if len(body) != 1:
        raise RemoteProtocolError("KeyUpdate of a wrong length", AlertDescription.DECODE_ERROR)
    try:
        return KeyUpdateRequest(body[0])
    except ValueError:
        raise RemoteProtocolError(
            f"KeyUpdate with the request {body[0]}", AlertDescription.ILLEGAL_PARAMETER
        ) from None


@final
@dataclass(frozen=True, slots=True)
class Alert:
    """An alert as received; unknown codes stay numbers."""

    level: int
    description: AlertDescription | int


def build_alert(description: AlertDescription, level: AlertLevel = AlertLevel.FATAL) -> bytes:
    """Encode an alert (RFC 9846 §6). The levels that the RFC fixes are set whatever ``level`` says."""
    if description in (
        AlertDescription.CLOSE_NOTIFY,
        AlertDescription.USER_CANCELED,
        AlertDescription.NO_RENEGOTIATION,
    ):
        level = AlertLevel.WARNING
    return bytes((level, description))


def parse_alert(fragment: bytes) -> Alert:
    """Decode the one alert of a record; raises ``RemoteProtocolError`` (decode_error).

    A record holds exactly one alert (RFC 9846 §5.1). RFC 5246 would let TLS 1.2 split them; no deployed stack does.
    """
    if len(fragment) != 2:
        raise RemoteProtocolError(
            f"alert record of {len(fragment)} bytes", AlertDescription.DECODE_ERROR
        )
    level, code = fragment
    try:
        return Alert(level, AlertDescription(code))
    except ValueError:
        return Alert(level, code)


def check_new_session_ticket(body: bytes) -> None:
    """Check the syntax of a TLS 1.3 NewSessionTicket body (RFC 9846 §4.7.1); raises ``RemoteProtocolError`` (decode_error).

    The meaning (PSK, lifetime) is the engine's business. A ticket that we do not relay must not pass unseen if malformed.
    """
    rest = _Reader(body)
    rest.take(8)  # ticket_lifetime, ticket_age_add
    rest.vector(1)  # ticket_nonce
    if not rest.vector(2):
        raise RemoteProtocolError("empty session ticket", AlertDescription.DECODE_ERROR)
    extensions = _Reader(rest.vector(2))
    rest.expect_end()
    while extensions:
        extensions.take(2)
        extensions.vector(2)


class _Reader:
    """Takes a message apart from the left; what is missing or left over is a decode_error."""

    __slots__ = ("_data", "_offset")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def __bool__(self) -> bool:
        return self._offset < len(self._data)

    def take(self, count: int) -> bytes:
        chunk = self._data[self._offset : self._offset + count]
        if len(chunk) != count:
            raise RemoteProtocolError("message ends too early", AlertDescription.DECODE_ERROR)
        self._offset += count
        return chunk

    def vector(self, length_bytes: int) -> bytes:
        return self.take(int.from_bytes(self.take(length_bytes), "big"))

    def expect_end(self) -> None:
        if self:
            raise RemoteProtocolError("message has trailing bytes", AlertDescription.DECODE_ERROR)
