"""``ktls.record.linux`` against ``linux/tls.h``: the machine's, where it has one, and always our extract of it; and against a kernel."""

from __future__ import annotations

import re
import socket
import struct
import termios
from pathlib import Path

import pytest

from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.suites import AEAD, TAG_LENGTH, CipherSuite
from ktls.record import linux
from ktls.record.kernel import attach
from ktls.record.linux import CRYPTO_INFO, SOL_TLS, TLS_RX, TLS_TX, pack_crypto_info, unpack_rec_seq
from ktls.testing import loopback_pair, made_up_keys

from .layers import SUITES, TLS12, TLS13, kernel_sender

EXTRACT = Path(__file__).with_name("tls_h_extract.h")
SYSTEM = Path("/usr/include/linux/tls.h")
HEADERS = [path for path in (EXTRACT, SYSTEM) if path.exists()]
every_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
every_header = pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
#: How the header spells the AEADs.
NAMES = {
    AEAD.AES_128_GCM: "AES_GCM_128",
    AEAD.AES_256_GCM: "AES_GCM_256",
    AEAD.AES_128_CCM: "AES_CCM_128",
    AEAD.CHACHA20_POLY1305: "CHACHA20_POLY1305",
}


def defines(header: Path) -> dict[str, int]:
    """All plain numbers that the header defines."""
    found = re.findall(r"#define\s+(TLS_\w+)\s+(0x[0-9a-fA-F]+|\d+)\b", header.read_text())
    return {name: int(value, 0) for name, value in found}


@every_header
def test_constants(header: Path) -> None:
    theirs = defines(header)
    ours = [name for name in linux.__all__ if name.startswith("TLS_")]
    assert len(ours) == 7
    for name in ours:
        # The newest option is not in the headers of an older distribution; our extract has it.
        if name != "TLS_TX_MAX_PAYLOAD_LEN" or name in theirs or header == EXTRACT:
            assert getattr(linux, name) == theirs[name], name


@every_header
@pytest.mark.parametrize("aead", AEAD)
def test_crypto_infos(header: Path, aead: AEAD) -> None:
    theirs, ours, name = defines(header), CRYPTO_INFO[aead], f"TLS_CIPHER_{NAMES[aead]}"
    assert ours.cipher_type == theirs[name]
    assert (ours.iv, ours.key, ours.salt) == tuple(
        theirs[f"{name}_{part}_SIZE"] for part in ("IV", "KEY", "SALT")
    )
    assert theirs[f"{name}_REC_SEQ_SIZE"] == 8
    assert theirs[f"{name}_TAG_SIZE"] == TAG_LENGTH
    assert ours.key == aead.key_length
    struct_name = f"tls12_crypto_info_{NAMES[aead].lower()}"
    [body] = re.findall(rf"struct {struct_name} \{{(.*?)\}};", header.read_text(), re.DOTALL)
    fields = re.findall(r"unsigned char (\w+)\[", body)
    assert fields == ["iv", "key", "salt", "rec_seq"]


@every_header
def test_versions(header: Path) -> None:
    theirs = defines(header)
    for version, name in ((ProtocolVersion.TLSv1_2, "1_2"), (ProtocolVersion.TLSv1_3, "1_3")):
        major, minor = (theirs[f"TLS_{name}_VERSION_{part}"] for part in ("MAJOR", "MINOR"))
        assert version == major << 8 | minor


def test_numbers_of_other_headers() -> None:
    assert linux.SIOCOUTQ == termios.TIOCOUTQ
    # linux/tcp.h and linux/socket.h; Python has neither.
    assert (linux.TCP_ULP, linux.SOL_TLS) == (31, 282)


def test_extract_is_complete() -> None:
    assert set(CRYPTO_INFO) == set(AEAD) == set(NAMES)
    assert EXTRACT in HEADERS


@every_suite
def test_layout(suite: CipherSuite) -> None:
    """Byte by byte, as an independent reading of the header packs it."""
    keys = made_up_keys(suite, "us")
    packed = pack_crypto_info(suite, keys, 0x0102030405060708)
    info = CRYPTO_INFO[suite.aead]
    assert len(packed) == info.size
    version, cipher, iv, key, salt, rec_seq = struct.unpack(
        f"=HH{info.iv}s{info.key}s{info.salt}s8s", packed
    )
    assert (version, cipher) == (suite.version, info.cipher_type)
    assert key == keys.key
    assert rec_seq == bytes(range(1, 9))
    if suite.aead is AEAD.CHACHA20_POLY1305:
        assert (iv, salt) == (keys.iv, b"")
    elif suite.version is ProtocolVersion.TLSv1_3:
        assert salt + iv == keys.iv
    else:
        assert salt == keys.iv
        assert int.from_bytes(iv, "big") == keys.explicit_nonce
    assert unpack_rec_seq(packed) == 0x0102030405060708


@pytest.mark.parametrize(
    ("suite", "keys"),
    [
        (TLS13, TrafficKeys(bytes(32), bytes(12))),
        (TLS13, TrafficKeys(bytes(16), bytes(4))),
        (TLS12, TrafficKeys(bytes(16), bytes(12))),
        (CipherSuite.TLS_CHACHA20_POLY1305_SHA256, TrafficKeys(bytes(32), bytes(4))),
    ],
)
def test_keys_that_do_not_fit(suite: CipherSuite, keys: TrafficKeys) -> None:
    with pytest.raises(ValueError, match="do not fit") as caught:
        pack_crypto_info(suite, keys, 0)
    assert "\\x00" not in str(caught.value)


@pytest.mark.kernel
@every_suite
def test_kernel_gives_back_what_it_was_given(suite: CipherSuite) -> None:
    with loopback_pair() as (sock, _):
        attach(sock)
        for direction, name in ((TLS_TX, "us"), (TLS_RX, "peer")):
            packed = pack_crypto_info(suite, made_up_keys(suite, name), 77)
            sock.setsockopt(SOL_TLS, direction, packed)
            assert sock.getsockopt(SOL_TLS, direction, len(packed)) == packed
            assert sock.getsockopt(SOL_TLS, direction, 4) == packed[:4]
            with pytest.raises(OSError):
                sock.getsockopt(SOL_TLS, direction, len(packed) - 1)


@pytest.mark.kernel
def test_kernel_counts_explicit_nonces_on() -> None:
    """TLS 1.2: no value twice, and 0 behind the last."""
    keys = made_up_keys(TLS12, "us")
    keys = TrafficKeys(keys.key, keys.iv, 2**64 - 2)
    with loopback_pair() as (sock, theirs):
        sender = kernel_sender(sock, TLS12, keys, 0, 2**14)
        seen = []
        for _ in range(5):
            sender.send(b"x")
            record = theirs.recv(5 + 8 + 1 + 16, socket.MSG_WAITALL)
            seen.append(int.from_bytes(record[5:13], "big"))
    assert seen == [2**64 - 2, 2**64 - 1, 0, 1, 2]
