"""Keys and secrets, against published vectors and against implementations that are not ours."""

from __future__ import annotations

import copy
import hashlib
import pickle
import warnings

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from ktls.protocol.enums import ContentType, ProtocolVersion
from ktls.protocol.key_schedule import (
    TrafficKeys,
    TrafficSecret,
    hkdf_expand_label,
    nonce,
    tls12_key_block,
    tls_exporter,
)
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import CipherSuite
from ktls.record.aead import RecordProtection

from .helpers import CHACHA, TLS12, TLS13, message, rfc8448, secret

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # tlslite imports asyncore
    from tlslite.constants import CipherSuite as TLSLiteSuite
    from tlslite.mathtls import calc_key
    from tlslite.recordlayer import RecordLayer
    from tlslite.utils.cryptomath import HKDF_expand_label

AES256 = CipherSuite.TLS_AES_256_GCM_SHA384
TLS13_SUITES = [suite for suite in CipherSuite if suite.version is ProtocolVersion.TLSv1_3]
TLS12_SUITES = [suite for suite in CipherSuite if suite.version is ProtocolVersion.TLSv1_2]
VECTORS = rfc8448()


def independent_expand_label(
    hash_name: str, key: bytes, label: str, context: bytes, length: int
) -> bytes:
    """HKDF-Expand-Label with the HKDF of ``cryptography`` and a label built in another way."""
    algorithm = hashes.SHA384() if hash_name == "sha384" else hashes.SHA256()
    info = bytearray(length.to_bytes(2, "big"))
    for opaque in (b"tls13 " + label.encode(), context):
        info.append(len(opaque))
        info += opaque
    return HKDFExpand(algorithm, length, bytes(info)).derive(key)


# --- RFC 8448 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["client", "server"])
def test_rfc8448_traffic_keys(side: str) -> None:
    traffic = TrafficSecret(TLS13, VECTORS[f"{side}_application_traffic_secret_0"])
    keys = traffic.keys()
    assert keys.key == VECTORS[f"{side}_write_key"]
    assert keys.iv == VECTORS[f"{side}_write_iv"]


@pytest.mark.parametrize(
    ("side", "sequence_number", "record", "expected"),
    [
        (
            "client",
            0,
            "client_application_data_record",
            InboundPlainMessage(ContentType.APPLICATION_DATA, VECTORS["client_application_data"]),
        ),
        (
            "client",
            1,
            "client_close_notify_record",
            InboundPlainMessage(ContentType.ALERT, b"\x01\x00"),
        ),
        (
            "server",
            2,
            "server_close_notify_record",
            InboundPlainMessage(ContentType.ALERT, b"\x01\x00"),
        ),
    ],
)
def test_rfc8448_records_open_and_seal(
    side: str, sequence_number: int, record: str, expected: InboundPlainMessage
) -> None:
    keys = TrafficSecret(TLS13, VECTORS[f"{side}_application_traffic_secret_0"]).keys()
    wire = VECTORS[record]
    assert RecordProtection(TLS13, keys, sequence_number).open(wire[:5], wire[5:]) == expected
    sealer = RecordProtection(TLS13, keys, sequence_number)
    assert sealer.seal(expected.content_type, expected.fragment) == wire


# --- TLS 1.3, against others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash_name", ["sha256", "sha384"])
@pytest.mark.parametrize("length", [1, 12, 31, 32, 33, 48, 49, 97, 500])
@pytest.mark.parametrize("context", [b"", b"c", b"c" * 255], ids=len)
def test_expand_label_agrees_with_two_others(hash_name: str, length: int, context: bytes) -> None:
    key = hashlib.new(hash_name, b"key").digest()
    ours = hkdf_expand_label(hash_name, key, b"some label", context, length)
    assert ours == independent_expand_label(hash_name, key, "some label", context, length)
    assert ours == bytes(HKDF_expand_label(key, b"some label", context, length, hash_name))


@pytest.mark.parametrize("suite", TLS13_SUITES, ids=lambda suite: suite.name)
def test_ten_generations_agree_with_tlslite(suite: CipherSuite) -> None:
    ours = secret(suite, b"s")
    theirs = bytearray(ours.secret)
    layer = RecordLayer(None)
    for generation in range(10):
        assert ours.generation == generation
        assert ours.secret == bytes(theirs)
        theirs, state = layer._calcTLS1_3KeyUpdate(int(suite), theirs)  # tlslite has no public name
        ours = ours.next()
        assert ours.keys().iv == bytes(state.fixedNonce)


