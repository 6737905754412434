"""What the protocol tests share: connections with known secrets, and messages built by hand, not by the code under test."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.connection import KernelConnection, KeyLog
from ktls.protocol.enums import AlertDescription, ContentType, Direction, ProtocolVersion, Role
from ktls.protocol.errors import LocalProtocolError
from ktls.protocol.key_schedule import TrafficSecret
from ktls.protocol.states import (
    ConnectionState,
    HalfState,
    InboundPlainMessage,
    SendMessage,
    UpdateRxKey,
    UpdateTxKey,
)
from ktls.protocol.suites import CipherSuite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ktls.protocol.limits import KeyLimits

DATA = Path(__file__).parents[1] / "data"

TLS13 = CipherSuite.TLS_AES_128_GCM_SHA256
TLS12 = CipherSuite.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
CHACHA = CipherSuite.TLS_CHACHA20_POLY1305_SHA256
CCM = CipherSuite.TLS_AES_128_CCM_SHA256
MAX_GENERATION = 2**48 - 1

#: KeyUpdate messages, spelled out (RFC 9846 §4.7.3).
KU = bytes.fromhex("18 000001 00")
KU_REQUEST = bytes.fromhex("18 000001 01")
CLOSE_NOTIFY = b"\x01\x00"
USER_CANCELED = b"\x01\x5a"
UNEXPECTED = AlertDescription.UNEXPECTED_MESSAGE

#: What a connection says when these are to go out.
SEND_KU = SendMessage(ContentType.HANDSHAKE, KU)
SEND_KU_REQUEST = SendMessage(ContentType.HANDSHAKE, KU_REQUEST)
SEND_CLOSE_NOTIFY = SendMessage(ContentType.ALERT, CLOSE_NOTIFY)


def iana(name: str) -> dict[int, str]:
    """Read a checked-in extract of an IANA registry: value to name."""
    lines = (DATA / f"{name}.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {int(row["value"], 0): row["name"] for row in rows}


def rfc8448() -> dict[str, bytes]:
    """Read the vectors of RFC 8448 §3."""
    lines = (DATA / "rfc8448_section3.txt").read_text().splitlines()
    pairs = (line.split(" = ") for line in lines if not line.startswith("#"))
    return {name: bytes.fromhex(value) for name, value in pairs}


def secret(suite: CipherSuite, letter: bytes, generation: int = 0) -> TrafficSecret:
    """A traffic secret made of one letter."""
    return TrafficSecret(suite, letter * (48 if suite.hash_name == "sha384" else 32), generation)


def connect(
    role: Role = Role.CLIENT,
    suite: CipherSuite = TLS13,
    *,
    tx_generation: int = 0,
    rx_generation: int = 0,
    limits: KeyLimits | None = None,
    tx_key_can_change: bool = True,
    key_log: KeyLog | None = None,
    now: float = 0.0,
) -> KernelConnection:
    """A connection just handed off; the client's secret is made of c, the server's of s."""
    ours, theirs = (b"c", b"s") if role is Role.CLIENT else (b"s", b"c")
    is_tls13 = suite.version is ProtocolVersion.TLSv1_3
    return KernelConnection(
        role,
        suite,
        tx_secret=secret(suite, ours, tx_generation) if is_tls13 else None,
        rx_secret=secret(suite, theirs, rx_generation) if is_tls13 else None,
        limits=limits,
        tx_key_can_change=tx_key_can_change,
        key_log=key_log,
        now=now,
    )


def message(message_type: int, body: bytes = b"") -> bytes:
    """One handshake message with its header."""
    return bytes((message_type,)) + len(body).to_bytes(3, "big") + body


def ticket(
    ticket: bytes = b"ticket", nonce: bytes = b"\x00", extensions: bytes = b"", lifetime: int = 7200
) -> bytes:
    """A NewSessionTicket of TLS 1.3 (RFC 9846 §4.7.1)."""
    return message(
        4,
        b"".join(
            (
                lifetime.to_bytes(4, "big"),
                b"\x01\x02\x03\x04",
                bytes((len(nonce),)) + nonce,
                len(ticket).to_bytes(2, "big") + ticket,
                len(extensions).to_bytes(2, "big") + extensions,
            )
        ),
    )


#: The largest legal ticket: every vector as long as it may be.
LARGEST_TICKET = ticket(b"t" * 0xFFFF, b"n" * 255, b"\xfa\xfa\xff\xfa" + bytes(0xFFFA))


def handshake(fragment: bytes) -> InboundPlainMessage:
    """A record of handshake messages."""
    return InboundPlainMessage(ContentType.HANDSHAKE, fragment)


def alert(fragment: bytes) -> InboundPlainMessage:
    """An alert record."""
    return InboundPlainMessage(ContentType.ALERT, fragment)


def fatal(description: int) -> InboundPlainMessage:
    """A record with a fatal alert."""
    return alert(bytes((2, description)))


def data(fragment: bytes) -> InboundPlainMessage:
    """A record of application data."""
    return InboundPlainMessage(ContentType.APPLICATION_DATA, fragment)


def receive(
    conn: KernelConnection, *records: InboundPlainMessage, now: float = 0.0
) -> list[ConnectionState]:
    """Feed records, one call each; return all items."""
    return [item for record in records for item in conn.process_message(record, now=now)]


def install(conn: KernelConnection, items: Iterable[ConnectionState]) -> Sequence[ConnectionState]:
    """Tell ``conn`` that every UpdateTxKey in ``items`` has been run; return the items."""
    items = tuple(items)
    for item in items:
        if isinstance(item, UpdateTxKey):
            conn.tx_key_installed(item.generation)
    return items


def pieces(fragment: bytes, *cuts: int) -> list[bytes]:
    """Cut ``fragment`` at the given places."""
    edges = [0, *sorted(cuts), len(fragment)]
    return [fragment[a:b] for a, b in pairwise(edges)]


def tx_key(conn: KernelConnection, generation: int) -> UpdateTxKey:
    """The command that installs this generation of our key, derived anew from generation 0."""
    traffic = secret(conn.cipher_suite, b"c" if conn.role is Role.CLIENT else b"s")
    for _ in range(generation):
        traffic = traffic.next()
    return UpdateTxKey(traffic.keys(), generation)


def rx_key(conn: KernelConnection, generation: int) -> UpdateRxKey:
    """The command that installs this generation of the peer's key."""
    traffic = secret(conn.cipher_suite, b"s" if conn.role is Role.CLIENT else b"c")
    for _ in range(generation):
        traffic = traffic.next()
    return UpdateRxKey(traffic.keys(), generation)


def assert_tx_state(conn: KernelConnection, state: HalfState) -> None:
    """``conn.tx_state is state``, in a way that lets a type checker expect another state after a call."""
    assert conn.tx_state is state


def assert_failed(conn: KernelConnection, generations: tuple[int, int] = (0, 0)) -> None:
    """Both halves have failed, nothing moved, and every call behaves as documented."""
    assert conn.rx_state is conn.tx_state is HalfState.FAILED
    assert (conn.tx_generation, conn.rx_generation) == generations
    for record in (data(b"x"), handshake(KU), alert(CLOSE_NOTIFY)):
        with pytest.raises(LocalProtocolError, match="has failed"):
            receive(conn, record)
    with pytest.raises(LocalProtocolError):
        conn.refresh_traffic_keys(now=0.0)
    assert conn.record_usage(Direction.TX, 2**40, now=0.0) == ()
    assert conn.record_usage(Direction.RX, 2**40, now=0.0) == ()
    assert conn.close() == ()
    conn.fail()
    assert conn.rx_state is conn.tx_state is HalfState.FAILED
