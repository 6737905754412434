"""Keys from secrets: the part of the TLS key schedules that lives on after the handshake.

TLS 1.3 (RFC 9846 §7): traffic secret N gives the keys of generation N and traffic secret N+1. TLS 1.2 (RFC 5246 §6.3): one
key block gives the keys of both directions, for good.

Secrets and keys have types that do not print. Python can't wipe memory: what we can do is to hold no copy longer than needed.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Final, final

from .enums import ProtocolVersion
from .suites import CipherSuite

__all__ = (
    "TrafficKeys",
    "TrafficSecret",
    "hkdf_expand_label",
    "nonce",
    "tls12_key_block",
    "tls_exporter",
)

_HASH_LENGTHS: Final = {"sha256": 32, "sha384": 48}
_IV_LENGTH: Final = 12  # every AEAD of TLS 1.3 that is deployed (RFC 5116 N_MIN = 12)


def hkdf_expand_label(
    hash_name: str, secret: bytes, label: bytes, context: bytes, length: int
) -> bytes:
    """HKDF-Expand-Label of RFC 9846 §7.1; ``length`` in bytes."""
    full_label = b"tls13 " + label
    info = b"".join(
        (
            length.to_bytes(2, "big"),
            bytes((len(full_label),)),
            full_label,
            bytes((len(context),)),
            context,
        )
    )
    # HKDF-Expand (RFC 5869 §2.3). One hash output is enough for everything but long exports.
    block = hmac.digest(secret, info + b"\x01", hash_name)
    output = block
    counter = 1
    while len(output) < length:
        counter += 1
        block = hmac.digest(secret, block + info + bytes((counter,)), hash_name)
        output += block
    return output[:length]


@final
@dataclass(frozen=True, slots=True)
class TrafficKeys:
    """What a record layer needs to protect one direction.

    ``iv`` is the write IV: 12 bytes in TLS 1.3 and for ChaCha20, 4 bytes for the TLS 1.2 GCM and CCM suites, whose
    nonce continues with 8 explicit bytes. ``explicit_nonce`` is where those start (TLS 1.2, sending, big-endian number).
    """

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)
    explicit_nonce: int = 0

    def __repr__(self) -> str:
        return f"<TrafficKeys of {len(self.key) * 8} bits, redacted>"


@final
@dataclass(frozen=True, slots=True)
class TrafficSecret:
    """application_traffic_secret_N of one direction (RFC 9846 §7.2); ``generation`` is N."""

    suite: CipherSuite
    secret: bytes = field(repr=False)
    generation: int = 0

    def __post_init__(self) -> None:
        """Refuse a secret that can't be one of this suite (``ValueError``)."""
        expected = _HASH_LENGTHS[self.suite.hash_name]
        if len(self.secret) != expected:
            raise ValueError(f"a traffic secret of {self.suite.name} has {expected} bytes")

    def __repr__(self) -> str:
        return f"<TrafficSecret of generation {self.generation}, redacted>"

    def keys(self) -> TrafficKeys:
        """Derive write key and write IV (RFC 9846 §7.3)."""
        hash_name = self.suite.hash_name
        return TrafficKeys(
            hkdf_expand_label(hash_name, self.secret, b"key", b"", self.suite.aead.key_length),
            hkdf_expand_label(hash_name, self.secret, b"iv", b"", _IV_LENGTH),
        )

    def next(self) -> TrafficSecret:
        """Derive application_traffic_secret_N+1 (RFC 9846 §7.2). The caller drops this one."""
        updated = hkdf_expand_label(
            self.suite.hash_name, self.secret, b"traffic upd", b"", len(self.secret)
        )
        return TrafficSecret(self.suite, updated, self.generation + 1)


def _prf(hash_name: str, secret: bytes, label: bytes, seed: bytes, length: int) -> bytes:
    """The pseudorandom function of TLS 1.2 (RFC 5246 §5)."""
    seed = label + seed
    a = seed
    output = b""
    while len(output) < length:
        a = hmac.digest(secret, a, hash_name)
        output += hmac.digest(secret, a + seed, hash_name)
    return output[:length]


def tls12_key_block(
    suite: CipherSuite, master_secret: bytes, client_random: bytes, server_random: bytes
) -> tuple[TrafficKeys, TrafficKeys]:
    """Derive (client write keys, server write keys) of a TLS 1.2 AEAD suite (RFC 5246 §6.3).

    No MAC keys are cut from the key block: AEAD suites have none.
    """
    key_length = suite.aead.key_length
    iv_length = suite.aead.fixed_iv_length
    block = _prf(
        suite.hash_name,
        master_secret,
        b"key expansion",
        server_random + client_random,
        2 * (key_length + iv_length),
    )
    client_key, server_key = block[:key_length], block[key_length : 2 * key_length]
    ivs = block[2 * key_length :]
    return TrafficKeys(client_key, ivs[:iv_length]), TrafficKeys(server_key, ivs[iv_length:])


def nonce(keys: TrafficKeys, sequence_number: int) -> bytes:
    """Per-record nonce of the suites without an explicit part: IV XOR sequence number (RFC 9846 §5.3, RFC 7905 §2)."""
    number = int.from_bytes(keys.iv, "big") ^ sequence_number
    return number.to_bytes(_IV_LENGTH, "big")


def tls_exporter(
    suite: CipherSuite, exporter_secret: bytes, label: bytes, context: bytes, length: int
) -> bytes:
    """TLS-Exporter of TLS 1.3 (RFC 9846 §7.5); ``length`` in bytes."""
    if suite.version is not ProtocolVersion.TLSv1_3:
        raise ValueError("only the exporter of TLS 1.3 is computed here")
    hash_name = suite.hash_name
    empty = hashlib.new(hash_name, b"").digest()
    derived = hkdf_expand_label(hash_name, exporter_secret, label, empty, len(empty))
    hashed = hashlib.new(hash_name, context).digest()
    return hkdf_expand_label(hash_name, derived, b"exporter", hashed, length)
