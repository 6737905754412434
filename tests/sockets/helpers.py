"""Connections between a ``KTLSSocket`` and a peer, and what the tests do with both ends at once."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import ktls
from ktls.testing import halve_send_buffer

from ..support import HOST, TLS12, TLS13, Authority, has_kernel_tls, has_rekey

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.handshake.handoff import OffloadPolicy
    from ktls.record.interface import LayerName

_T = TypeVar("_T")

Role: TypeAlias = Literal["client", "server"]
PeerKind: TypeAlias = Literal["stdlib", "ktls"]

#: How long a peer waits before it gives up: no test is that slow, not even in the lab.
PATIENCE: Final = 30.0
#: What takes this long did not keep its deadline.
LATE: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the matrix."""

    version: ssl.TLSVersion = TLS13
    role: Role = "client"
    peer: PeerKind = "stdlib"
    offload: OffloadPolicy = "auto"

    def __str__(self) -> str:
        version = "1.3" if self.version is TLS13 else "1.2"
        return f"{self.offload}-{version}-{self.role}-{self.peer}"

    @property
    def tx_layer(self) -> LayerName:
        """Where the sending direction has to live on this kernel."""
        return "kernel" if self.offload != "userspace" and has_kernel_tls() else "userspace"

    @property
    def rx_layer(self) -> LayerName:
        """Where the receiving direction has to live on this kernel."""
        if self.version is TLS13 and not has_rekey() and self.offload != "kernel":
            return "userspace"
        return self.tx_layer

    @property
    def may_refresh(self) -> bool:
        """Whether both directions can change keys."""
        return self.version is TLS13 and (self.tx_layer == "userspace" or has_rekey())


@dataclass
class Link:
    """Both ends of a connection. ``theirs`` is an ``ssl.SSLSocket`` or a ``KTLSSocket``: the tests use what these have in common."""

    ours: ktls.KTLSSocket
    theirs: Any


def tcp_pair(*, buffers: int | None = None) -> tuple[socket.socket, socket.socket]:
    """A TCP connection over loopback: the client's and the server's end. ``buffers``: sizes of all four, in bytes."""
    with socket.socket() as listener:
        client = socket.socket()
        for sock in (listener, client) if buffers is not None else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers or 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers or 0)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    return client, server