@pytest.mark.parametrize("suite", TLS13_SUITES, ids=lambda suite: suite.name)
def test_next_generation_and_its_keys_agree_with_cryptography(suite: CipherSuite) -> None:
    first = secret(suite, b"c", 7)
    second = first.next()
    name, size = suite.hash_name, len(first.secret)
    assert second.secret == independent_expand_label(name, first.secret, "traffic upd", b"", size)
    assert second.generation == 8
    assert second.suite is suite
    keys = second.keys()
    key_length = suite.aead.key_length
    assert keys.key == independent_expand_label(name, second.secret, "key", b"", key_length)
    assert keys.iv == independent_expand_label(name, second.secret, "iv", b"", 12)


def test_deriving_leaves_the_secret_as_it_is() -> None:
    first = secret(TLS13, b"c")
    first.next()
    first.keys()
    assert first == secret(TLS13, b"c")


@pytest.mark.parametrize("suite", [TLS13, AES256, CHACHA], ids=lambda suite: suite.name)
@pytest.mark.parametrize("context", [b"", b"context"])
@pytest.mark.parametrize("length", [1, 32, 80])
def test_exporter_agrees_with_cryptography(suite: CipherSuite, context: bytes, length: int) -> None:
    name = suite.hash_name
    exporter_secret = hashlib.new(name, VECTORS["exporter_master_secret"]).digest()
    empty = hashlib.new(name).digest()
    derived = independent_expand_label(
        name, exporter_secret, "EXPORTER-Channel-Binding", empty, len(empty)
    )
    hashed = hashlib.new(name, context).digest()
    expected = independent_expand_label(name, derived, "exporter", hashed, length)
    label = b"EXPORTER-Channel-Binding"
    assert tls_exporter(suite, exporter_secret, label, context, length) == expected


def test_the_exporter_of_tls12_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TLS 1\.3"):
        tls_exporter(TLS12, bytes(48), b"EXPORTER-x", b"", 32)


# --- TLS 1.2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", TLS12_SUITES, ids=lambda suite: suite.name)
def test_key_block_agrees_with_tlslite(suite: CipherSuite) -> None:
    main, client_random, server_random = b"m" * 48, bytes(range(32)), bytes(range(100, 132))
    key, iv = suite.aead.key_length, suite.aead.fixed_iv_length
    assert (int(suite) in TLSLiteSuite.sha384PrfSuites) is (suite.hash_name == "sha384")
    block = bytes(
        calc_key(
            (3, 3),
            bytearray(main),
            int(suite),
            b"key expansion",
            client_random=bytearray(client_random),
            server_random=bytearray(server_random),
            output_length=2 * (key + iv),
        )
    )
    client, server = tls12_key_block(suite, main, client_random, server_random)
    assert client.key + server.key + client.iv + server.iv == block
    assert (len(client.key), len(server.key), len(client.iv), len(server.iv)) == (key, key, iv, iv)
    assert client.explicit_nonce == server.explicit_nonce == 0


# --- nonces --------------------------------------------------------------------------------------------------------


def test_nonce_is_the_iv_xor_the_sequence_number() -> None:
    iv = bytes.fromhex("5b78923dee08579033e523d9")
    keys = TrafficKeys(bytes(16), iv)
    assert nonce(keys, 0) == iv
    assert nonce(keys, 1) == iv[:-1] + b"\xd8"
    assert nonce(keys, 2**64 - 1) == iv[:4] + bytes(byte ^ 0xFF for byte in iv[4:])
    assert nonce(TrafficKeys(bytes(16), bytes(12)), 5) == bytes(11) + b"\x05"


# --- the types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 31, 33, 48])
def test_a_secret_of_a_wrong_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{TLS13.name} has 32 bytes"):
        TrafficSecret(TLS13, bytes(size))


def test_a_sha384_suite_has_longer_secrets() -> None:
    assert TrafficSecret(AES256, bytes(48)).keys().key != bytes(32)
    with pytest.raises(ValueError, match="has 48 bytes"):
        TrafficSecret(AES256, bytes(32))


def test_equal_secrets_are_equal_and_hashable() -> None:
    assert secret(TLS13, b"c") == secret(TLS13, b"c")
    assert secret(TLS13, b"c") != secret(TLS13, b"c", 1)
    assert len({secret(TLS13, b"c"), secret(TLS13, b"c"), secret(TLS13, b"s")}) == 2


def test_secrets_can_not_be_changed_and_can_be_copied() -> None:
    original = secret(TLS13, b"c", 3)
    with pytest.raises(AttributeError):
        original.generation = 4  # type: ignore[misc]  # frozen: that is the test
    assert copy.copy(original) == pickle.loads(pickle.dumps(original)) == original


def test_message_helper_counts_its_body() -> None:
    # The helpers build what the tests compare with; RFC 8448's ticket shows that they build it right.
    assert message(4, VECTORS["new_session_ticket"][4:]) == VECTORS["new_session_ticket"]
