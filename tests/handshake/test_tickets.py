"""Tickets given back to the engine: the server is a plain ``ssl`` object, and resumes or does not."""

from __future__ import annotations

import gc
import ssl
import sys
import threading
import weakref

import pytest

from ktls.handshake.openssl import OpenSSLHandshake
from ktls.handshake.tickets import TicketRelay
from ktls.protocol.enums import AlertDescription
from ktls.protocol.errors import RemoteProtocolError
from ktls.record.aead import RecordProtection

from .helpers import (
    HOST,
    TLS12,
    TLS13,
    Pki,
    StdlibPeer,
    open_all,
    ours_client,
    receiver,
    records_of,
    run,
    sender,
    their_server,
)


class Pair:
    """A client context of ours and a server context of theirs."""

    def __init__(self, pki: Pki, version: ssl.TLSVersion = TLS13) -> None:
        self.client_context, self.server_context = pki.client(version), pki.server(version)

    def connect(self, session: ssl.SSLSession | None = None) -> tuple[OpenSSLHandshake, StdlibPeer]:
        client = ours_client(self.client_context, session)
        server = their_server(self.server_context)
        run(client, server)
        assert server.sslobject.session_reused is client.result().info.session_reused
        return client, server

    def resumes(self, session: ssl.SSLSession | None) -> bool:
        client, _ = self.connect(session)
        return client.result().info.session_reused


def relay_of(client: OpenSSLHandshake) -> TicketRelay:
    relay = client.result().tickets
    assert relay is not None
    return relay


def tickets_of(client: OpenSSLHandshake, server: StdlibPeer) -> list[bytes]:
    return [
        message
        for kind, message in open_all(receiver(client.result()), server.late + server.write(b"x"))
        if kind == 22
    ]


@pytest.fixture
def pair(pki: Pki) -> Pair:
    return Pair(pki)


@pytest.mark.parametrize("ratchets", [0, 1, 3])
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["1", "2", "both"])
def test_tickets_resume(pair: Pair, which: slice, ratchets: int) -> None:
    client, server = pair.connect()
    relay = relay_of(client)
    assert (relay.has_ticket, relay.tickets) == (False, 0)
    tickets = tickets_of(client, server)[which]
    for _ in range(ratchets):
        relay.ratchet()
    for message in tickets:
        relay.feed(message)
        relay.ratchet()
    assert (relay.has_ticket, relay.tickets) == (True, len(tickets))
    assert relay.generation == ratchets + len(tickets)
    session = relay.session
    assert session is relay.session
    relay.close()
    assert relay.closed
    assert relay.session is session
    assert pair.resumes(session)


def test_without_relay_nothing_resumes(pair: Pair) -> None:
    client, _ = pair.connect()
    session = relay_of(client).session
    assert session is None or not session.has_ticket
    assert not pair.resumes(session)


def test_a_large_ticket_is_split_over_records(pair: Pair) -> None:
    # 20000 bytes that only look like a ticket: the engine takes them apart and finds nothing wrong.
    body = bytes(8) + b"\x01\0" + (20000).to_bytes(2, "big") + bytes(20000) + b"\0\0"
    client, _ = pair.connect()
    relay = relay_of(client)
    relay.feed(b"\x04" + len(body).to_bytes(3, "big") + body)
    assert relay.has_ticket
    assert relay.session is not None
    assert relay.session.has_ticket


def test_a_ticket_too_large_for_a_session_is_no_error(pair: Pair) -> None:
    """What the engine takes, Python 3.11 may fail to copy (``ValueError``). A peer must not raise that in whoever reads; the session before it still resumes."""
    client, server = pair.connect()
    relay = relay_of(client)
    for ticket in tickets_of(client, server):
        relay.feed(ticket)
    sessions: list[ssl.SSLSession] = []
    relay.subscribe(sessions.append)
    body = bytes(8) + b"\0" + b"\xff\xff" + bytes(0xFFFF) + b"\0\0"
    relay.feed(b"\x04" + len(body).to_bytes(3, "big") + body)
    assert not relay.closed
    if sys.version_info < (3, 12):
        assert sessions[-1] is sessions[0] is relay.session
        assert pair.resumes(relay.session)


