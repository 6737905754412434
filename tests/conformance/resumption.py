"""A scripted server of TLS 1.3 whose tickets are real: tlslite-ng makes them, a test sends them as it likes, and a later connection resumes with them."""

from __future__ import annotations

import socket
import warnings
from dataclasses import dataclass
from typing import Any, Final

import ktls

from ..peers.parties import Task
from ..peers.peers import Peers
from ..peers.programs import PATIENCE
from ..peers.scripted import ScriptedPeer, _serve, _settings
from .matrix import Cell

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports asyncore
    from tlslite.api import TLSConnection

#: Protects the tickets; both connections of a test need the same.
_TICKET_KEY: Final = bytes(range(32))


@dataclass
class TicketServer:
    """One connection of the scripted server."""

    peer: ScriptedPeer
    tls: ktls.KTLSSocket
    _connection: Any
    _settings: Any

    def ticket(self, *, lifetime: int | None = None, extensions: bytes = b"") -> bytes:
        """Make a NewSessionTicket message; it is not sent. ``extensions``: without the length in front."""
        made: list[Any] = []
        connection = self._connection
        connection._queue_message = made.append
        connection._queue_flush = lambda: iter(())
        self._settings.ticket_count = 1
        for _ in connection._serverSendTickets(self._settings):
            pass
        (message,) = made
        return new_session_ticket(
            bytes(message.ticket),
            lifetime=int(message.ticket_lifetime) if lifetime is None else lifetime,
            age_add=int(message.ticket_age_add),
            nonce=bytes(message.ticket_nonce),
            extensions=extensions,
        )


def new_session_ticket(
    ticket: bytes,
    *,
    lifetime: int = 7200,
    age_add: int = 1,
    nonce: bytes = b"\0",
    extensions: bytes = b"",
) -> bytes:
    """Return a NewSessionTicket message (RFC 9846 §4.7.1)."""
    body = b"".join(
        (
            lifetime.to_bytes(4, "big"),
            age_add.to_bytes(4, "big"),
            len(nonce).to_bytes(1, "big"),
            nonce,
            len(ticket).to_bytes(2, "big"),
            ticket,
            len(extensions).to_bytes(2, "big"),
            extensions,
        )
    )
    return b"\x04" + len(body).to_bytes(3, "big") + body


def extension(number: int, body: bytes) -> bytes:
    """Return one extension."""
    return number.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body


def serve(cell: Cell, peers: Peers, session: Any = None) -> TicketServer:
    """Shake hands, as a server that knows its tickets, with our client, which resumes ``session``."""
    settings = _settings(cell.tls_version, cell.suite)
    settings.ticketKeys = [_TICKET_KEY]
    listener = peers.listener()

    def shake_hands() -> tuple[socket.socket, Any]:
        sock, _ = listener.accept()
        peers.stack.enter_context(sock)
        sock.settimeout(PATIENCE)
        connection = TLSConnection(sock)
        _serve(connection, peers.pki, settings)
        return sock, connection

    with Task(shake_hands) as handshake:
        tls = peers.connect(
            listener.getsockname()[1], peers.pki.client(cell.tls_version), session=session
        )
    sock, connection = handshake.result()
    return TicketServer(ScriptedPeer(sock, connection, "server"), tls, connection, settings)
