"""Post-handshake authentication of TLS 1.3: a client that offered it keeps its handshake engine, which answers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

import pytest
from tlslite.api import TLSConnection
from tlslite.errors import TLSError

import ktls

from ..peers.parties import HOST, TLS13, Task, read_exactly
from ..peers.peers import Peers
from ..peers.programs import PATIENCE
from ..peers.scripted import _serve, _settings
from .matrix import Cell, behaviour
from .scene import policy_for

_GROUP: Final = "Post-handshake authentication"
_DEMANDED: Final = 'The user demanded `offload="kernel"`, and such a connection stays with its engine: `OffloadError`.'


def _context(peers: Peers, cell: Cell, certificate: bool) -> ktls.SSLContext:
    """A client's context that offers it."""
    context = ktls.create_default_context(cafile=str(peers.pki.ca))
    context.minimum_version = context.maximum_version = TLS13
    context.post_handshake_auth = True
    context.offload = policy_for(cell.layer, cell.version)
    if certificate:
        context.load_cert_chain(peers.pki.ecdsa)
    return context


def _ask(connection: Any) -> list[Any]:
    """Data, CertificateRequest, data; return the certificates that come back, if any, with data behind them."""
    connection.write(b"before")
    for _ in connection.request_post_handshake_auth(_settings(TLS13, "AES-128-GCM")):
        pass
    connection.write(b"after")
    assert bytes(connection.read(min=6, max=6)) == b"answer"
    chain = connection.session.clientCertChain
    connection.write(b"the end")
    return chain.x509List if chain is not None else []


@behaviour(
    _GROUP,
    "CertificateRequest to a client that offered it and has a certificate",
    "the engine keeps the connection, and proves who we are",
    versions=("1.3",),
    roles=("client",),
    suites=(),
)
def test_with_a_certificate(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    _check(cell, cell_peers, differs, certificate=True)


@behaviour(
    _GROUP,
    "CertificateRequest to a client that offered it and has no certificate",
    "the engine keeps the connection, and answers that there is none",
    versions=("1.3",),
    roles=("client",),
    suites=(),
)
def test_without_a_certificate(
    cell: Cell, cell_peers: Peers, differs: Callable[[str], None]
) -> None:
    _check(cell, cell_peers, differs, certificate=False)


def _check(cell: Cell, peers: Peers, differs: Callable[[str], None], *, certificate: bool) -> None:
    context = _context(peers, cell, certificate)
    listener = peers.listener()

    def serve() -> list[Any]:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(PATIENCE)
            connection = TLSConnection(sock)
            connection.closeSocket = False
            _serve(connection, peers.pki, _settings(TLS13, "AES-128-GCM"))
            return _ask(connection)

    sock = peers.stack.enter_context(socket.create_connection(listener.getsockname(), PATIENCE))
    with Task(serve) as served:
        if context.offload == "kernel":
            differs(_DEMANDED)
            with pytest.raises(ktls.OffloadError):
                context.wrap_socket(sock, server_hostname=HOST)
            sock.close()
            with pytest.raises((OSError, TLSError)):  # whatever it was at
                served.result()
            return
        with context.wrap_socket(sock, server_hostname=HOST) as tls:
            assert (tls.offload.tx, tls.offload.rx) == ("engine", "engine")
            assert read_exactly(tls, 11) == b"beforeafter"
            tls.sendall(b"answer")
            assert read_exactly(tls, 7) == b"the end"
    assert bool(served.result()) == certificate