def test_the_engine_gets_rid_of_its_first_secrets(pair: Pair) -> None:
    """After a ratchet the engine takes nothing under the old key, and sends nothing under the old key."""
    client, server = pair.connect()
    relay, ticket = relay_of(client), tickets_of(client, server)[0]
    engine, incoming, outgoing = relay._sslobject, relay._incoming, relay._outgoing
    old_rx, old_tx = relay._rx, sender(client.result())
    assert engine is not None
    assert old_rx is not None
    relay.ratchet()
    assert outgoing.pending == 0
    engine.write(b"never sent")
    (record,) = records_of(outgoing.read())
    with pytest.raises(RemoteProtocolError, match="can't be opened"):
        open_all(old_tx, record)
    new_tx = relay._tx_secret
    assert new_tx is not None
    protection = RecordProtection(new_tx.suite, new_tx.keys())
    assert open_all(protection, record) == [(23, b"never sent")]
    incoming.write(old_rx.seal(22, ticket))
    with pytest.raises(ssl.SSLError, match=r"(?i)bad record mac|record layer failure"):
        engine.read(1)


@pytest.mark.parametrize("ratchets", [0, 2])
def test_a_malformed_ticket_is_refused_with_the_alert_of_the_engine(
    pair: Pair, ratchets: int
) -> None:
    client, _ = pair.connect()
    relay = relay_of(client)
    for _ in range(ratchets):
        relay.ratchet()
    with pytest.raises(RemoteProtocolError) as caught:
        relay.feed(b"\x04\0\0\x03abc")
    assert caught.value.alert is AlertDescription.DECODE_ERROR
    assert relay.closed
    relay.feed(b"anything")  # no longer of interest
    relay.ratchet()


def test_the_alert_is_the_engines_own(pair: Pair) -> None:
    client, _ = pair.connect()
    with pytest.raises(RemoteProtocolError) as caught:
        relay_of(client).feed(b"\x01\0\0\0")
    assert caught.value.alert is AlertDescription.UNEXPECTED_MESSAGE


def test_a_subscriber_gets_every_session(pair: Pair) -> None:
    client, server = pair.connect()
    relay, sessions = relay_of(client), list[ssl.SSLSession]()
    relay.subscribe(sessions.append)
    assert sessions == []
    for message in tickets_of(client, server):
        relay.feed(message)
    assert len(sessions) == 2
    assert all(pair.resumes(session) for session in sessions)


def test_sessions_are_asked_for_while_tickets_come(pair: Pair) -> None:
    client, server = pair.connect()
    relay, ticket = relay_of(client), tickets_of(client, server)[0]
    seen: list[object] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            seen.append(relay.session is not None)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(200):
        relay.feed(ticket)
        relay.ratchet()
    done.set()
    thread.join()
    assert all(seen)
    assert "200 tickets" in repr(relay)
    assert pair.resumes(relay.session)


def test_tls12_has_its_session_from_the_handshake(pki: Pki) -> None:
    pair = Pair(pki, TLS12)
    client, _ = pair.connect()
    relay, sessions = relay_of(client), list[ssl.SSLSession]()
    assert relay.has_ticket
    relay.subscribe(sessions.append)
    assert sessions == [relay.session]
    relay.ratchet()
    assert relay.generation == 0
    with pytest.raises(ssl.SSLError, match="no messages"):
        relay.feed(b"\x04\0\0\0")
    relay.close()
    assert pair.resumes(sessions[0])


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_sessions_survive_a_relay_that_is_just_dropped(pki: Pki, version: ssl.TLSVersion) -> None:
    pair = Pair(pki, version)
    client, server = pair.connect()
    relay = relay_of(client)
    if version is TLS13:
        relay.feed(tickets_of(client, server)[0])
    session = relay.session
    gone = weakref.ref(relay._sslobject)
    del client, relay
    gc.collect()
    assert gone() is None
    assert pair.resumes(session)


def test_no_relay_where_no_session_is_wanted(pair: Pair) -> None:
    client = OpenSSLHandshake(
        pair.client_context, server_side=False, server_hostname=HOST, keep_session=False
    )
    run(client, their_server(pair.server_context))
    assert client.result().tickets is None
    assert client.result().engine_object is None
    assert client.result().secrets is not None
