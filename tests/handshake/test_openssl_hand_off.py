"""Where the handshake's engine leaves off, records go on: with the next number and nonce, and with whatever had been read already."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.enums import ContentType
from ktls.protocol.key_schedule import TrafficSecret
from ktls.protocol.suites import suite_by_openssl_name
from ktls.record.aead import RecordProtection

from .helpers import (
    TLS12,
    TLS13,
    VERSIONS,
    Pki,
    StdlibPeer,
    check_takeover,
    open_all,
    ours_client,
    ours_server,
    receiver,
    records_of,
    run,
    secrets_of,
    sender,
    their_client,
    their_server,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ktls.handshake.openssl import OpenSSLHandshake


def finish_over_read(party: OpenSSLHandshake, flight: bytes, extra: bytes, chunk: int) -> None:
    """Feed the flight that ends the handshake, and more, before the first step."""
    data = flight + extra
    for start in range(0, len(data), chunk):
        party.feed(data[start : start + chunk])
    assert party.step()
    assert party.result().leftover == extra


def check_takeover_after(party: OpenSSLHandshake, peer: StdlibPeer, received: int) -> None:
    """As ``check_takeover``, when the leftover has been dealt with: it had ``received`` records."""
    tx, rx = sender(party.result()), receiver(party.result())
    rx.sequence_number += received
    peer.feed(tx.seal(ContentType.APPLICATION_DATA, b"to peer"))
    assert peer.read() == b"to peer"
    assert open_all(rx, peer.write(b"from peer"))[-1] == (23, b"from peer")


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("tickets", [0, 1, 2, 5])
def test_tickets_of_a_server_are_counted(pki: Pki, tickets: int, resumed: bool) -> None:
    client_context, server_context = pki.client(TLS13), pki.server(TLS13)
    session = None
    if resumed:
        first, peer = ours_server(server_context), their_client(client_context)
        run(peer, first)
        peer.read()
        session = peer.sslobject.session
    server_context.num_tickets = tickets
    server, peer = ours_server(server_context), their_client(client_context, session)
    run(peer, server)
    expected = min(tickets, 1) if resumed else tickets
    assert server.result().info.session_reused is resumed
    assert secrets_of(server.result()).tx_sequence_number == expected
    check_takeover(server.result(), peer)


def test_tickets_that_are_larger_than_a_record(pki: Pki) -> None:
    """The ticket carries the client's certificate."""
    client_context, server_context = pki.client(TLS13), pki.server(TLS13)
    server_context.verify_mode = ssl.CERT_REQUIRED
    pki.ca.configure_trust(server_context)
    names = [f"{number:04}.{'x' * 50}.example" for number in range(300)]
    pki.ca.issue_cert(*names).configure_cert(client_context)
    server, peer = ours_server(server_context), their_client(client_context)
    run(peer, server)
    assert secrets_of(server.result()).tx_sequence_number > 2
    check_takeover(server.result(), peer)


@VERSIONS
@pytest.mark.parametrize("stateless", [True, False])
def test_sessions_of_a_server_survive_the_hand_off(
    pki: Pki, version: ssl.TLSVersion, stateless: bool
) -> None:
    client_context, server_context = pki.client(version), pki.server(version)
    if not stateless:
        server_context.options |= ssl.OP_NO_TICKET
    session = None
    for connection in range(3):
        server, peer = ours_server(server_context), their_client(client_context, session)
        run(peer, server)
        assert server.result().info.session_reused is (connection > 0)
        check_takeover(server.result(), peer)
        peer.read()
        session = peer.sslobject.session
        # Without the goodbye OpenSSL forgets the session of our side when the peer object goes.
        with pytest.raises(ssl.SSLWantReadError):
            peer.sslobject.unwrap()


@pytest.mark.parametrize("chunk", [1, 7, 65536])
def test_over_read_of_a_server13(pki: Pki, chunk: int) -> None:
    server, peer = ours_server(pki.server(TLS13)), their_client(pki.client(TLS13))
    peer.step()
    server.feed(peer.data_to_send())
    assert not server.step()
    peer.feed(server.data_to_send())
    assert peer.step()
    flight = peer.data_to_send()
    extra = peer.write(b"request") + peer.write(b"and more")
    finish_over_read(server, flight, extra[:-5], chunk)
    opened = open_all(receiver(server.result()), server.result().leftover + extra[-5:])
    assert opened == [(23, b"request"), (23, b"and more")]
    peer.feed(server.data_to_send())
    peer.read()
    check_takeover_after(server, peer, 2)


