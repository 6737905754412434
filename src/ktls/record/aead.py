"""Records sealed and opened in this process, with the AEADs of ``cryptography``: the one seam to a provider of ciphers.

``RecordProtection`` is TLSPlaintext to TLSCiphertext and back for one key of one direction (RFC 9846 §5.2, RFC 5246 §6.2.3.3, RFC 5288,
RFC 7905). It counts records, and knows neither sockets nor buffers nor what the records say.
"""

from __future__ import annotations

from typing import Final, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305

from ktls.protocol.enums import AlertDescription, ContentType, ProtocolVersion
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.key_schedule import TrafficKeys, nonce
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import AEAD, MAX_FRAGMENT, TAG_LENGTH, CipherSuite

__all__ = ("HEADER_LENGTH", "RecordProtection", "record_type")

#: Type, legacy version, length (RFC 9846 §5.1).
HEADER_LENGTH: Final = 5
_EXPLICIT_NONCE: Final = 8
_VERSION: Final = b"\x03\x03"
#: What protection may add to a fragment: RFC 9846 §5.2, RFC 5246 §6.2.3.
_EXPANSION: Final = {ProtocolVersion.TLSv1_3: 256, ProtocolVersion.TLSv1_2: 2048}


def record_type(value: int) -> ContentType | int:
    """Return ``value`` as a ``ContentType`` if it is one."""
    try:
        return ContentType(value)
    except ValueError:
        return value


def _cipher(aead: AEAD, key: bytes) -> AESGCM | AESCCM | ChaCha20Poly1305:
    if aead is AEAD.CHACHA20_POLY1305:
        return ChaCha20Poly1305(key)
    if aead is AEAD.AES_128_CCM:
        return AESCCM(key, tag_length=TAG_LENGTH)
    return AESGCM(key)


@final
class RecordProtection:
    """One key of one direction at work. ``sequence_number`` is that of the next record."""

    __slots__ = ("_cipher", "_explicit", "_is_tls13", "keys", "sequence_number", "suite")

    def __init__(self, suite: CipherSuite, keys: TrafficKeys, sequence_number: int = 0) -> None:
        self.suite = suite
        self.sequence_number = sequence_number
        self.keys = keys
        self._cipher = _cipher(suite.aead, keys.key)
        self._is_tls13 = suite.version is ProtocolVersion.TLSv1_3
        # TLS 1.2 GCM and CCM carry 8 bytes of the nonce in each record. We count on from where the engine was: never a value twice.
        self._explicit = not self._is_tls13 and suite.aead.fixed_iv_length == 4
        if self._explicit:
            self.keys = TrafficKeys(
                keys.key, keys.iv, (keys.explicit_nonce - sequence_number) % 2**64
            )

    def __repr__(self) -> str:
        return f"<RecordProtection {self.suite.name} at record {self.sequence_number}>"

    def header_error(self, header: bytes | bytearray) -> RemoteProtocolError | None:
        """Say what is wrong with a record header, before its body has come. TLS 1.3 does not look at the version (RFC 9846 §5.1)."""
        if header[0] != ContentType.APPLICATION_DATA and (
            self._is_tls13 or not isinstance(record_type(header[0]), ContentType)
        ):
            return RemoteProtocolError(
                f"record of outer type {header[0]}", AlertDescription.UNEXPECTED_MESSAGE
            )
        if not self._is_tls13 and header[1:3] != _VERSION:
            return RemoteProtocolError(
                f"record of version {header[1:3].hex()}", AlertDescription.PROTOCOL_VERSION
            )
        length = int.from_bytes(header[3:HEADER_LENGTH], "big")
        if length > MAX_FRAGMENT + _EXPANSION[self.suite.version]:
            return RemoteProtocolError(
                f"record of {length} bytes", AlertDescription.RECORD_OVERFLOW
            )
        return None

    def seal(
        self, content_type: int, fragment: bytes | bytearray | memoryview, padding: int = 0
    ) -> bytes:
        """Return ``fragment`` as one whole record, header included, with ``padding`` zero bytes (TLS 1.3) inside."""
        number = self.sequence_number
        if self._is_tls13:
            inner = b"".join((fragment, bytes((content_type,)), bytes(padding)))
            header = b"\x17\x03\x03" + (len(inner) + TAG_LENGTH).to_bytes(2, "big")
            record = header + self._cipher.encrypt(nonce(self.keys, number), inner, header)
        else:
            prefix = bytes((content_type,)) + _VERSION
            length = len(fragment).to_bytes(2, "big")
            explicit, full_nonce = self._nonce12(number)
            sealed = self._cipher.encrypt(
                full_nonce, bytes(fragment), number.to_bytes(8, "big") + prefix + length
            )
            body_length = len(explicit) + len(sealed)
            record = b"".join((prefix, body_length.to_bytes(2, "big"), explicit, sealed))
        self.sequence_number = number + 1
        return record

    def open(self, header: bytes, body: bytes | memoryview) -> InboundPlainMessage:
        """Open one record. Raises ``RemoteProtocolError`` with the alert to send; nothing is counted then."""
        if (refused := self.header_error(header)) is not None:
            raise refused
        number = self.sequence_number
        try:
            message = (
                self._open13(header, body, number)
                if self._is_tls13
                else self._open12(header, body, number)
            )
        except InvalidTag:
            raise RemoteProtocolError(
                f"record {number} can't be opened with the current key",
                AlertDescription.BAD_RECORD_MAC,
            ) from None
        if len(message.fragment) > MAX_FRAGMENT:
            raise RemoteProtocolError(
                f"record with a fragment of {len(message.fragment)} bytes",
                AlertDescription.RECORD_OVERFLOW,
            )
        self.sequence_number = number + 1
        return message

    def _open13(self, header: bytes, body: bytes | memoryview, number: int) -> InboundPlainMessage:
        inner = self._cipher.decrypt(nonce(self.keys, number), body, header)
        if len(inner) > MAX_FRAGMENT + 1:
            raise RemoteProtocolError(
                f"record with {len(inner)} bytes inside", AlertDescription.RECORD_OVERFLOW
            )
        if inner and inner[-1]:  # no padding, nearly always
            return InboundPlainMessage(record_type(inner[-1]), inner[:-1])
        content = inner.rstrip(b"\0")
        if not content:
            raise RemoteProtocolError(
                "record without a content type", AlertDescription.UNEXPECTED_MESSAGE
            )
        return InboundPlainMessage(record_type(content[-1]), content[:-1])

    def _open12(self, header: bytes, body: bytes | memoryview, number: int) -> InboundPlainMessage:
        explicit = bytes(body[:_EXPLICIT_NONCE]) if self._explicit else b""
        sealed = body[len(explicit) :]
        length = len(sealed) - TAG_LENGTH
        if length < 0:
            raise RemoteProtocolError(
                f"record of {len(body)} bytes is too short", AlertDescription.BAD_RECORD_MAC
            )
        full_nonce = self.keys.iv + explicit if explicit else nonce(self.keys, number)
        aad = number.to_bytes(8, "big") + header[:3] + length.to_bytes(2, "big")
        return InboundPlainMessage(
            record_type(header[0]), self._cipher.decrypt(full_nonce, sealed, aad)
        )

    def _nonce12(self, number: int) -> tuple[bytes, bytes]:
        """Return (explicit part, whole nonce) of record ``number`` (RFC 5288 §3, RFC 7905 §2)."""
        if not self._explicit:
            return b"", nonce(self.keys, number)
        explicit = ((self.keys.explicit_nonce + number) % 2**64).to_bytes(8, "big")
        return explicit, self.keys.iv + explicit
