"""The ``ssl`` module itself. In TLS 1.3 it can't be told which suite to use."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Any, Final

from ..peers.parties import Task, payload, read_all
from ..peers.peers import Peers
from ..peers.test_stdlib import Pair, connect, exchange, other_role, stdlib_context, unwrapping
from .matrix import Cell, Mark, Row, behaviours
from .programs import (
    DATA,
    ENDS,
    FOLLOWED,
    OURS,
    RESUMES,
    SIZE,
    WE_END,
    check_suite,
    no_session,
    openssl_suite,
    restrict,
)
from .scene import OurEnd

_PEER: Final = "ssl"
_GROUP: Final = "Data, updates, ends, resumption"


def _row(name: str, expected: str, **options: Any) -> Mark:
    """Two rows: the suite can be chosen in TLS 1.2 only."""
    tls13 = Row(_GROUP, name, expected, _PEER, versions=("1.3",), suites=("AES-256-GCM",))
    return behaviours(tls13, Row(_GROUP, name, expected, _PEER, versions=("1.2",), **options))


def _contexts(cell: Cell, peers: Peers) -> tuple[Any, ssl.SSLContext]:
    """Ours and theirs."""
    restrict(cell, peers)
    theirs = stdlib_context(peers.pki, other_role(cell.role), cell.tls_version)
    if cell.version == "1.2":
        theirs.set_ciphers(openssl_suite(cell))
    make = peers.pki.server if cell.role == "server" else peers.pki.client
    return make(cell.tls_version), theirs


def _meet(cell: Cell, peers: Peers, differs: Callable[[str], None]) -> tuple[OurEnd, Pair]:
    pair = connect(peers, cell.role, *_contexts(cell, peers))
    ours = OurEnd(cell, pair[0], peers, differs)
    check_suite(cell, ours)
    return ours, pair


@_row(DATA, FOLLOWED, engine=True)
def test_data(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    _, pair = _meet(cell, cell_peers, differs)
    exchange(pair, SIZE)
    exchange(pair, 1)
    with unwrapping(pair):
        pass


@behaviours(
    Row(_GROUP, OURS, FOLLOWED, _PEER, versions=("1.3",), suites=("AES-256-GCM",)),
)
def test_our_updates(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    ours, pair = _meet(cell, cell_peers, differs)
    exchange(pair, SIZE)
    if not ours.may_update():
        exchange(pair, SIZE)
        return
    ours.tls.refresh_traffic_keys()
    exchange(pair, SIZE)
    assert ours.generations() == (1, 0)
    ours.tls.refresh_traffic_keys(request_peer=True)
    exchange(pair, SIZE)
    assert ours.generations() == (2, 1)


@_row(ENDS, "the end, in order", engine=True)
def test_ends(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    _, (tls, other) = _meet(cell, cell_peers, differs)
    other.sendall(payload(SIZE))
    with Task(other.unwrap) as unwrapped:  # it waits for ours
        assert read_all(tls) == payload(SIZE)
        tls.close()
    unwrapped.result().close()


@_row(WE_END, "all of it arrives, then close_notify", engine=True)
def test_we_end(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    _, (tls, other) = _meet(cell, cell_peers, differs)
    tls.sendall(payload(100))
    tls.shutdown(socket.SHUT_WR)
    data = b""
    while chunk := other.recv(65536):  # an end without close_notify would raise
        data += chunk
    assert data == payload(100)
    if cell.version == "1.3":
        other.sendall(b"still yours")
    with other.unwrap():
        assert read_all(tls) == (b"still yours" if cell.version == "1.3" else b"")


@_row(RESUMES, "resumes", engine=True)
def test_resumes(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    ours, theirs = _contexts(cell, cell_peers)
    session = None
    for number in range(2):
        pair = connect(cell_peers, cell.role, ours, theirs, session)
        tls, other = pair
        assert (tls.session_reused, other.session_reused) == (number > 0, number > 0)
        exchange(pair, 100)
        client = tls if cell.role == "client" else other
        session = client.session
        if no_session(cell, session, differs):
            return
        with unwrapping(pair):
            pass
