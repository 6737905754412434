"""Floods: what a peer may send as fast as it can, message by message, sealed with made-up keys (``ktls.testing``).

Also used by ``bench/floods.py``, which measures what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ktls.protocol.enums import (
    AlertDescription,
    AlertLevel,
    ContentType,
    HandshakeType,
    KeyUpdateRequest,
    ProtocolVersion,
    Role,
)
from ktls.protocol.messages import HandshakeMessage, build_alert, build_key_update
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.aead import HEADER_LENGTH, RecordProtection
from ktls.testing import made_up_keys, made_up_secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = (
    "ATTACKS",
    "ENDLESS",
    "REFUSED",
    "TLS12",
    "TLS13",
    "Attack",
    "Attacker",
    "Ear",
    "ticket",
)

TLS13: Final = CipherSuite.TLS_AES_128_GCM_SHA256
TLS12: Final = CipherSuite.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256

#: Octets of a ticket that takes four records, nearly the most that its length field allows.
_BIG_TICKET: Final = 60_000


class Attacker:
    """Seals whatever it is told, and follows its own key changes. ``name`` is that of its made-up secret."""

    def __init__(self, suite: CipherSuite, name: str = "peer") -> None:
        self._suite = suite
        is_tls13 = suite.version is ProtocolVersion.TLSv1_3
        self._secret = made_up_secret(suite, name) if is_tls13 else None
        self._protection = RecordProtection(suite, made_up_keys(suite, name))

    def record(self, content_type: ContentType, fragment: bytes, padding: int = 0) -> bytes:
        """Return one record."""
        return self._protection.seal(content_type, fragment, padding)

    def key_update(self, request: bool) -> bytes:
        """Return a KeyUpdate; what comes next is under the next key."""
        assert self._secret is not None, "TLS 1.2 has no KeyUpdate"
        message = build_key_update(KeyUpdateRequest(int(request)))
        record = self.record(ContentType.HANDSHAKE, message)
        self._secret = self._secret.next()
        self._protection = RecordProtection(self._suite, self._secret.keys())
        return record

    def data(self, content: bytes) -> bytes:
        """Return one record of application data."""
        return self.record(ContentType.APPLICATION_DATA, content)

    def handshake(self, message: bytes) -> bytes:
        """Return a handshake message in as many records as it takes."""
        return b"".join(
            self.record(ContentType.HANDSHAKE, message[start : start + MAX_FRAGMENT])
            for start in range(0, len(message), MAX_FRAGMENT)
        )

    def close_notify(self) -> bytes:
        """Return close_notify."""
        return self.record(ContentType.ALERT, build_alert(AlertDescription.CLOSE_NOTIFY))


class Ear:
    """Opens what the victim sends, and follows its keys however often they change. ``name`` is that of its made-up secret."""

    def __init__(self, suite: CipherSuite, name: str = "us") -> None:
        self._suite = suite
        is_tls13 = suite.version is ProtocolVersion.TLSv1_3
        self._secret = made_up_secret(suite, name) if is_tls13 else None
        self._protection = RecordProtection(suite, made_up_keys(suite, name))
        self._buffer = bytearray()

    def open(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take what has come; return the types and contents of the records that are complete with it."""
        self._buffer += data
        records = []
        while len(self._buffer) >= HEADER_LENGTH:
            end = HEADER_LENGTH + int.from_bytes(self._buffer[3:HEADER_LENGTH], "big")
            if len(self._buffer) < end:
                break
            record = bytes(self._buffer[:end])
            del self._buffer[:end]
            message = self._protection.open(record[:HEADER_LENGTH], record[HEADER_LENGTH:])
            records.append((int(message.content_type), message.fragment))
            if message.content_type == ContentType.HANDSHAKE and self._secret is not None:
                self._secret = self._secret.next()
                self._protection = RecordProtection(self._suite, self._secret.keys())
        return records


def ticket(size: int) -> bytes:
    """Return a NewSessionTicket message whose ticket has ``size`` octets."""
    body = bytes(8) + b"\x01\x00" + size.to_bytes(2, "big") + bytes(size) + bytes(2)
    return HandshakeMessage(HandshakeType.NEW_SESSION_TICKET, body).encode()


