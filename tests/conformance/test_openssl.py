"""``openssl s_client`` and ``openssl s_server``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from ktls import TruncatedError

from ..peers.parties import ALPHABET, payload, read_all
from ..peers.peers import Link, Peers, openssl_words
from ..peers.test_openssl_updates import command_update
from .matrix import Cell
from .programs import (
    ASKS,
    DATA,
    ENDS,
    FOLLOWED,
    OURS,
    RESUMES,
    SIZE,
    UPDATES,
    WE_END,
    check_suite,
    gets_no_answer,
    no_session,
    openssl_suite,
    restrict,
    row,
)
from .scene import OurEnd

_PEER: Final = "openssl"


class _Meeting:
    """A connection with the program in the other role."""

    def __init__(self, cell: Cell, peers: Peers, differs: Callable[[str], None]) -> None:
        self.link: Link = peers.openssl(cell.role, cell.tls_version, openssl_suite(cell))
        self.ours = OurEnd(cell, self.link.tls, peers, differs)
        check_suite(cell, self.ours)

    def follows(self, tx: int, rx: int) -> None:
        """Data goes both ways under keys of these generations."""
        self.link.exchange(SIZE)
        assert self.ours.generations() == (tx, rx)


@row(_PEER, DATA, FOLLOWED, engine=True)
def test_data(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    link = _Meeting(cell, cell_peers, differs).link
    link.exchange(SIZE)
    link.exchange(1)


@row(_PEER, UPDATES, FOLLOWED, versions=("1.3",))
def test_updates(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    meeting = _Meeting(cell, cell_peers, differs)
    meeting.follows(0, 0)
    for number in (1, 2):
        command_update(meeting.link, request=False)
        if not meeting.ours.can_change_rx:
            meeting.ours.cannot_follow()
            return
        meeting.follows(0, number)


@row(_PEER, ASKS, "answers with its own update", versions=("1.3",))
def test_asks(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    meeting = _Meeting(cell, cell_peers, differs)
    meeting.follows(0, 0)
    for number in (1, 2):
        command_update(meeting.link, request=True)
        if not meeting.ours.can_change_rx:
            meeting.ours.cannot_follow()
            return
        if not meeting.ours.can_change_tx:
            gets_no_answer(meeting.ours, meeting.link)
            assert meeting.link.tls.recv(1) == b""  # it takes our close_notify for the end
            return
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
    meeting.link.take_turns(SIZE)
    meeting.follows(2, 1)


@row(_PEER, ENDS, "the end, in order", roles=("server",), engine=True)
def test_ends(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    link = _Meeting(cell, cell_peers, differs).link
    link.exchange(100)
    link.program.end_input()
    assert read_all(link.tls) == b""
    link.tls.close()
    assert link.program.wait() == 0


@row(_PEER, "closes without close_notify (`s_server` does)", "`TruncatedError`", roles=("client",), engine=True)  # fmt: skip
def test_ends_ragged(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    link = _Meeting(cell, cell_peers, differs).link
    link.exchange(100)
    link.program.type(b"Q\n")
    for _ in range(2):
        with pytest.raises(TruncatedError):
            link.tls.recv(10)
    assert link.program.wait() == 0


@row(_PEER, WE_END, "all of it arrives, then close_notify", engine=True)
def test_we_end(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    """Without our close_notify it would speak of an unexpected end."""
    link = _Meeting(cell, cell_peers, differs).link
    link.send(payload(SIZE))
    link.tls.close()
    link.check_sent()
    if cell.role == "server":
        assert link.program.wait() == 0
    else:
        link.program.out.expect(b"DONE")
    assert b"error" not in bytes(link.program.err).lower()


@row(_PEER, RESUMES, "resumes", engine=True)
def test_resumes(
    cell: Cell, cell_peers: Peers, tmp_path: Path, differs: Callable[[str], None]
) -> None:
    restrict(cell, cell_peers)
    words = openssl_words(cell.tls_version, openssl_suite(cell))
    if cell.role == "server":
        _our_server_resumes(cell, cell_peers, words, tmp_path / "session")
    else:
        _our_client_resumes(cell, cell_peers, words, differs)


def _our_server_resumes(cell: Cell, peers: Peers, words: list[str], session: Path) -> None:
    context = peers.pki.server(cell.tls_version)
    first = peers.s_client(context, *words, "-sess_out", session)
    assert first.tls.session_reused is False
    first.exchange(100)
    first.program.end_input()
    assert read_all(first.tls) == b""
    first.tls.close()
    assert first.program.wait() == 0
    again = peers.s_client(context, *words, "-sess_in", session, brief=False)
    assert again.tls.session_reused is True
    again.program.out.expect(b"Reused, TLSv1")


def _our_client_resumes(
    cell: Cell, peers: Peers, words: list[str], differs: Callable[[str], None]
) -> None:
    server, context = peers.s_server(*words), peers.pki.client(cell.tls_version)
    session = None
    for number in range(2):
        tls = peers.connect(server.port, context, session=session)
        assert tls.session_reused is (number > 0)
        text = payload(100, seed=number)
        Link(tls, server).type(text)  # behind the tickets
        tls.sendall(text)
        server.out.expect(b"[%s]{100}" % ALPHABET)
        session = tls.session
        if no_session(cell, session, differs):
            return
        assert session is not None
        tls.close()
        server.out.expect(b"DONE")
    assert bytes(server.out).count(b"Reused session-id") == 1
