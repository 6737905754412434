"""Records sealed and opened in this process, against constructions that share nothing with ours: tlslite-ng's AEADs, and RFC 8448."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktls.protocol.enums import AlertDescription, ContentType, ProtocolVersion
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.suites import AEAD, MAX_FRAGMENT, CipherSuite
from ktls.record.aead import HEADER_LENGTH, RecordProtection, record_type
from ktls.testing import made_up_keys, pattern

from .layers import SUITES, TLS12, TLS13

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports asyncore, needlessly
    from tlslite.utils import cipherfactory

if TYPE_CHECKING:
    from collections.abc import Callable

DATA, ALERT = ContentType.APPLICATION_DATA, ContentType.ALERT
MAKE: dict[AEAD, Callable[[bytearray, list[str]], Any]] = {
    AEAD.AES_128_GCM: cipherfactory.createAESGCM,
    AEAD.AES_256_GCM: cipherfactory.createAESGCM,
    AEAD.AES_128_CCM: cipherfactory.createAESCCM,
    AEAD.CHACHA20_POLY1305: cipherfactory.createCHACHA20,
}
every_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)


def independent_record(
    suite: CipherSuite, keys: TrafficKeys, number: int, content_type: int, fragment: bytes
) -> bytes:
    """One record by the letter of RFC 8446 §5.2, RFC 5246 §6.2.3.3, RFC 5288 §3, RFC 6655 §3 and RFC 7905 §2."""
    cipher = MAKE[suite.aead](bytearray(keys.key), ["python"])

    def xor_nonce() -> bytes:
        padded = number.to_bytes(12, "big")
        return bytes(a ^ b for a, b in zip(keys.iv, padded, strict=True))

    def seal(nonce: bytes, plain: bytes, additional: bytes) -> bytes:
        return bytes(cipher.seal(bytearray(nonce), bytearray(plain), bytearray(additional)))

    if suite.version is ProtocolVersion.TLSv1_3:
        inner = fragment + bytes((content_type,))
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        return header + seal(xor_nonce(), inner, header)
    prefix = bytes((content_type,)) + b"\x03\x03"
    additional = number.to_bytes(8, "big") + prefix + len(fragment).to_bytes(2, "big")
    if suite.aead is AEAD.CHACHA20_POLY1305:
        body = seal(xor_nonce(), fragment, additional)
    else:
        explicit = keys.explicit_nonce.to_bytes(8, "big")
        body = explicit + seal(keys.iv + explicit, fragment, additional)
    return prefix + len(body).to_bytes(2, "big") + body


@every_suite
@pytest.mark.parametrize("number", [0, 1, 255, 2**32, 2**64 - 2])
def test_seal_is_that_of_another_implementation(suite: CipherSuite, number: int) -> None:
    keys = made_up_keys(suite, "us")
    for content_type, fragment in ((DATA, b"data"), (ALERT, b"\x01\x00"), (DATA, pattern(300))):
        ours = RecordProtection(suite, keys, number)
        record = ours.seal(content_type, fragment)
        assert record == independent_record(suite, keys, number, content_type, fragment)
        assert ours.sequence_number == number + 1


@every_suite
def test_open_takes_the_records_of_another_implementation(suite: CipherSuite) -> None:
    keys = made_up_keys(suite, "us")
    record = independent_record(suite, keys, 7, DATA, b"data")
    theirs = RecordProtection(suite, keys, 7)
    message = theirs.open(record[:HEADER_LENGTH], record[HEADER_LENGTH:])
    assert (message.content_type, message.fragment) == (DATA, b"data")
    assert theirs.sequence_number == 8


def test_rfc8448_records() -> None:
    """Application data and both close_notify of RFC 8448 §3. Each side's data record came before its close_notify."""
    lines = (Path(__file__).parents[1] / "data" / "rfc8448_section3.txt").read_text().splitlines()
    pairs = (line.split(" = ") for line in lines if not line.startswith("#"))
    values = {name: bytes.fromhex(value) for name, value in pairs}
    client = RecordProtection(
        TLS13, TrafficKeys(values["client_write_key"], values["client_write_iv"])
    )
    data = values["client_application_data"]
    assert client.seal(DATA, data) == values["client_application_data_record"]
    assert client.seal(ALERT, b"\x01\x00") == values["client_close_notify_record"]
    # The server had sent a ticket as well.
    server = RecordProtection(
        TLS13, TrafficKeys(values["server_write_key"], values["server_write_iv"]), 2
    )
    record = values["server_close_notify_record"]
    assert server.open(record[:5], record[5:]).fragment == b"\x01\x00"


@pytest.mark.parametrize(
    "suite",
    [
        suite
        for suite in SUITES
        if suite.version is ProtocolVersion.TLSv1_2 and suite.aead is not AEAD.CHACHA20_POLY1305
    ],
    ids=lambda suite: suite.name,
)
def test_explicit_nonce_never_repeats_and_wraps(suite: CipherSuite) -> None:
    """It starts anywhere, and 2^64 comes before 0, not before an error or a repeat."""
    start = 2**64 - 3
    keys = made_up_keys(suite, "us")
    ours = RecordProtection(suite, TrafficKeys(keys.key, keys.iv, start), 41)
    seen = [int.from_bytes(ours.seal(DATA, b"x")[5:13], "big") for _ in range(6)]
    assert seen == [2**64 - 3, 2**64 - 2, 2**64 - 1, 0, 1, 2]
    theirs = RecordProtection(suite, TrafficKeys(keys.key, keys.iv), 41)
    again = RecordProtection(suite, TrafficKeys(keys.key, keys.iv, start), 41)
    for _ in range(6):
        record = again.seal(DATA, b"x")
        assert theirs.open(record[:5], record[5:]).fragment == b"x"