def pattern(size: int, seed: int = 1) -> bytes:
    """``size`` bytes that look random and are the same each time."""
    block = bytes((i * 131 + (i >> 8) * 17 + seed) & 255 for i in range(65521))
    return (block * (size // len(block) + 1))[:size]


def read_exactly(sock: Any, count: int) -> bytes:
    """Receive ``count`` bytes, or fewer at the end."""
    data = bytearray()
    while len(data) < count and (chunk := sock.recv(min(65536, count - len(data)))):
        data += chunk
    return bytes(data)


def read_all(sock: Any) -> bytes:
    """Receive until the end."""
    data = bytearray()
    while chunk := sock.recv(65536):
        data += chunk
    return bytes(data)


def fill(sock: socket.socket, piece: bytes = bytes(16384)) -> int:
    """Send on a non-blocking socket until nothing more goes out; return how many bytes were accepted."""
    total = 0
    refused = False
    while True:
        try:
            total += sock.send(piece)
            refused = False
        except ssl.SSLWantWriteError:
            if refused:
                halve_send_buffer(sock)
                return total
            refused = True
            select.select([], [sock], [], 0.05)  # for what TCP may still move by itself


def descriptors() -> set[str]:
    """The open descriptors of this process, without that of the directory itself."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


@dataclass
class Net:
    """Makes connections and runs threads for one test; at the end nothing of them is left, whatever state they are in."""

    authority: Authority
    sockets: list[socket.socket] = field(default_factory=list)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    def __post_init__(self) -> None:
        self._contexts: dict[tuple[str, Role, ssl.TLSVersion], ssl.SSLContext] = {}

    def keep(self, sock: Any) -> Any:
        """See to it that ``sock`` is gone at the end."""
        self.sockets.append(sock)
        return sock

    def spawn(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> Future[_T]:
        """Run ``function`` in a thread."""
        return self.pool.submit(function, *args, **kwargs)

    def tcp(self, *, buffers: int | None = None) -> tuple[socket.socket, socket.socket]:
        """A TCP connection that is gone at the end."""
        client, server = tcp_pair(buffers=buffers)
        self.sockets += [client, server]
        return client, server

    def context(self, kind: PeerKind, role: Role, version: ssl.TLSVersion = TLS13) -> Any:
        """A context that is made once per test."""
        key = (kind, role, version)
        if key not in self._contexts:
            make: Any = getattr(self.authority, role if kind == "stdlib" else f"ktls_{role}")
            self._contexts[key] = make(version)
        return self._contexts[key]

    def link(
        self,
        case: Case | None = None,
        *,
        context: ssl.SSLContext | None = None,
        their_context: Any = None,
        timeout: float | None = None,
        their_timeout: float | None = PATIENCE,
        buffers: int | None = None,
        settings: ktls.Settings | None = None,
        changing_peer: bool = False,
        **arguments: Any,
    ) -> Link:
        """Connect and shake hands. ``arguments`` go to our ``wrap_socket``.

        ``changing_peer``: the peer, a ``KTLSSocket``, can change its keys, whatever this kernel can.
        """
        case = case or Case()
        their_role: Role = "server" if case.role == "client" else "client"
        context = context or self.context("ktls", case.role, case.version)
        if isinstance(context, ktls.SSLContext):
            context.offload = case.offload
        their_context = their_context or self.context(case.peer, their_role, case.version)
        if changing_peer and not has_rekey():
            their_context.offload = "userspace"
        client, server = self.tcp(buffers=buffers)
        mine, their = (client, server) if case.role == "client" else (server, client)
        mine.settimeout(PATIENCE)
        their.settimeout(their_timeout)
        theirs = self.spawn(
            their_context.wrap_socket,
            their,
            server_side=their_role == "server",
            server_hostname=HOST if their_role == "client" else None,
            suppress_ragged_eofs=False,
        )
        if case.role == "client":
            arguments.setdefault("server_hostname", HOST)
        try:
            ours = ktls.wrap_socket(
                mine,
                context,
                server_side=case.role == "server",
                settings=settings,
                **arguments,
            )
        except BaseException:
            if theirs.exception() is None:
                self.keep(theirs.result())
            raise
        self.keep(ours)
        ours.settimeout(timeout)
        return Link(ours, self.keep(theirs.result()))

    def close(self) -> None:
        """End everything without waiting for anybody."""
        for sock in self.sockets:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # wakes threads that wait
        self.pool.shutdown()
        for sock in self.sockets:
            if (fd := sock.detach()) >= 0:
                os.close(fd)


def matrix(
    *,
    versions: tuple[ssl.TLSVersion, ...] = (TLS12, TLS13),
    roles: tuple[Role, ...] = ("client", "server"),
    peers: tuple[PeerKind, ...] = ("stdlib", "ktls"),
    offloads: tuple[OffloadPolicy, ...] = ("auto", "userspace"),
) -> list[Case]:
    """All combinations.

    Where there is no kernel TLS, ``auto`` is ``userspace``, and one of them will do. Where there is, ``userspace`` is what has been tried elsewhere in full:
    one version of it and one peer will do.
    """
    if not has_kernel_tls() and "auto" in offloads:
        offloads = tuple(offload for offload in offloads if offload != "userspace")
    return [
        Case(version=version, role=role, peer=peer, offload=offload)
        for offload in offloads
        for version in (versions if offload == "auto" else versions[-1:])
        for role in roles
        for peer in (peers if offload == "auto" else peers[:1])
    ]


def slowly(sock: Any) -> bytes:
    """Receive until the end in small pieces, without ever being in time."""
    data = bytearray()
    while chunk := sock.recv(1500):
        data += chunk
        os.sched_yield()
    return bytes(data)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(sock.detach())


def cut(sock: socket.socket) -> None:
    """End TCP without close_notify."""
    socket.socket.shutdown(sock, socket.SHUT_WR)
