"""The record layers under test, as the factories that ``check_record_layer`` and the driver's tests want."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.suites import CipherSuite
from ktls.record.catchup import CatchUpReceiver
from ktls.record.kernel import KernelReceiver, KernelSender, attach
from ktls.record.probe import rekey_supported
from ktls.record.userspace import UserspaceReceiver, UserspaceSender
from ktls.testing import FaultyReceiver, FaultySender

if TYPE_CHECKING:
    import socket

    from ktls.protocol.key_schedule import TrafficKeys

#: One suite for each AEAD and version.
SUITES = (
    CipherSuite.TLS_AES_128_GCM_SHA256,
    CipherSuite.TLS_AES_256_GCM_SHA384,
    CipherSuite.TLS_CHACHA20_POLY1305_SHA256,
    CipherSuite.TLS_AES_128_CCM_SHA256,
    CipherSuite.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    CipherSuite.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    CipherSuite.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    CipherSuite.TLS_ECDHE_ECDSA_WITH_AES_128_CCM,
)
TLS13 = CipherSuite.TLS_AES_128_GCM_SHA256
TLS12 = CipherSuite.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256


def userspace_sender(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int, max_fragment: int
) -> UserspaceSender:
    return UserspaceSender(sock, suite, keys, number, max_fragment=max_fragment)


def userspace_receiver(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int
) -> UserspaceReceiver:
    return UserspaceReceiver(sock, suite, keys, number)


def exact_receiver(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int
) -> UserspaceReceiver:
    return UserspaceReceiver(sock, suite, keys, number, exact=True)


def faulty_sender(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int, max_fragment: int
) -> FaultySender:
    return FaultySender(userspace_sender(sock, suite, keys, number, max_fragment))


def faulty_receiver(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int
) -> FaultyReceiver:
    return FaultyReceiver(userspace_receiver(sock, suite, keys, number))


def can_rekey(suite: CipherSuite) -> bool:
    return suite.version is ProtocolVersion.TLSv1_3 and rekey_supported()


def kernel_sender(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int, max_fragment: int
) -> KernelSender:
    attach(sock)
    return KernelSender(
        sock, suite, keys, number, can_change_key=can_rekey(suite), max_fragment=max_fragment
    )


def kernel_receiver(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int
) -> KernelReceiver:
    attach(sock)
    return KernelReceiver(sock, suite, keys, number, can_change_key=can_rekey(suite))


def catch_up_receiver(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int
) -> CatchUpReceiver:
    attach(sock)
    return CatchUpReceiver(sock, suite, keys, number, b"", can_change_key=can_rekey(suite))


def refused_catch_up_receiver(
    sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int
) -> CatchUpReceiver:
    """Without the ULP the kernel takes no key: it stays in user space."""
    return CatchUpReceiver(sock, suite, keys, number, b"", can_change_key=True)
