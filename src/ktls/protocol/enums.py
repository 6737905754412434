"""Code points of TLS, spelled as in the IANA registries and the RFCs.

Sources: RFC 9846 (TLS 1.3), RFC 5246 (TLS 1.2), IANA "Transport Layer Security (TLS) Parameters".
Every enumeration of wire values is ``@unique``: a mistyped number must not become an alias.
"""

from __future__ import annotations

import enum

__all__ = (
    "AlertDescription",
    "AlertLevel",
    "ContentType",
    "Direction",
    "HandshakeType",
    "KeyChangeCause",
    "KeyUpdateRequest",
    "ProtocolVersion",
    "Role",
)


@enum.unique
class ProtocolVersion(enum.IntEnum):
    """Versions that the kernel can protect (RFC 9846 §4.3.1)."""

    TLSv1_2 = 0x0303
    TLSv1_3 = 0x0304


@enum.unique
class ContentType(enum.IntEnum):
    """Record content types (RFC 9846 §5.1)."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    APPLICATION_DATA = 23


@enum.unique
class HandshakeType(enum.IntEnum):
    """Handshake message types (RFC 9846 §4, RFC 5246 §7.4)."""

    HELLO_REQUEST = 0
    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    NEW_SESSION_TICKET = 4
    END_OF_EARLY_DATA = 5
    ENCRYPTED_EXTENSIONS = 8
    CERTIFICATE = 11
    SERVER_KEY_EXCHANGE = 12
    CERTIFICATE_REQUEST = 13
    SERVER_HELLO_DONE = 14
    CERTIFICATE_VERIFY = 15
    CLIENT_KEY_EXCHANGE = 16
    FINISHED = 20
    KEY_UPDATE = 24


@enum.unique
class KeyUpdateRequest(enum.IntEnum):
    """The one field of a KeyUpdate (RFC 9846 §4.7.3)."""

    UPDATE_NOT_REQUESTED = 0
    UPDATE_REQUESTED = 1


@enum.unique
class AlertLevel(enum.IntEnum):
    """Alert levels (RFC 5246 §7.2); TLS 1.3 sends them but ignores them."""

    WARNING = 1
    FATAL = 2


@enum.unique
class AlertDescription(enum.IntEnum):
    """Alert descriptions (RFC 9846 §6, with those of RFC 5246 that TLS 1.2 peers send)."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    DECRYPT_ERROR = 51
    PROTOCOL_VERSION = 70
    INSUFFICIENT_SECURITY = 71
    INTERNAL_ERROR = 80
    INAPPROPRIATE_FALLBACK = 86
    USER_CANCELED = 90
    NO_RENEGOTIATION = 100
    MISSING_EXTENSION = 109
    UNSUPPORTED_EXTENSION = 110
    UNRECOGNIZED_NAME = 112
    BAD_CERTIFICATE_STATUS_RESPONSE = 113
    UNKNOWN_PSK_IDENTITY = 115
    CERTIFICATE_REQUIRED = 116
    GENERAL_ERROR = 117
    NO_APPLICATION_PROTOCOL = 120


class Role(enum.Enum):
    """Which end of the connection we are."""

    CLIENT = "client"
    SERVER = "server"


class Direction(enum.Enum):
    """Which way records flow, seen from us."""

    TX = "tx"
    RX = "rx"


class KeyChangeCause(enum.Enum):
    """Why a traffic key was replaced by the next one."""

    #: A limit of ours was reached (``KeyLimits``, the AEAD limit), or the receiving key nears it and the peer was asked.
    LIMIT = "limit"
    #: The application called ``refresh_traffic_keys``.
    APPLICATION = "application"
    #: Our key: the peer asked for it (KeyUpdate with update_requested).
    PEER_REQUEST = "peer_request"
    #: The peer's key: its KeyUpdate came.
    PEER = "peer"
