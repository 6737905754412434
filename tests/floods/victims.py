"""Who has to bear a flood: our end of a connection that never saw a handshake, on any record layers, behind any front end.

Also used by ``bench/floods.py``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from ktls.aio import KTLSTransport
from ktls.aio.reading import shared_by
from ktls.aio.terms import Terms
from ktls.established import Established
from ktls.handshake.result import PeerInfo
from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import ProtocolVersion, Role
from ktls.record.driver import Driver
from ktls.record.kernel import KernelReceiver, KernelSender, attach
from ktls.record.probe import kernel_tls_unavailable, rekey_supported
from ktls.record.userspace import UserspaceReceiver, UserspaceSender
from ktls.settings import Settings
from ktls.sockets import KTLSSocket
from ktls.testing import made_up_keys, made_up_secret

if TYPE_CHECKING:
    import asyncio
    import socket
    import ssl
    import threading
    from collections.abc import Callable

    from ktls.protocol.limits import KeyLimits
    from ktls.protocol.suites import CipherSuite
    from ktls.record.interface import RecordReceiver, RecordSender

__all__ = ("LAYERS", "Layers", "blocking", "driver_on", "layers_for", "transport_on")

#: Where sending and receiving live.
Layers: TypeAlias = Literal["kernel", "kernel tx", "userspace"]
LAYERS: Final[tuple[Layers, ...]] = ("kernel", "kernel tx", "userspace")


def layers_for(suite: CipherSuite) -> tuple[Layers, ...]:
    """Those that the front ends may choose on this kernel, and those that work though they don't."""
    if kernel_tls_unavailable() is not None:
        return LAYERS[2:]
    is_tls13 = suite.version is ProtocolVersion.TLSv1_3
    return LAYERS if not is_tls13 or rekey_supported() else LAYERS[1:]


def driver_on(
    sock: socket.socket,
    suite: CipherSuite,
    layers: Layers,
    role: Role = Role.SERVER,
    *,
    clock: Callable[[], float] = time.monotonic,
    limits: KeyLimits | None = None,
    lock: threading.RLock | None = None,
    on_ticket: Callable[[bytes], None] | None = None,
) -> Driver:
    """Make a driver on ``sock`` with made-up keys: ours are called "us", the peer's "peer"."""
    is_tls13 = suite.version is ProtocolVersion.TLSv1_3
    ours, theirs = made_up_keys(suite, "us"), made_up_keys(suite, "peer")
    sender: RecordSender
    receiver: RecordReceiver
    if layers != "userspace":
        attach(sock)
        can_change = is_tls13 and rekey_supported()
        sender = KernelSender(sock, suite, ours, can_change_key=can_change)
    else:
        sender = UserspaceSender(sock, suite, ours)
    if layers == "kernel":
        receiver = KernelReceiver(sock, suite, theirs, can_change_key=sender.can_change_key)
    else:
        receiver = UserspaceReceiver(sock, suite, theirs)
    connection = KernelConnection(
        role,
        suite,
        tx_secret=made_up_secret(suite, "us") if is_tls13 else None,
        rx_secret=made_up_secret(suite, "peer") if is_tls13 else None,
        limits=limits,
        tx_key_can_change=sender.can_change_key,
        now=clock(),
    )
    return Driver(connection, sender, receiver, on_ticket=on_ticket, clock=clock, lock=lock)


def _established(suite: CipherSuite) -> Established:
    version = "TLSv1.3" if suite.version is ProtocolVersion.TLSv1_3 else "TLSv1.2"
    return Established(version, (suite.name, "TLS", 128), PeerInfo(), None, None)


def blocking(
    sock: socket.socket,
    context: ssl.SSLContext,
    suite: CipherSuite,
    layers: Layers,
    role: Role = Role.SERVER,
    **options: Any,
) -> KTLSSocket:
    """Make a ``KTLSSocket``; takes over the descriptor of ``sock``. ``options`` are those of ``driver_on``."""
    tls = KTLSSocket(
        sock,
        context,
        settings=Settings(offload="userspace"),
        server_side=True,
        do_handshake_on_connect=False,
    )
    tls._driver = driver_on(tls._raw, suite, layers, role, **options)
    tls._established = _established(suite)
    return tls


def transport_on(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    context: ssl.SSLContext,
    suite: CipherSuite,
    layers: Layers,
    protocol: asyncio.BaseProtocol,
    role: Role = Role.SERVER,
    *,
    shutdown_timeout: float = 30.0,
    **options: Any,
) -> KTLSTransport:
    """Make a transport that reads, as the handshake would. ``options`` are those of ``driver_on``."""
    sock.setblocking(False)
    driver = driver_on(sock, suite, layers, role, lock=shared_by(loop).lock, **options)
    terms = Terms(
        context=context,
        settings=Settings(),
        server_side=role is Role.SERVER,
        shutdown_timeout=shutdown_timeout,
    )
    transport = KTLSTransport(
        loop,
        sock,
        driver,
        _established(suite),
        protocol,
        terms,
        names=(sock.getpeername(), sock.getsockname()),
        owner=None,
    )
    protocol.connection_made(transport)
    transport.start()
    return transport
