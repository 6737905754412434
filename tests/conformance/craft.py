"""Records that no honest peer makes: any type, version and length in the header, anything inside, any key.

The cipher and the nonces are those of ``RecordProtection``, which other peers prove; the framing is written anew here.
"""

from __future__ import annotations

from typing import Final

from ktls.protocol.enums import ContentType, ProtocolVersion
from ktls.protocol.key_schedule import nonce
from ktls.protocol.suites import TAG_LENGTH
from ktls.record.aead import RecordProtection

__all__ = ("DATA", "flipped", "header", "inner", "seal", "shortest", "tls13")

DATA: Final = ContentType.APPLICATION_DATA
_LEGACY_VERSION: Final = 0x0303


def tls13(protection: RecordProtection) -> bool:
    return protection.suite.version is ProtocolVersion.TLSv1_3


def header(kind: int, length: int, version: int = _LEGACY_VERSION) -> bytes:
    return bytes((kind,)) + version.to_bytes(2, "big") + length.to_bytes(2, "big")


def inner(fragment: bytes, kind: int = DATA, padding: int = 0) -> bytes:
    """TLSInnerPlaintext (RFC 9846 §5.2)."""
    return b"".join((fragment, bytes((kind,)), bytes(padding)))


def seal(
    protection: RecordProtection,
    inside: bytes,
    *,
    kind: int = DATA,
    version: int = _LEGACY_VERSION,
) -> bytes:
    """Return one record, authentic whatever its header says, and count it.

    ``inside`` is what is encrypted: TLSInnerPlaintext in TLS 1.3, the fragment in TLS 1.2.
    """
    number = protection.sequence_number
    protection.sequence_number = number + 1
    encrypt = protection._cipher.encrypt
    if tls13(protection):
        head = header(kind, len(inside) + TAG_LENGTH, version)
        return head + encrypt(nonce(protection.keys, number), inside, head)
    explicit, full_nonce = protection._nonce12(number)
    body = explicit + encrypt(
        full_nonce, inside, number.to_bytes(8, "big") + header(kind, len(inside), version)
    )
    return header(kind, len(body), version) + body


def shortest(protection: RecordProtection) -> int:
    """The length of a record with nothing inside, by its header."""
    return protection.suite.record_overhead - (6 if tls13(protection) else 5)


def flipped(record: bytes, at: int, bit: int = 1) -> bytes:
    """Return ``record`` with one bit of the byte ``at`` turned over."""
    changed = bytearray(record)
    changed[at] ^= bit
    return bytes(changed)
