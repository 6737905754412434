"""Cipher suites that a record layer of ours can protect: one table.

Code points and names: IANA "TLS Cipher Suites"; RFC 9846 §B.4, RFC 5288, RFC 6655, RFC 7905. Limits: RFC 9846 §5.5
(AES-GCM: 2^24.5 records; ChaCha20-Poly1305: none that a 64-bit record counter can reach) and RFC 9147 §4.5.3 (AES-CCM: 2^23).
RFC 9325 §4.4 asks the same of TLS 1.2.

CBC suites, CCM_8, ARIA and Camellia are left out on purpose: those connections stay with the engine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from .enums import ProtocolVersion

__all__ = ("AEAD", "MAX_FRAGMENT", "TAG_LENGTH", "CipherSuite", "suite_by_openssl_name")

#: Largest plaintext fragment of a record, in bytes (RFC 9846 §5.1).
MAX_FRAGMENT: Final = 2**14
#: All suites here have a 16-byte authentication tag.
TAG_LENGTH: Final = 16


_HEADER: Final = 5
#: Of all AEADs here; the part of it that is not fixed is in each record of TLS 1.2.
_NONCE: Final = 12


@dataclass(frozen=True, slots=True)
class _AEADParameters:
    #: RFC 5116 registry number; also keeps two members with equal lengths from becoming aliases.
    number: int
    key_length: int
    #: Bytes of the write IV that come out of the TLS 1.2 key block (RFC 5288 §3, RFC 7905 §2).
    fixed_iv_length: int
    #: Records that may be sealed under one key; None if the record counter wraps first.
    confidentiality_limit: int | None
    #: Where we change the key on our own, well before that.
    refresh_default: int | None


class AEAD(enum.Enum):
    """AEAD algorithms, named after their RFC 5116 registry entries."""

    AES_128_GCM = _AEADParameters(1, 16, 4, int(2**24.5), 2**23)
    AES_256_GCM = _AEADParameters(2, 32, 4, int(2**24.5), 2**23)
    CHACHA20_POLY1305 = _AEADParameters(29, 32, 12, None, None)
    AES_128_CCM = _AEADParameters(3, 16, 4, 2**23, 2**22)

    @property
    def key_length(self) -> int:
        """Length of the key in bytes."""
        return self.value.key_length

    @property
    def fixed_iv_length(self) -> int:
        """Length in bytes of the write IV of TLS 1.2; the rest of the nonce is explicit, or none."""
        return self.value.fixed_iv_length

    @property
    def confidentiality_limit(self) -> int | None:
        """Records that may be sealed under one key (RFC 9846 §5.5), or None."""
        return self.value.confidentiality_limit

    @property
    def refresh_default(self) -> int | None:
        """Records after which the key is changed when nothing else was configured, or None."""
        return self.value.refresh_default


@enum.unique
class CipherSuite(enum.IntEnum):
    """IANA cipher suite code points; the members know their parameters."""

    TLS_AES_128_GCM_SHA256 = 0x1301
    TLS_AES_256_GCM_SHA384 = 0x1302
    TLS_CHACHA20_POLY1305_SHA256 = 0x1303
    TLS_AES_128_CCM_SHA256 = 0x1304
    TLS_RSA_WITH_AES_128_GCM_SHA256 = 0x009C
    TLS_RSA_WITH_AES_256_GCM_SHA384 = 0x009D
    TLS_DHE_RSA_WITH_AES_128_GCM_SHA256 = 0x009E
    TLS_DHE_RSA_WITH_AES_256_GCM_SHA384 = 0x009F
    TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 = 0xC02B
    TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 = 0xC02C
    TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 = 0xC02F
    TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 = 0xC030
    TLS_RSA_WITH_AES_128_CCM = 0xC09C
    TLS_DHE_RSA_WITH_AES_128_CCM = 0xC09E
    TLS_ECDHE_ECDSA_WITH_AES_128_CCM = 0xC0AC
    TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 = 0xCCA8
    TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 = 0xCCA9
    TLS_DHE_RSA_WITH_CHACHA20_POLY1305_SHA256 = 0xCCAA

    @property
    def aead(self) -> AEAD:
        """The AEAD algorithm of the suite."""
        return _FACTS[self][0]

    @property
    def hash_name(self) -> str:
        """Name for ``hashlib`` of the hash of HKDF (TLS 1.3) or of the PRF (TLS 1.2)."""
        return _FACTS[self][1]

    @property
    def version(self) -> ProtocolVersion:
        """The protocol version that the suite belongs to."""
        return _FACTS[self][2]

    @property
    def record_overhead(self) -> int:
        """Bytes that a record is longer than its plaintext: header, tag, and the explicit nonce (TLS 1.2) or the content type (TLS 1.3; we never pad)."""
        if self.version is ProtocolVersion.TLSv1_3:
            return _HEADER + TAG_LENGTH + 1
        return _HEADER + TAG_LENGTH + _NONCE - self.aead.fixed_iv_length


def _facts(suite: CipherSuite) -> tuple[AEAD, str, ProtocolVersion]:
    """Read off the name of a suite what it means."""
    return (
        next(aead for aead in AEAD if aead.name in suite.name),
        "sha384" if suite.name.endswith("SHA384") else "sha256",
        ProtocolVersion.TLSv1_2 if "_WITH_" in suite.name else ProtocolVersion.TLSv1_3,
    )


# Read once: a handshake asks some fifty times.
_FACTS: Final = {suite: _facts(suite) for suite in CipherSuite}


def _openssl_name(suite: CipherSuite) -> str:
    """OpenSSL's own name of ``suite``, as in ``ssl.SSLSocket.cipher()[0]``."""
    if suite.version is ProtocolVersion.TLSv1_3:
        return suite.name
    key_exchange, _, rest = suite.name.removeprefix("TLS_").partition("_WITH_")
    if "CHACHA20" in rest:
        rest = "CHACHA20_POLY1305"
    prefix = "" if key_exchange == "RSA" else key_exchange + "_"
    return (prefix + rest).replace("AES_", "AES").replace("_", "-")


_BY_OPENSSL_NAME: Final = {_openssl_name(suite): suite for suite in CipherSuite}


def suite_by_openssl_name(name: str) -> CipherSuite | None:
    """Return the suite that OpenSSL calls ``name``, or None if no record layer of ours can protect it."""
    return _BY_OPENSSL_NAME.get(name)
