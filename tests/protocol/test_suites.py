"""Cipher suites: parameters, limits and OpenSSL's names for them."""

from __future__ import annotations

import ssl

import pytest

from ktls.protocol.enums import ContentType, ProtocolVersion
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.suites import AEAD, MAX_FRAGMENT, TAG_LENGTH, CipherSuite, suite_by_openssl_name
from ktls.record.aead import RecordProtection

from .helpers import iana


def openssl_suites() -> dict[str, int]:
    """What this interpreter's OpenSSL knows: name to code point."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    return {cipher["name"]: cipher["id"] & 0xFFFF for cipher in context.get_ciphers()}


def test_openssl_agrees_on_every_suite_that_it_knows() -> None:
    code_points = set(CipherSuite)
    theirs = {name: code for name, code in openssl_suites().items() if code in code_points}
    ours = {name: int(suite) for name in theirs if (suite := suite_by_openssl_name(name))}
    assert ours == theirs
    assert len(theirs) >= 11  # a build without anything but the strongest suites still has these


def test_every_suite_is_found_by_its_openssl_name() -> None:
    names = iana("openssl_cipher_names")
    assert {name: suite_by_openssl_name(name) for name in names.values()} == {
        name: CipherSuite(value) for value, name in names.items()
    }
    assert set(names) == set(CipherSuite)


@pytest.mark.parametrize(
    "name", ["", "AES256-SHA", "ECDHE-RSA-AES128-CCM8", "TLS_AES_128_CCM_8_SHA256", "aes128-ccm"]
)
def test_what_we_cannot_protect_has_no_suite(name: str) -> None:
    assert suite_by_openssl_name(name) is None


@pytest.mark.parametrize("suite", CipherSuite)
def test_parameters_follow_from_the_iana_name(suite: CipherSuite) -> None:
    name = iana("tls_cipher_suites")[suite]
    assert suite.aead.name in name
    assert suite.hash_name == ("sha384" if name.endswith("_SHA384") else "sha256")
    is_tls13 = 0x1300 <= suite <= 0x13FF
    assert suite.version is (ProtocolVersion.TLSv1_3 if is_tls13 else ProtocolVersion.TLSv1_2)
    assert suite.aead.key_length == (32 if "256_GCM" in name or "CHACHA20" in name else 16)
    assert suite.aead.fixed_iv_length == (12 if "CHACHA20" in name else 4)


def test_aeads_are_those_of_rfc_5116() -> None:
    numbers = {name: number for number, name in iana("aead_algorithms").items()}
    assert {aead.name: aead.value.number for aead in AEAD} == {
        aead.name: numbers["AEAD_" + aead.name] for aead in AEAD
    }
    assert set(AEAD.__members__) == {aead.name for aead in AEAD}


@pytest.mark.parametrize("aead", [AEAD.AES_128_GCM, AEAD.AES_256_GCM])
def test_the_limit_of_gcm_is_that_of_rfc_9846(aead: AEAD) -> None:
    assert aead.confidentiality_limit == 23726566  # 2^24.5, rounded down
    assert aead.refresh_default == 2**23


def test_the_limits_of_the_other_aeads() -> None:
    assert AEAD.AES_128_CCM.confidentiality_limit == 2**23
    assert AEAD.AES_128_CCM.refresh_default == 2**22
    assert AEAD.CHACHA20_POLY1305.confidentiality_limit is None
    assert AEAD.CHACHA20_POLY1305.refresh_default is None


def test_record_constants() -> None:
    assert (MAX_FRAGMENT, TAG_LENGTH) == (16384, 16)


@pytest.mark.parametrize("suite", CipherSuite)
def test_overhead_is_what_sealing_adds(suite: CipherSuite) -> None:
    keys = TrafficKeys(bytes(suite.aead.key_length), bytes(12))
    if suite.version is ProtocolVersion.TLSv1_2:
        keys = TrafficKeys(keys.key, bytes(suite.aead.fixed_iv_length))
    record = RecordProtection(suite, keys).seal(ContentType.APPLICATION_DATA, b"12345")
    assert len(record) == 5 + suite.record_overhead
