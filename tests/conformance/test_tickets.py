"""NewSessionTicket of TLS 1.3: one, many, huge, empty, malformed, split, to a server; and whether a session can be resumed after all of that."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from ktls.protocol.enums import AlertDescription
from ktls.protocol.limits import FloodBudget
from ktls.protocol.messages import MAX_HANDSHAKE_MESSAGE
from ktls.protocol.suites import MAX_FRAGMENT

from ..peers.peers import Peers
from ..peers.scripted import TICKET, UPDATE
from .matrix import Cell, Mark, Row, behaviour, behaviours
from .resumption import TicketServer, extension, new_session_ticket, serve
from .scene import Scene

_GROUP: Final = "Tickets"
_RESUME: Final = "Resumption, after a ticket"
_TAKEN: Final = "taken; data goes both ways"
_RESUMES: Final = "the next connection resumes"
_UNEXPECTED: Final = AlertDescription.UNEXPECTED_MESSAGE
_DECODE: Final = AlertDescription.DECODE_ERROR
_ILLEGAL: Final = AlertDescription.ILLEGAL_PARAMETER

#: RFC 9846 §4.2.10.
_EARLY_DATA: Final = 42
_UNKNOWN: Final = 0xFAFA


def _taken(scene: Scene) -> None:
    scene.both_ways()
    assert scene.generations() == (0, 0)
    session = scene.tls.session
    if session is None:  # older Pythons can't copy the largest
        assert scene.cell.row.case in _TOO_LARGE
        assert sys.version_info < (3, 13)
        return
    assert session.has_ticket


def _tickets(*rows: tuple[str, tuple[bytes, ...]]) -> Mark:
    return behaviours(
        *(
            Row(_GROUP, name, _TAKEN, versions=("1.3",), roles=("client",), case=fragments)
            for name, fragments in rows
        )
    )


def _pieces(message: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(message[at : at + size] for at in range(0, len(message), size))


#: As large as a ticket can be, and as its extensions can.
_HUGE: Final = new_session_ticket(bytes(0xFFFF))
_LARGEST: Final = new_session_ticket(
    bytes(0xFFFF), nonce=bytes(255), extensions=extension(_UNKNOWN, bytes(0xFFFE - 4))
)
assert len(_LARGEST) == 4 + MAX_HANDSHAKE_MESSAGE
_TOO_LARGE: Final = (_pieces(_HUGE, MAX_FRAGMENT), _pieces(_LARGEST, MAX_FRAGMENT))
_LIKE_UPDATES: Final = TICKET.replace(b"test", b"\x18\x18\x18\x18")
_AT: Final = _LIKE_UPDATES.index(b"\x18\x18")


# --- honest ones -----------------------------------------------------------------------------------------------------


@_tickets(
    ("one ticket", (TICKET,)),
    ("20 tickets in a row", (TICKET,) * 20),
    ("1000 tickets in a row", (TICKET,) * 1000),
    ("as many tickets as fit into one record", (TICKET * (MAX_FRAGMENT // len(TICKET)),)),
    ("a ticket of 65535 bytes, over five records", _TOO_LARGE[0]),
    ("the largest ticket there can be, over nine records", _TOO_LARGE[1]),
    ("a ticket of one byte", (new_session_ticket(b"?"),)),
    ("a ticket with an empty nonce", (new_session_ticket(b"?", nonce=b""),)),
    ("a ticket with a nonce of 255 bytes", (new_session_ticket(b"?", nonce=bytes(255)),)),
    ("a ticket with early_data", (new_session_ticket(b"?", extensions=extension(_EARLY_DATA, bytes(4))),)),
    ("a ticket with an extension that nobody knows", (new_session_ticket(b"?", extensions=extension(_UNKNOWN, b"?")),)),
    ("a ticket byte by byte", _pieces(TICKET, 1)),
    ("a ticket split in two", (TICKET[:9], TICKET[9:])),
    ("two tickets and the first half of a third in a record", (TICKET * 2 + TICKET[:9], TICKET[9:])),
    (
        "a ticket whose second record begins with the byte of an update",
        (_LIKE_UPDATES[:_AT], _LIKE_UPDATES[_AT : _AT + 2], _LIKE_UPDATES[_AT + 2 :]),
    ),
)  # fmt: skip
def test_ticket(scene: Scene) -> None:
    fragments = scene.cell.row.case
    scene.peer.send_handshake(*fragments)
    _taken(scene)


def _of_client(name: str, expected: str, **options: Any) -> Mark:
    return behaviour(_GROUP, name, expected, versions=("1.3",), roles=("client",), **options)


@_of_client("a ticket at each place between data", "the data; all tickets are taken")
def test_tickets_amid_data(scene: Scene) -> None:
    for number in range(20):
        scene.peer.send_handshake(TICKET)
        scene.peer.send_data(b"%02d" % number)
    scene.reads(b"".join(b"%02d" % number for number in range(20)))
    _taken(scene)


@_of_client("a ticket after we have closed our side", "taken; reading goes on")
def test_ticket_after_our_close(scene: Scene) -> None:
    scene.tls.shutdown(socket.SHUT_WR)
    scene.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    scene.peer.send_handshake(TICKET)
    scene.peer.send_data(b"x")
    scene.reads(b"x")
    assert scene.tls.session is not None


@_of_client("a ticket after close_notify", "ignored, as everything is then")
def test_ticket_after_close(scene: Scene) -> None:
    scene.peer.close_notify()
    scene.peer.send_handshake(TICKET)
    for _ in range(2):
        assert scene.tls.recv(10) == b""


# --- against the rules ---------------------------------------------------------------------------------------------

_BODY: Final = TICKET[4:]


def _with_length(body: bytes) -> bytes:
    return b"\x04" + len(body).to_bytes(3, "big") + body


_EARLY: Final = extension(_EARLY_DATA, bytes(4))
_WRONG: Final = (
    ("a ticket of no bytes", (new_session_ticket(b""),), _DECODE),
    ("a ticket message without a body", (_with_length(b""),), _DECODE),
    ("a ticket message one byte short", (_with_length(_BODY[:-1]),), _DECODE),
    ("a ticket message with a byte behind the extensions", (_with_length(_BODY + b"\0"),), _DECODE),
    ("a ticket whose nonce goes beyond the message", (_with_length(_BODY[:8] + b"\xff" + _BODY[9:]),), _DECODE),
    ("a ticket whose extensions end too early", (new_session_ticket(b"?", extensions=b"\0\x2a\0"),), _DECODE),
    ("a ticket with early_data of three bytes", (new_session_ticket(b"?", extensions=extension(_EARLY_DATA, bytes(3))),), _DECODE),
    ("a ticket with early_data twice", (new_session_ticket(b"?", extensions=_EARLY * 2),), _ILLEGAL),
    ("a ticket message that announces one byte more than there can be", (b"\x04" + (MAX_HANDSHAKE_MESSAGE + 1).to_bytes(3, "big"),), _ILLEGAL),
    ("a ticket message that announces 16 megabytes", (b"\x04\xff\xff\xff",), _ILLEGAL),
    ("an empty handshake record amid a ticket", (TICKET[:9], b""), _UNEXPECTED),
)  # fmt: skip


@behaviours(
    *(
        Row(
            _GROUP,
            name,
            f"`{alert.name.lower()}`",
            versions=("1.3",),
            roles=("client",),
            case=(fragments, alert),
        )
        for name, fragments, alert in _WRONG
    )
)
def test_wrong_ticket(scene: Scene) -> None:
    fragments, alert = scene.cell.row.case
    scene.peer.send_handshake(*fragments)
    scene.refused(alert)


@_of_client("data amid a ticket", "`unexpected_message`")
def test_data_inside_ticket(scene: Scene) -> None:
    scene.peer.send_handshake(TICKET[:9])
    scene.peer.send_data(b"in between")
    scene.refused(_UNEXPECTED)


@_of_client("a flood of tickets", "`unexpected_message`", suites=("AES-128-GCM",))
def test_flood_of_tickets(scene: Scene) -> None:
    # Time gives some of the budget back while we work on them: send more than the slowest kernel earns.
    scene.peer.send_handshake(*[TICKET] * (int(FloodBudget.CAPACITY) + 600))
    scene.refused(_UNEXPECTED, silent=True)


@_of_client("a flood of tickets, hundreds in a record", "`unexpected_message`", suites=("AES-128-GCM",))  # fmt: skip
def test_flood_of_joined_tickets(scene: Scene) -> None:
    scene.peer.send_handshake(*[TICKET * 300] * 10)
    scene.refused(_UNEXPECTED, silent=True)


@behaviours(
    Row(_GROUP, "a ticket to a server", "`unexpected_message`", versions=("1.3",), roles=("server",)),
    Row(_GROUP, "a ticket after the handshake of TLS 1.2", "`unexpected_message`", versions=("1.2",)),
)  # fmt: skip
def test_ticket_where_none_may_be(scene: Scene) -> None:
    scene.peer.send_handshake(TICKET)
    scene.refused(_UNEXPECTED)


# --- resumption ------------------------------------------------------------------------------------------------------

_Sends: TypeAlias = Callable[[TicketServer], None]


def _update(server: TicketServer) -> None:
    server.peer.send_update()


def _send(*count_or_size: int) -> _Sends:
    """A ticket in pieces of that size."""
    (size,) = count_or_size or (MAX_FRAGMENT,)
    return lambda server: server.peer.send_handshake(*_pieces(server.ticket(), size))


def _joined_with_update(server: TicketServer) -> None:
    server.peer.send_handshake(server.ticket() + UPDATE)
    server.peer.change_tx_key()


def _many(server: TicketServer) -> None:
    server.peer.send_handshake(*[server.ticket()] * 50)


def _useless_then_good(server: TicketServer) -> None:
    server.peer.send_handshake(_LARGEST[: MAX_FRAGMENT], *_pieces(_LARGEST[MAX_FRAGMENT:], MAX_FRAGMENT))  # fmt: skip
    server.peer.send_handshake(server.ticket())


def _with_extensions(server: TicketServer) -> None:
    extensions = _EARLY + extension(_UNKNOWN, bytes(1000))
    server.peer.send_handshake(server.ticket(extensions=extensions))


def _resumptions(*rows: tuple[str, tuple[_Sends, ...]]) -> Mark:
    return behaviours(
        *(
            Row(_RESUME, name, _RESUMES, versions=("1.3",), roles=("client",), case=steps)
            for name, steps in rows
        )
    )


@_resumptions(
    ("one ticket", (_send(),)),
    ("a ticket byte by byte", (_send(1),)),
    ("50 tickets", (_many,)),
    ("the largest ticket there can be, which is good for nothing, then a good one", (_useless_then_good,)),
    ("a ticket with early_data and an extension that nobody knows", (_with_extensions,)),
    ("three updates, then a ticket", (_update, _update, _update, _send())),
    ("a ticket and an update in one record", (_joined_with_update,)),
    ("a ticket, then three updates", (_send(), _update, _update, _update)),
    ("a ticket behind each of three updates", (_send(), _update, _send(), _update, _send(), _update, _send())),
)  # fmt: skip
def test_resumes(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> None:
    server = serve(cell, cell_peers)
    assert not server.tls.session_reused
    scene = Scene(cell, server.tls, cell_peers, differs, server.peer)
    for step in cell.row.case:
        step(server)
    if not scene.can_change_rx and any(step in (_update, _joined_with_update) for step in cell.row.case):  # fmt: skip
        scene.peer.send_data(b"x")
        scene.cannot_follow()
        return
    scene.both_ways()
    scene.peer.close_notify()
    assert scene.tls.recv(1) == b""
    session = scene.tls.session
    scene.tls.close()
    again = serve(cell, cell_peers, session)
    assert again.tls.session_reused
    assert again.tls.getpeercert()
    Scene(cell, again.tls, cell_peers, differs, again.peer).both_ways()
