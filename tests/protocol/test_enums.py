"""Code points are those of IANA, and none is an alias of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ktls.protocol.enums import (
    AlertDescription,
    AlertLevel,
    ContentType,
    Direction,
    HandshakeType,
    KeyUpdateRequest,
    ProtocolVersion,
    Role,
)
from ktls.protocol.suites import CipherSuite

from .helpers import iana

if TYPE_CHECKING:
    import enum

REGISTRIES: list[tuple[type[enum.IntEnum], str]] = [
    (ContentType, "tls_content_types"),
    (HandshakeType, "tls_handshake_types"),
    (AlertDescription, "tls_alerts"),
    (CipherSuite, "tls_cipher_suites"),
]


@pytest.mark.parametrize(("enumeration", "registry"), REGISTRIES, ids=lambda value: str(value))
def test_every_code_point_is_in_the_iana_registry(
    enumeration: type[enum.IntEnum], registry: str
) -> None:
    names = iana(registry)
    ours = {int(member): member.name.lower() for member in enumeration}
    theirs = {value: names[value].removesuffix("_RESERVED").lower() for value in ours}
    assert ours == theirs


@pytest.mark.parametrize(
    "enumeration", [ContentType, HandshakeType, AlertDescription, CipherSuite, AlertLevel]
)
def test_no_code_point_is_an_alias(enumeration: type[enum.IntEnum]) -> None:
    assert set(enumeration.__members__) == {member.name for member in enumeration}


def test_every_alert_a_tls13_peer_may_send_has_a_name() -> None:
    reserved = {value for value, name in iana("tls_alerts").items() if name.endswith("_RESERVED")}
    others = {52, 121}  # DTLS connection identifiers; ECH is over when the handshake is
    no_renegotiation = {100}  # reserved in TLS 1.3, and we send it in TLS 1.2
    named = {int(description) for description in AlertDescription}
    assert named == (set(iana("tls_alerts")) - reserved - others) | no_renegotiation


def test_values_that_have_no_registry() -> None:
    assert [(m.name, m.value) for m in ProtocolVersion] == [
        ("TLSv1_2", 0x0303),
        ("TLSv1_3", 0x0304),
    ]
    assert [(m.name, m.value) for m in AlertLevel] == [("WARNING", 1), ("FATAL", 2)]
    assert [(m.name, m.value) for m in KeyUpdateRequest] == [
        ("UPDATE_NOT_REQUESTED", 0),
        ("UPDATE_REQUESTED", 1),
    ]
    assert {m.value for m in Role} == {"client", "server"}
    assert {m.value for m in Direction} == {"tx", "rx"}