@dataclass(frozen=True)
class Attack:
    """One flood. ``messages`` yields the records of one message at a time, for ever.

    ``victim`` is who has to bear it; ``cost`` the tokens of the flood budget that a message takes, ``earns`` those that it gives back. ``unseen``: a kernel that receives drops it
    without a word. ``endless_message``: it is all one handshake message, inside of which nothing else may come.
    """

    name: str
    messages: Callable[[Attacker], Iterator[bytes]]
    suite: CipherSuite = TLS13
    victim: Role = Role.SERVER
    cost: int = 1
    earns: float = 0
    unseen: bool = False
    endless_message: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def costly(self) -> bool:
        """Whether a message takes more memory, or makes more of it, than a record does."""
        return "requested" in self.name or "60 kB" in self.name or self.endless_message


def _key_updates(request: bool) -> Callable[[Attacker], Iterator[bytes]]:
    def messages(attacker: Attacker) -> Iterator[bytes]:
        while True:
            yield attacker.key_update(request)

    return messages


def _paid_key_updates(attacker: Attacker) -> Iterator[bytes]:
    while True:
        yield attacker.data(bytes(4096)) + attacker.key_update(True)


def _records(
    content_type: ContentType, fragment: bytes, padding: int = 0
) -> Callable[[Attacker], Iterator[bytes]]:
    def messages(attacker: Attacker) -> Iterator[bytes]:
        while True:
            yield attacker.record(content_type, fragment, padding)

    return messages


def _tickets(size: int) -> Callable[[Attacker], Iterator[bytes]]:
    message = ticket(size)

    def messages(attacker: Attacker) -> Iterator[bytes]:
        while True:
            yield attacker.handshake(message)

    return messages


def _fragments(attacker: Attacker) -> Iterator[bytes]:
    """One byte of a long ticket in each record."""
    message = ticket(_BIG_TICKET)
    while True:
        for position in range(len(message)):
            yield attacker.record(ContentType.HANDSHAKE, message[position : position + 1])


_DATA, _ALERT, _HANDSHAKE = (
    ContentType.APPLICATION_DATA,
    ContentType.ALERT,
    ContentType.HANDSHAKE,
)
_CANCELED: Final = build_alert(AlertDescription.USER_CANCELED)
_WARNING: Final = bytes((AlertLevel.WARNING, AlertDescription.UNRECOGNIZED_NAME))
_HELLO_REQUEST: Final = bytes(4)

#: Those that bring no data: the budget ends them.
REFUSED: Final = (
    Attack("KeyUpdate", _key_updates(False)),
    Attack("KeyUpdate, requested", _key_updates(True)),
    Attack("empty data records", _records(_DATA, b""), unseen=True),
    Attack("records of padding only", _records(_DATA, b"", 1000), unseen=True),
    Attack("user_canceled", _records(_ALERT, _CANCELED)),
    Attack("tickets", _tickets(100), victim=Role.CLIENT),
    Attack("tickets of 60 kB", _tickets(_BIG_TICKET), victim=Role.CLIENT, cost=4),
    Attack("one-byte fragments", _fragments, victim=Role.CLIENT, endless_message=True),
    Attack("warnings, TLS 1.2", _records(_ALERT, _WARNING), TLS12),
    Attack("HelloRequest, TLS 1.2", _records(_HANDSHAKE, _HELLO_REQUEST), TLS12, Role.CLIENT),
    Attack("empty data records, TLS 1.2", _records(_DATA, b""), TLS12, unseen=True),
)
#: Those that an honest peer may send as well, for as long as it likes.
ENDLESS: Final = (
    Attack("one-byte data records", _records(_DATA, b"x"), cost=0),
    Attack("one-byte data records, TLS 1.2", _records(_DATA, b"x"), TLS12, cost=0),
    Attack("KeyUpdate, requested, with 4 KiB of data", _paid_key_updates, earns=1),
)
ATTACKS: Final = REFUSED + ENDLESS
