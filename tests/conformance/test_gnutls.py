"""``gnutls-cli``, and ``gnutls-serv --echo``, which has no command for updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import ktls

from ..peers.parties import payload, read_all
from ..peers.peers import Link, Peers
from ..peers.test_gnutls import check_quiet, command, echo, priority
from .matrix import Cell
from .programs import (
    ASKS,
    DATA,
    ENDS,
    FOLLOWED,
    OURS,
    RESUMES,
    UPDATES,
    WE_END,
    check_suite,
    gets_no_answer,
    no_session,
    restrict,
    row,
)
from .scene import OurEnd

_PEER: Final = "gnutls"
#: ``gnutls-cli`` writes byte by byte, each with a system call of its own.
_SIZE: Final = 3000


def _priority(cell: Cell) -> str:
    extra = ":+SHA256" if cell.suite == "AES-128-CBC" else ""
    return priority(cell.tls_version, cell.suite.upper(), extra)


class _Meeting:
    """A connection with the program in the other role."""

    def __init__(self, cell: Cell, peers: Peers, differs: Callable[[str], None]) -> None:
        restrict(cell, peers)
        self.role = cell.role
        if cell.role == "server":
            context = peers.pki.server(cell.tls_version)
            self.link = peers.gnutls_cli(context, _priority(cell))
        else:
            program = peers.gnutls_serv(_priority(cell))
            tls = peers.connect(program.port, peers.pki.client(cell.tls_version))
            self.link = Link(tls, program)
        self.ours = OurEnd(cell, self.link.tls, peers, differs)
        check_suite(cell, self.ours)

    def exchange(self, size: int = _SIZE) -> None:
        if self.role == "server":
            self.link.exchange(size)
        else:
            echo(self.link.tls, size)

    def follows(self, tx: int, rx: int) -> None:
        """Data goes both ways under keys of these generations."""
        self.exchange()
        assert self.ours.generations() == (tx, rx)
        check_quiet(self.link)


@row(_PEER, DATA, FOLLOWED, engine=True)
def test_data(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    meeting = _Meeting(cell, cell_peers, differs)
    meeting.exchange(20_000 if cell.role == "client" else _SIZE)
    meeting.exchange(1)
    check_quiet(meeting.link)


@row(_PEER, UPDATES, FOLLOWED, versions=("1.3",), roles=("server",))
def test_updates(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    meeting = _Meeting(cell, cell_peers, differs)
    for number in (1, 2):
        command(meeting.link, "rekey1", b"Rekey was completed")
        if not meeting.ours.can_change_rx:
            meeting.ours.cannot_follow()
            return
        meeting.follows(0, number)


@row(_PEER, ASKS, "answers with its own update", versions=("1.3",), roles=("server",))
def test_asks(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    meeting = _Meeting(cell, cell_peers, differs)
    for number in (1, 2):
        command(meeting.link, "rekey", b"Rekey was completed")
        if not meeting.ours.can_change_rx:
            meeting.ours.cannot_follow()
            return
        if not meeting.ours.can_change_tx:
            gets_no_answer(meeting.ours, meeting.link)
            meeting.link.program.out.expect(b"Peer has closed the GnuTLS connection")
            return
        meeting.link.type(payload(10))
        meeting.follows(number, number)


@row(_PEER, OURS, FOLLOWED, versions=("1.3",))
def test_our_updates(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    meeting = _Meeting(cell, cell_peers, differs)
    meeting.follows(0, 0)
    if not meeting.ours.may_update():
        meeting.follows(0, 0)
        return
    meeting.link.tls.refresh_traffic_keys()
    meeting.follows(1, 0)
    meeting.link.tls.refresh_traffic_keys(request_peer=True)
    if cell.role == "server":
        meeting.link.take_turns(100)
    meeting.follows(2, 1)


@row(_PEER, ENDS, "the end, in order", roles=("server",), engine=True)
def test_ends(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    link = _Meeting(cell, cell_peers, differs).link
    link.exchange(100)
    link.program.end_input()
    assert read_all(link.tls) == b""
    link.tls.close()
    assert link.program.wait() == 0
    check_quiet(link)


@row(_PEER, WE_END, "all of it arrives, then close_notify", engine=True)
def test_we_end(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    meeting = _Meeting(cell, cell_peers, differs)
    link = meeting.link
    if cell.role == "client":
        echo(link.tls, 100)
        cell_peers.stack.enter_context(link.tls.unwrap())  # it answers
    else:
        link.send(payload(_SIZE))
        link.tls.close()
        link.check_sent()
        link.program.out.expect(b"Peer has closed the GnuTLS connection")
        assert link.program.wait() == 0
    check_quiet(link)


@row(_PEER, RESUMES, "resumes", engine=True)
def test_resumes(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    restrict(cell, cell_peers)
    if cell.role == "server":
        _our_server_resumes(cell, cell_peers, cell_peers.pki.server(cell.tls_version))
    else:
        _our_client_resumes(cell, cell_peers, differs)


def _our_server_resumes(cell: Cell, peers: Peers, context: ktls.SSLContext) -> None:
    listener = peers.listener()
    words = (_priority(cell), "--resume", "--waitresumption")  # two connections
    program = peers.start_gnutls_cli(listener, *words)
    first = peers.accept(listener, context)
    assert first.session_reused is False
    assert first.recv(1) == b""
    first.close()
    link = Link(peers.accept(listener, context), program)
    assert link.tls.session_reused is True
    program.out.expect(b"This is a resumed session")
    link.exchange(100)


def _our_client_resumes(cell: Cell, peers: Peers, differs: Callable[[str], None]) -> None:
    context = peers.pki.client(cell.tls_version)
    program = peers.gnutls_serv(_priority(cell))
    session = None
    for number in range(2):
        tls = peers.connect(program.port, context, session=session)
        assert tls.session_reused is (number > 0)
        echo(tls, 100)
        session = tls.session
        if no_session(cell, session, differs):
            return
        peers.stack.enter_context(tls.unwrap())
        tls.close()
    program.out.expect(b"This is a resumed session")
