"""``linux/tls.h`` as Python: constants, and the crypto-info structures packed and unpacked. No system calls.

Python's ``socket`` module has none of these. Spelling is that of the header; ``rec_seq`` and ``salt`` are words of the
kernel and stay in this module. A test compares the numbers with ``/usr/include/linux/tls.h``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.suites import AEAD, CipherSuite

__all__ = (
    "ALL_AEADS",
    "CRYPTO_INFO",
    "SIOCOUTQ",
    "SOL_TLS",
    "TCPI_BYTES_ACKED",
    "TCP_ULP",
    "TLS_GET_RECORD_TYPE",
    "TLS_RX",
    "TLS_RX_EXPECT_NO_PAD",
    "TLS_SET_RECORD_TYPE",
    "TLS_TX",
    "TLS_TX_MAX_PAYLOAD_LEN",
    "TLS_TX_ZEROCOPY_RO",
    "pack_crypto_info",
    "unpack_rec_seq",
)

TCP_ULP: Final = 31
#: Where ``tcpi_bytes_acked`` is in ``struct tcp_info`` (linux/tcp.h): a u64, since Linux 4.1.
TCPI_BYTES_ACKED: Final = 120
SOL_TLS: Final = 282

TLS_TX: Final = 1
TLS_RX: Final = 2
TLS_TX_ZEROCOPY_RO: Final = 3
TLS_RX_EXPECT_NO_PAD: Final = 4
TLS_TX_MAX_PAYLOAD_LEN: Final = 5

TLS_SET_RECORD_TYPE: Final = 1
TLS_GET_RECORD_TYPE: Final = 2

#: ioctl: bytes that TCP has not had acknowledged yet (tcp(7)); ``termios.TIOCOUTQ`` has the same number.
SIOCOUTQ: Final = 0x5411


@dataclass(frozen=True, slots=True)
class _CryptoInfo:
    """Layout of one ``struct tls12_crypto_info_*``: after version and cipher type come iv, key, salt, rec_seq, without padding."""

    cipher_type: int
    iv: int
    key: int
    salt: int

    @property
    def size(self) -> int:
        return 4 + self.iv + self.key + self.salt + 8


CRYPTO_INFO: Final = {
    AEAD.AES_128_GCM: _CryptoInfo(51, 8, 16, 4),
    AEAD.AES_256_GCM: _CryptoInfo(52, 8, 32, 4),
    AEAD.AES_128_CCM: _CryptoInfo(53, 8, 16, 4),
    AEAD.CHACHA20_POLY1305: _CryptoInfo(54, 12, 32, 0),
}

ALL_AEADS: Final = tuple(CRYPTO_INFO)


def pack_crypto_info(suite: CipherSuite, keys: TrafficKeys, sequence_number: int) -> bytes:
    """Pack the argument of ``setsockopt(SOL_TLS, TLS_TX or TLS_RX)``. It holds the key: pass it on, keep no copy.

    The write IV goes where each version wants it. TLS 1.3, GCM and CCM: salt(4) and iv(8) together. TLS 1.2, GCM and CCM: salt is
    the write IV, iv the explicit nonce of the next record. ChaCha20: all of it in iv.
    """
    layout = CRYPTO_INFO[suite.aead]
    if layout.salt == 0:
        salt, iv = b"", keys.iv
    elif suite.version is ProtocolVersion.TLSv1_3:
        salt, iv = keys.iv[: layout.salt], keys.iv[layout.salt :]
    else:
        salt, iv = keys.iv, keys.explicit_nonce.to_bytes(layout.iv, "big")
    if (len(salt), len(iv), len(keys.key)) != (layout.salt, layout.iv, layout.key):
        raise ValueError(f"keys do not fit {suite.name}")
    return b"".join(
        (
            struct.pack("=HH", suite.version, layout.cipher_type),
            iv,
            keys.key,
            salt,
            sequence_number.to_bytes(8, "big"),
        )
    )


def unpack_rec_seq(crypto_info: bytes) -> int:
    """Return the record sequence number of a packed crypto info."""
    return int.from_bytes(crypto_info[-8:], "big")