@given(
    suite=st.sampled_from(SUITES),
    fragment=st.binary(max_size=200),
    content_type=st.sampled_from([20, 21, 22, 23]),
    number=st.integers(0, 2**64 - 2),
    padding=st.integers(0, 50),
)
@settings(max_examples=200, deadline=None)
def test_round_trip(
    suite: CipherSuite, fragment: bytes, content_type: int, number: int, padding: int
) -> None:
    keys = made_up_keys(suite, "us")
    if suite.version is ProtocolVersion.TLSv1_2:
        padding = 0
    record = RecordProtection(suite, keys, number).seal(content_type, fragment, padding)
    theirs = RecordProtection(suite, keys, number)
    message = theirs.open(record[:5], memoryview(record)[5:])
    assert (message.content_type, message.fragment) == (content_type, fragment)


@given(suite=st.sampled_from(SUITES), place=st.integers(0, 10_000), change=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_any_change_is_noticed(suite: CipherSuite, place: int, change: int) -> None:
    """Header included: also the version, which TLS 1.3 does not look at. (In TLS 1.2 the length is not protected; it only cuts the stream.)"""
    keys = made_up_keys(suite, "us")
    record = bytearray(RecordProtection(suite, keys).seal(DATA, b"data"))
    place %= len(record)
    if suite.version is ProtocolVersion.TLSv1_2 and place in (3, 4):
        place = 0
    record[place] ^= change
    theirs = RecordProtection(suite, keys)
    with pytest.raises(RemoteProtocolError):
        theirs.open(bytes(record[:5]), bytes(record[5:]))
    assert theirs.sequence_number == 0


@every_suite
@pytest.mark.parametrize("length", [0, 1, 7, 8, 15, 16, 23])
def test_short_records_are_bad_macs(suite: CipherSuite, length: int) -> None:
    ours = RecordProtection(suite, made_up_keys(suite, "us"))
    header = b"\x17\x03\x03" + length.to_bytes(2, "big")
    with pytest.raises(RemoteProtocolError) as caught:
        ours.open(header, bytes(length))
    assert caught.value.alert is AlertDescription.BAD_RECORD_MAC


@pytest.mark.parametrize(
    ("fragment", "padding", "accepted"),
    [
        (MAX_FRAGMENT, 0, True),
        (MAX_FRAGMENT - 10, 10, True),
        (MAX_FRAGMENT, 1, False),
        (MAX_FRAGMENT + 1, 0, False),
    ],
)
def test_size_of_what_is_inside(fragment: int, padding: int, accepted: bool) -> None:
    keys = made_up_keys(TLS13, "us")
    record = RecordProtection(TLS13, keys).seal(DATA, bytes(fragment), padding)
    theirs = RecordProtection(TLS13, keys)
    if accepted:
        assert len(theirs.open(record[:5], record[5:]).fragment) == fragment
        return
    with pytest.raises(RemoteProtocolError) as caught:
        theirs.open(record[:5], record[5:])
    assert caught.value.alert is AlertDescription.RECORD_OVERFLOW


@pytest.mark.parametrize(("suite", "limit"), [(TLS13, 2**14 + 256), (TLS12, 2**14 + 2048)])
def test_length_in_the_header(suite: CipherSuite, limit: int) -> None:
    ours = RecordProtection(suite, made_up_keys(suite, "us"))
    assert ours.header_error(b"\x17\x03\x03" + limit.to_bytes(2, "big")) is None
    error = ours.header_error(b"\x17\x03\x03" + (limit + 1).to_bytes(2, "big"))
    assert error is not None
    assert error.alert is AlertDescription.RECORD_OVERFLOW


@pytest.mark.parametrize(
    ("suite", "outer", "accepted"),
    [
        (TLS13, 23, True),
        (TLS13, 21, False),
        (TLS13, 20, False),
        (TLS12, 21, True),
        (TLS12, 72, False),
    ],
)
def test_type_in_the_header(suite: CipherSuite, outer: int, accepted: bool) -> None:
    ours = RecordProtection(suite, made_up_keys(suite, "us"))
    error = ours.header_error(bytes((outer, 3, 3, 0, 100)))
    assert (error is None) == accepted
    if error is not None:
        assert error.alert is AlertDescription.UNEXPECTED_MESSAGE


@pytest.mark.parametrize("version", [0x0000, 0x0300, 0x0301, 0x0304, 0xFFFF])
def test_version_in_the_header(version: int) -> None:
    """TLS 1.2 has one version. In TLS 1.3 the field is to be ignored (RFC 9846 §5.1), which does not mean that it may be changed."""
    header = b"\x17" + version.to_bytes(2, "big") + b"\0\x64"
    assert RecordProtection(TLS13, made_up_keys(TLS13, "us")).header_error(header) is None
    error = RecordProtection(TLS12, made_up_keys(TLS12, "us")).header_error(header)
    assert error is not None
    assert error.alert is AlertDescription.PROTOCOL_VERSION


def test_record_type_is_an_enum_where_it_can() -> None:
    assert record_type(23) is ContentType.APPLICATION_DATA
    assert record_type(99) == 99
    assert not isinstance(record_type(99), ContentType)


@every_suite
def test_repr_shows_no_key(suite: CipherSuite) -> None:
    keys = made_up_keys(suite, "us")
    said = repr(RecordProtection(suite, keys, 5))
    assert said == f"<RecordProtection {suite.name} at record 5>"