@pytest.mark.parametrize("chunk", [1, 7, 65536])
def test_over_read_of_a_client13(pki: Pki, chunk: int, tmp_path: Path) -> None:
    """Data right after the server's Finished, before ours (RFC 9846 §2): ssl never sends it, so it is made by hand."""
    server_context = pki.server(TLS13)
    server_context.keylog_filename = str(tmp_path / "keys")
    client, peer = ours_client(pki.client(TLS13)), their_server(server_context)
    client.step()
    peer.feed(client.data_to_send())
    peer.step()
    lines = [line.split() for line in (tmp_path / "keys").read_text().splitlines()]
    logged = {line[0]: bytes.fromhex(line[2]) for line in lines if len(line) == 3}
    suite = suite_by_openssl_name("TLS_AES_256_GCM_SHA384")
    assert suite is not None
    secret = TrafficSecret(suite, logged["SERVER_TRAFFIC_SECRET_0"])
    extra = RecordProtection(suite, secret.keys()).seal(ContentType.APPLICATION_DATA, b"early")
    finish_over_read(client, peer.data_to_send(), extra + b"\x17\x03", chunk)
    assert open_all(receiver(client.result()), extra) == [(23, b"early")]


@pytest.mark.parametrize("chunk", [1, 7, 65536])
def test_over_read_of_a_client12(pki: Pki, chunk: int) -> None:
    client, peer = ours_client(pki.client(TLS12)), their_server(pki.server(TLS12))
    for _ in range(2):
        assert not client.step()
        peer.feed(client.data_to_send())
        done = peer.step()
        flight = peer.data_to_send()
        if not done:
            client.feed(flight)
    finish_over_read(client, flight, peer.write(b"hello") + b"\x17\x03\x03", chunk)
    opened = open_all(receiver(client.result()), client.result().leftover[:-3])
    assert opened == [(23, b"hello")]
    check_takeover_after(client, peer, 1)


@pytest.mark.parametrize("chunk", [1, 7, 65536])
def test_over_read_of_a_server12(pki: Pki, chunk: int) -> None:
    """In a resumed handshake of TLS 1.2 the client's Finished is the last."""
    client_context, server_context = pki.client(TLS12), pki.server(TLS12)
    first = their_client(client_context)
    run(first, their_server(server_context))
    peer = their_client(client_context, first.sslobject.session)
    server = ours_server(server_context)
    peer.step()
    server.feed(peer.data_to_send())
    assert not server.step()
    peer.feed(server.data_to_send())
    assert peer.step()
    finish_over_read(server, peer.data_to_send(), peer.write(b"hello"), chunk)
    assert server.result().info.session_reused
    assert open_all(receiver(server.result()), server.result().leftover) == [(23, b"hello")]
    check_takeover_after(server, peer, 1)


@VERSIONS
def test_a_front_end_that_reads_what_is_needed_has_no_leftover(
    pki: Pki, version: ssl.TLSVersion
) -> None:
    client, peer = ours_client(pki.client(version)), their_server(pki.server(version))
    wire = b""
    while not client.step():
        peer.feed(client.data_to_send())
        if not peer.sslobject.version() or peer.sslobject.cipher() is None or not wire:
            peer.step()
            wire += peer.data_to_send()
        need = client.bytes_needed()
        assert need > 0
        client.feed(wire[:need])
        wire = wire[need:]
    assert client.result().leftover == b""
    peer.feed(client.data_to_send())
    peer.step()
    check_takeover(client.result(), peer, sent=wire)


def test_explicit_nonces_of_tls12_go_on_from_finished(pki: Pki) -> None:
    client_context, server_context = pki.client(TLS12), pki.server(TLS12)
    client_context.set_ciphers("ECDHE+AESGCM")
    client, peer = ours_client(client_context), their_server(server_context)
    sent = b""
    while not client.step():
        out = client.data_to_send()
        sent += out
        peer.feed(out)
        peer.step()
        client.feed(peer.data_to_send())
    finished = records_of(sent)[-1]
    used = int.from_bytes(finished[5:13], "big")
    assert secrets_of(client.result()).tx_keys.explicit_nonce == (used + 1) % 2**64
    record = sender(client.result()).seal(ContentType.APPLICATION_DATA, b"")
    assert int.from_bytes(record[5:13], "big") == (used + 1) % 2**64
