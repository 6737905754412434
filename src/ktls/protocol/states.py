"""What the state machine says (``ConnectionState`` items), and its transitions, as data.

TLS 1.3 closes each direction on its own (RFC 9846 §6.1), so there are two half machines, one per direction, and both are blind to the role.
A cell that is not in a table is an illegal move. ``connection`` is the only user of the tables; tests walk every cell.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias, final

from .enums import ContentType, HandshakeType, KeyChangeCause, ProtocolVersion, Role
from .key_schedule import TrafficKeys

__all__ = (
    "HANDSHAKE_RULES",
    "RX_TRANSITIONS",
    "TX_TRANSITIONS",
    "ApplicationData",
    "Closed",
    "ConnectionState",
    "HalfState",
    "HandshakeRule",
    "InboundPlainMessage",
    "PeerClosed",
    "RxEvent",
    "SendMessage",
    "SessionTicket",
    "TxEvent",
    "UpdateRxKey",
    "UpdateTxKey",
)


@final
@dataclass(frozen=True, slots=True)
class InboundPlainMessage:
    """One decrypted record, or what is left of one: its content type and its fragment.

    ``content_type`` is a plain number where the peer used one that TLS does not define.
    """

    content_type: ContentType | int
    fragment: bytes = field(repr=False)


@final
@dataclass(frozen=True, slots=True)
class ApplicationData:
    """Fact: bytes for the application."""

    data: bytes = field(repr=False)


@final
@dataclass(frozen=True, slots=True)
class PeerClosed:
    """Fact: close_notify received. No more data will come; in TLS 1.3 we may still send."""


@final
@dataclass(frozen=True, slots=True)
class Closed:
    """Fact: both directions are closed."""


@final
@dataclass(frozen=True, slots=True)
class SendMessage:
    """Command: send ``fragment`` as one record under the *current* sending key."""

    content_type: ContentType
    fragment: bytes = field(repr=False)


@final
@dataclass(frozen=True, slots=True)
class UpdateTxKey:
    """Command: install ``keys`` for sending, with sequence number 0; everything after it is under the new key.

    Then tell the connection with ``tx_key_installed(generation)``. ``cause`` is for statistics only.
    """

    keys: TrafficKeys
    generation: int
    cause: KeyChangeCause = field(default=KeyChangeCause.APPLICATION, compare=False)


@final
@dataclass(frozen=True, slots=True)
class UpdateRxKey:
    """Command: install ``keys`` for receiving, with sequence number 0, before reading anything more."""

    keys: TrafficKeys
    generation: int


@final
@dataclass(frozen=True, slots=True)
class SessionTicket:
    """Command: give this whole NewSessionTicket message to the engine's ticket relay (clients, TLS 1.3)."""

    message: bytes = field(repr=False)


ConnectionState: TypeAlias = (
    ApplicationData | PeerClosed | Closed | SendMessage | UpdateTxKey | UpdateRxKey | SessionTicket
)


class HalfState(enum.Enum):
    """State of one direction."""

    OPEN = "open"
    #: Sending only: the key may protect no more application data and can't be changed; close_notify may still go out.
    EXHAUSTED = "exhausted"
    #: close_notify was sent (or received).
    CLOSED = "closed"
    FAILED = "failed"


class RxEvent(enum.Enum):
    """What can come in."""

    MESSAGE = "message"
    CLOSE_NOTIFY = "close_notify"
    FAILURE = "failure"


class TxEvent(enum.Enum):
    """What can go out."""

    KEY_UPDATE = "key_update"
    KEY_EXHAUSTED = "key_exhausted"
    CLOSE_NOTIFY = "close_notify"
    FAILURE = "failure"


# After close_notify everything is ignored (RFC 9846 §6.1), also what would be an error: the half stays CLOSED.
RX_TRANSITIONS: Final[Mapping[tuple[HalfState, RxEvent], HalfState]] = {
    (HalfState.OPEN, RxEvent.MESSAGE): HalfState.OPEN,
    (HalfState.OPEN, RxEvent.CLOSE_NOTIFY): HalfState.CLOSED,
    (HalfState.OPEN, RxEvent.FAILURE): HalfState.FAILED,
    (HalfState.CLOSED, RxEvent.MESSAGE): HalfState.CLOSED,
    (HalfState.CLOSED, RxEvent.CLOSE_NOTIFY): HalfState.CLOSED,
    (HalfState.CLOSED, RxEvent.FAILURE): HalfState.FAILED,
    (HalfState.FAILED, RxEvent.FAILURE): HalfState.FAILED,
}

TX_TRANSITIONS: Final[Mapping[tuple[HalfState, TxEvent], HalfState]] = {
    (HalfState.OPEN, TxEvent.KEY_UPDATE): HalfState.OPEN,
    (HalfState.OPEN, TxEvent.KEY_EXHAUSTED): HalfState.EXHAUSTED,
    (HalfState.OPEN, TxEvent.CLOSE_NOTIFY): HalfState.CLOSED,
    (HalfState.OPEN, TxEvent.FAILURE): HalfState.FAILED,
    (HalfState.EXHAUSTED, TxEvent.KEY_EXHAUSTED): HalfState.EXHAUSTED,
    (HalfState.EXHAUSTED, TxEvent.CLOSE_NOTIFY): HalfState.CLOSED,
    (HalfState.EXHAUSTED, TxEvent.FAILURE): HalfState.FAILED,
    (HalfState.CLOSED, TxEvent.FAILURE): HalfState.FAILED,
    (HalfState.FAILED, TxEvent.FAILURE): HalfState.FAILED,
}


class HandshakeRule(enum.Enum):
    """What a handshake message means after the handshake."""

    KEY_UPDATE = "key_update"
    SESSION_TICKET = "session_ticket"
    #: Answered with a no_renegotiation warning; the connection goes on (RFC 5246 §7.2.2).
    REFUSE_RENEGOTIATION = "refuse_renegotiation"


# Every handshake type that may come after the handshake. What is not here is an unexpected_message. A post-handshake CertificateRequest is not:
# the post_handshake_auth extension is never offered on a connection that is handed off.
HANDSHAKE_RULES: Final[
    Mapping[tuple[ProtocolVersion, Role], Mapping[HandshakeType, HandshakeRule]]
] = {
    (ProtocolVersion.TLSv1_3, Role.CLIENT): {
        HandshakeType.KEY_UPDATE: HandshakeRule.KEY_UPDATE,
        HandshakeType.NEW_SESSION_TICKET: HandshakeRule.SESSION_TICKET,
    },
    (ProtocolVersion.TLSv1_3, Role.SERVER): {
        HandshakeType.KEY_UPDATE: HandshakeRule.KEY_UPDATE,
    },
    (ProtocolVersion.TLSv1_2, Role.CLIENT): {
        HandshakeType.HELLO_REQUEST: HandshakeRule.REFUSE_RENEGOTIATION,
    },
    (ProtocolVersion.TLSv1_2, Role.SERVER): {
        HandshakeType.CLIENT_HELLO: HandshakeRule.REFUSE_RENEGOTIATION,
    },
}
