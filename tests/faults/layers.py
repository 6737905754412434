"""The record layers of the sweep, each as a way to begin on a fresh connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from ktls.handshake.handoff import OffloadPolicy, RecordDriver, hand_off, prepare
from ktls.handshake.result import HandshakeResult, HandshakeSecrets, PeerInfo
from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import ProtocolVersion, Role
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret
from ktls.protocol.limits import KeyLimits
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.driver import Driver
from ktls.record.kernel import KernelReceiver, KernelSender, attach
from ktls.record.probe import rekey_supported
from ktls.record.userspace import UserspaceReceiver
from ktls.testing import RecordPeer, made_up_keys, made_up_secret

__all__ = ("LAYERS", "TLS12", "TLS13", "Layers", "Options")

TLS13: Final = CipherSuite.TLS_AES_128_GCM_SHA256
TLS12: Final = CipherSuite.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256

Where = Literal["kernel", "userspace"]


@dataclass(frozen=True)
class Options:
    """What a scenario wants of its connection."""

    suite: CipherSuite = TLS13
    #: Small buffers, that are quickly full.
    small: bool = False
    limits: KeyLimits | None = None
    #: What the peer has sent already when the layers begin, read from the socket: in number, the bytes of it.
    leftover: int = 0
    max_fragment: int = MAX_FRAGMENT

    def result(self, leftover: bytes) -> HandshakeResult:
        """What a handshake would have left."""
        is_tls13 = self.suite.version is ProtocolVersion.TLSv1_3
        make: Callable[[CipherSuite, str], TrafficSecret | TrafficKeys] = (
            made_up_secret if is_tls13 else made_up_keys
        )
        return HandshakeResult(
            role=Role.CLIENT,
            version="TLSv1.3" if is_tls13 else "TLSv1.2",
            cipher=(self.suite.name, "TLS", 128),
            suite=self.suite,
            secrets=HandshakeSecrets(
                suite=self.suite,
                tx=make(self.suite, "us"),
                rx=make(self.suite, "peer"),
                tx_sequence_number=0,
                rx_sequence_number=0,
            ),
            no_secrets_reason=None,
            leftover=leftover,
            max_fragment=self.max_fragment,
            info=PeerInfo(),
            engine_object=None,
            tickets=None,
            client_random=None,
        )


@dataclass(frozen=True)
class Layers:
    """Where the directions live, and whether calls come from one thread only (``direct``), which has paths of its own."""

    name: str
    tx: Where
    rx: Where
    direct: bool = False
    policy: OffloadPolicy | None = None
    #: How to begin, if that is something else: it may tell the peer its keys.
    begin: Callable[[socket.socket, RecordPeer, Options], RecordDriver] | None = None

    def __str__(self) -> str:
        return self.name

    def start(self, sock: socket.socket, peer: RecordPeer, options: Options) -> RecordDriver:
        """Begin, by the hand-off if there is a policy for it."""
        if self.begin is not None:
            return self.begin(sock, peer, options)
        lock = threading.RLock() if self.direct else None
        leftover = _take(sock, options.leftover) if options.leftover else b""
        if self.policy is not None:
            driver, _ = hand_off(
                sock,
                options.result(leftover),
                policy=self.policy,
                unavailable=prepare(sock, self.policy),
                limits=options.limits,
                lock=lock,
            )
            return driver
        suite = options.suite
        ours, theirs = made_up_keys(suite, "us"), made_up_keys(suite, "peer")
        attach(sock)
        is_tls13 = suite.version is ProtocolVersion.TLSv1_3
        rekey = is_tls13 and rekey_supported()
        connection = KernelConnection(
            Role.CLIENT,
            suite,
            tx_secret=made_up_secret(suite, "us") if is_tls13 else None,
            rx_secret=made_up_secret(suite, "peer") if is_tls13 else None,
            limits=options.limits,
            tx_key_can_change=rekey,
            now=time.monotonic(),
        )
        sender = KernelSender(
            sock, suite, ours, can_change_key=rekey, max_fragment=options.max_fragment
        )
        receiver = (
            KernelReceiver(sock, suite, theirs, can_change_key=rekey)
            if self.rx == "kernel"
            else UserspaceReceiver(sock, suite, theirs, initial=leftover)
        )
        return Driver(connection, sender, receiver, lock=lock)


def _take(sock: socket.socket, size: int) -> bytes:
    taken = b""
    while len(taken) < size:
        try:
            taken += socket.socket.recv(sock, size - len(taken))
        except BlockingIOError:
            continue
    return taken


LAYERS: Final = {
    layers.name: layers
    for layers in (
        Layers("userspace", "userspace", "userspace", policy="userspace"),
        Layers("userspace-direct", "userspace", "userspace", direct=True, policy="userspace"),
        Layers("kernel", "kernel", "kernel", policy="auto"),
        Layers("kernel-direct", "kernel", "kernel", direct=True, policy="auto"),
        Layers("kernel-without-rekey", "kernel", "userspace", policy="auto"),
        # Put together by hand, since no policy does so on the kernel at hand.
        Layers("mixed", "kernel", "userspace"),
        Layers("both-in-kernel", "kernel", "kernel"),
    )
}
