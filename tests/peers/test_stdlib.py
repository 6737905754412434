"""The ``ssl`` module as the peer, both roles, and ktls at both ends."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import pytest

import ktls

from .parties import HOST, TLS12, TLS13, Pki, Task, can_rekey, payload, read_all, read_exactly, same
from .peers import Peers, Role
from .programs import PATIENCE

SIZE = 256 * 1024
ROLES = pytest.mark.parametrize("role", ["client", "server"])
VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])

Pair: TypeAlias = tuple[ktls.KTLSSocket, ssl.SSLSocket]


def stdlib_context(pki: Pki, role: Role, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A plain context of the ``ssl`` module for the end in ``role``."""
    if role == "server":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki.ecdsa)
    else:
        context = ssl.create_default_context(cafile=str(pki.ca))
    context.minimum_version = context.maximum_version = version
    return context


def other_role(role: Role) -> Role:
    return "client" if role == "server" else "server"


def our_context(pki: Pki, role: Role, version: ssl.TLSVersion) -> ktls.SSLContext:
    return pki.server(version) if role == "server" else pki.client(version)


def connect(
    peers: Peers,
    role: Role,
    ours: ktls.SSLContext,
    theirs: ssl.SSLContext,
    session: ssl.SSLSession | None = None,
) -> Pair:
    """Our end in ``role``, and an ``SSLSocket``. ``session`` is the client's."""
    listener = peers.listener()

    def accept() -> ssl.SSLSocket:
        sock, _ = listener.accept()
        sock.settimeout(PATIENCE)
        return theirs.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False)

    def reach() -> ssl.SSLSocket:
        sock = socket.create_connection(listener.getsockname(), PATIENCE)
        return theirs.wrap_socket(
            sock, server_hostname=HOST, session=session, suppress_ragged_eofs=False
        )

    with Task(accept if role == "client" else reach) as handshake:
        if role == "client":
            tls = peers.connect(listener.getsockname()[1], ours, session=session)
        else:
            tls = peers.accept(listener, ours)
    other = handshake.result()
    peers.stack.enter_context(other)
    return tls, other


def exchange(pair: Pair, size: int) -> None:
    """Data in one direction, then in the other; at our end two threads, at theirs one.

    An ``SSLSocket`` with a timeout that one thread reads while another writes fails now and then by itself: ``SSL_get_error`` sees the other's state.
    """
    tls, other = pair
    up, down = payload(size, 1), payload(size, 2)

    def take_turns() -> bytes:
        data = b""
        while len(data) < size and (chunk := other.recv(65536)):
            data += chunk
        other.sendall(down)
        return data

    with Task(lambda: read_exactly(tls, size)) as ours, Task(take_turns) as theirs:
        tls.sendall(up)
    assert same(theirs.result(), up)
    assert same(ours.result(), down)


@contextmanager
def unwrapping(pair: Pair) -> Iterator[None]:
    """Both ends say close_notify, in any order."""
    tls, other = pair
    with Task(other.unwrap) as theirs:
        plain = tls.unwrap()
        yield
    other_plain = theirs.result()
    for sock in (plain, other_plain):
        sock.close()


@ROLES
@VERSIONS
def test_data_and_unwrap(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    theirs = other_role(role)
    pair = connect(
        peers,
        role,
        our_context(peers.pki, role, version),
        stdlib_context(peers.pki, theirs, version),
    )
    exchange(pair, SIZE)
    exchange(pair, 1)
    assert pair[0].cipher() == pair[1].cipher()
    with unwrapping(pair):
        pass


@ROLES
@VERSIONS
def test_half_close(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    """Our close_notify is their end; what they say after it still arrives in TLS 1.3."""
    theirs = other_role(role)
    tls, other = connect(
        peers,
        role,
        our_context(peers.pki, role, version),
        stdlib_context(peers.pki, theirs, version),
    )
    tls.sendall(b"that was all")
    tls.shutdown(socket.SHUT_WR)
    data = b""
    while chunk := other.recv(100):
        data += chunk
    assert data == b"that was all"
    other.sendall(b"an answer")
    with Task(other.unwrap) as unwrap:
        assert read_all(tls) == b"an answer"
    unwrap.result().close()


def check_resumption(
    peers: Peers,
    role: Role,
    ours: ktls.SSLContext,
    theirs: ssl.SSLContext,
    *,
    connections: int = 3,
) -> None:
    """Connect again and again, with the client's session of the time before. ``role`` is ours."""
    session = None
    for number in range(connections):
        pair = connect(peers, role, ours, theirs, session)
        exchange(pair, 100)
        assert pair[0].session_reused is (number > 0)
        assert pair[1].session_reused is (number > 0)
        session = pair[0 if role == "client" else 1].session
        with unwrapping(pair):
            pass


@VERSIONS
def test_their_client_resumes(peers: Peers, version: ssl.TLSVersion) -> None:
    ours = our_context(peers.pki, "server", version)
    check_resumption(peers, "server", ours, stdlib_context(peers.pki, "client", version))


@VERSIONS
def test_our_client_resumes(peers: Peers, version: ssl.TLSVersion) -> None:
    ours = our_context(peers.pki, "client", version)
    check_resumption(peers, "client", ours, stdlib_context(peers.pki, "server", version))


@VERSIONS
def test_tickets_off(peers: Peers, version: ssl.TLSVersion) -> None:
    """Sessions that the server keeps instead: session IDs, and stateful tickets in TLS 1.3."""
    ours = our_context(peers.pki, "server", version)
    ours.options |= ssl.OP_NO_TICKET
    theirs = stdlib_context(peers.pki, "client", version)
    check_resumption(peers, "server", ours, theirs, connections=2)


@ROLES
def test_updates_of_ours(peers: Peers, role: Role) -> None:
    """``ssl`` has no KeyUpdate of its own, but answers."""
    theirs = other_role(role)
    tls, other = connect(
        peers, role, our_context(peers.pki, role, TLS13), stdlib_context(peers.pki, theirs, TLS13)
    )
    exchange((tls, other), 1000)
    if not can_rekey():
        with pytest.raises(ktls.LocalProtocolError):
            tls.refresh_traffic_keys(request_peer=True)
        return
    for number in range(1, 4):
        tls.refresh_traffic_keys(request_peer=True)
        tls.sendall(b"?")
        assert other.recv(1) == b"?"
        other.sendall(b"!")
        assert tls.recv(1) == b"!"
        usage = tls.key_usage
        assert (usage.tx.generation, usage.rx.generation) == (number, number)
        exchange((tls, other), 20_000)


@ROLES
def test_truncation_of_ours_is_seen(peers: Peers, role: Role) -> None:
    """A control: without close_notify the peer must complain, so the other tests mean something."""
    theirs = other_role(role)
    tls, other = connect(
        peers, role, our_context(peers.pki, role, TLS13), stdlib_context(peers.pki, theirs, TLS13)
    )
    exchange((tls, other), 10)
    socket.socket(fileno=tls.detach()).close()
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        other.recv(1)


@VERSIONS
def test_both_ends_are_ours(peers: Peers, version: ssl.TLSVersion) -> None:
    listener = peers.listener()
    client, server = peers.pki.client(version), peers.pki.server(version)
    with Task(lambda: peers.connect(listener.getsockname()[1], client)) as connecting:
        one = peers.accept(listener, server)
    two = connecting.result()
    data = payload(SIZE)
    for sender, receiver in ((one, two), (two, one)):
        for number in range(3):
            if version == TLS13 and can_rekey():
                sender.refresh_traffic_keys(request_peer=number == 1)
            with Task(partial(read_exactly, receiver, SIZE)) as received:
                sender.sendall(data)
            assert same(received.result(), data)
    one.shutdown(socket.SHUT_WR)
    assert two.recv(1) == b""
    two.close()
    assert one.recv(1) == b""
