"""Handshakes that fail, and those that give no secrets: the engine goes on with the latter itself."""

from __future__ import annotations

import os
import ssl

import pytest

from ktls.handshake.keylog import Expected, KeyLogTap
from ktls.handshake.openssl import OpenSSLHandshake
from ktls.protocol.errors import LocalProtocolError

from .helpers import (
    TLS12,
    TLS13,
    VERSIONS,
    Pki,
    StdlibPeer,
    check_takeover,
    ours_client,
    ours_server,
    run,
    their_client,
    their_server,
)

# --- no secrets ------------------------------------------------------------------------------------------------------


def check_engine_goes_on(party: OpenSSLHandshake, peer: StdlibPeer, reason: str) -> None:
    """The engine must have the connection, whole: what was read beyond, and nothing sent outside it."""
    result = party.result()
    assert (result.secrets, result.tickets) == (None, None)
    assert result.no_secrets_reason is not None
    assert reason in result.no_secrets_reason
    engine = result.engine_object
    assert engine is not None
    engine.sslobject.write(b"to peer")
    peer.feed(party.data_to_send() + engine.outgoing.read())
    assert peer.read() == b"to peer"
    engine.incoming.write(result.leftover + peer.late + peer.write(b"from peer"))
    assert engine.sslobject.read(100) == b"from peer"


@pytest.mark.parametrize(
    "name",
    ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES128-CCM8", "ECDHE-ECDSA-ARIA128-GCM-SHA256"],
)
@pytest.mark.parametrize("role", ["client", "server"])
def test_suites_that_stay_with_the_engine(pki: Pki, name: str, role: str) -> None:
    client_context, server_context = pki.client(TLS12), pki.server(TLS12)
    for context in (client_context, server_context):
        context.set_ciphers(f"{name}:@SECLEVEL=0")
    if role == "client":
        client, peer = ours_client(client_context), their_server(server_context)
        run(client, peer)
        check_engine_goes_on(client, peer, name)
    else:
        server, other = ours_server(server_context), their_client(client_context)
        run(other, server)
        check_engine_goes_on(server, other, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_stay_with_the_engine(pki: Pki) -> None:
    client_context, server_context = pki.client(), pki.server()
    for context in (client_context, server_context):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
    client, peer = ours_client(client_context), their_server(server_context)
    run(client, peer)
    check_engine_goes_on(client, peer, "TLSv1.1 is too old")


def test_post_handshake_auth_stays_with_the_engine(pki: Pki) -> None:
    context = pki.client()
    context.post_handshake_auth = True
    client, peer = ours_client(context), their_server(pki.server())
    run(client, peer)
    check_engine_goes_on(client, peer, "post-handshake authentication")
    client, peer = ours_client(context), their_server(pki.server(TLS12))
    run(client, peer)
    check_takeover(client.result(), peer)


@VERSIONS
@pytest.mark.parametrize("role", ["client", "server"])
def test_no_proc(
    pki: Pki, version: ssl.TLSVersion, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktls.handshake.keylog._FD_PATH", "/nowhere/fd/{}")
    client_context, server_context = pki.client(version), pki.server(version)
    if role == "client":
        client, peer = ours_client(client_context), their_server(server_context)
        run(client, peer)
        check_engine_goes_on(client, peer, "the key log can't be opened")
    else:
        server, other = ours_server(server_context), their_client(client_context)
        run(other, server)
        check_engine_goes_on(server, other, "the key log can't be opened")


@VERSIONS
def test_wrong_secrets_are_found_out(
    pki: Pki, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = KeyLogTap.collect

    def forged(tap: KeyLogTap, expected: Expected) -> dict[str, bytes]:
        return {label: bytes(len(secret)) for label, secret in collect(tap, expected).items()}

    monkeypatch.setattr(KeyLogTap, "collect", forged)
    server, peer = ours_server(pki.server(version)), their_client(pki.client(version))
    run(peer, server)
    check_engine_goes_on(server, peer, "do not fit the connection")


def test_a_key_log_that_can_not_be_read(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    client, peer = ours_client(pki.client()), their_server(pki.server())
    client.step()
    monkeypatch.setattr(os, "preadv", fail)
    run(client, peer)
    check_engine_goes_on(client, peer, "can't be read: Input/output error")


@pytest.mark.parametrize(
    ("log", "reason"),
    [({}, "no CLIENT_TRAFFIC_SECRET_0"), ({"CLIENT_TRAFFIC_SECRET_0": b"short"}, "wrong length")],
)
def test_missing_or_odd_lines(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, log: dict[str, bytes], reason: str
) -> None:
    monkeypatch.setattr(KeyLogTap, "collect", lambda *_: log)
    client, peer = ours_client(pki.client(TLS13)), their_server(pki.server(TLS13))
    run(client, peer)
    check_engine_goes_on(client, peer, reason)


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_certificate_that_does_not_verify(pki: Pki) -> None:
    client, peer = ours_client(ssl.create_default_context()), their_server(pki.server())
    with pytest.raises(ssl.SSLCertVerificationError):
        run(client, peer)
    peer.feed(client.data_to_send())
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
        peer.step()
    with pytest.raises(LocalProtocolError):
        client.step()


def test_a_client_that_does_not_speak_tls(pki: Pki) -> None:
    server = ours_server(pki.server())
    server.feed(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ssl.SSLError, match=r"(?i)http request"):
        server.step()


def test_a_record_that_is_too_long(pki: Pki) -> None:
    server = ours_server(pki.server())
    server.feed(b"\x16\x03\x01\xff\xff" + bytes(6))
    with pytest.raises(ssl.SSLError):
        server.step()


@pytest.mark.parametrize("cut", [0, 3, 5, 100])
@pytest.mark.parametrize("role", ["client", "server"])
def test_tcp_ends_inside_the_handshake(pki: Pki, role: str, cut: int) -> None:
    ours: OpenSSLHandshake
    if role == "client":
        ours = ours_client(pki.client())
        server = their_server(pki.server())
        ours.step()
        server.feed(ours.data_to_send())
        server.step()
        ours.feed(server.data_to_send()[:cut])
    else:
        ours, client = ours_server(pki.server()), their_client(pki.client())
        client.step()
        ours.feed(client.data_to_send()[:cut])
    assert not ours.step()
    ours.eof()
    with pytest.raises(ssl.SSLEOFError):
        ours.step()


def test_tcp_ends_inside_nonsense(pki: Pki) -> None:
    server = ours_server(pki.server())
    server.feed(b"\x16\x09\x09\x00\x10abc")
    assert not server.step()
    server.eof()
    with pytest.raises(ssl.SSLEOFError):
        server.step()
    assert "failed" in repr(server)


def test_eof_after_the_handshake_is_not_our_business(pki: Pki) -> None:
    client, peer = ours_client(pki.client()), their_server(pki.server())
    run(client, peer)
    client.eof()
    assert client.step()
    with pytest.raises(ValueError, match="complete"):
        client.feed(b"data")
    client.close()
    assert client.result().secrets is not None


def test_a_closed_handshake(pki: Pki) -> None:
    client = ours_client(pki.client())
    client.step()
    client.close()
    with pytest.raises(LocalProtocolError):
        client.step()


def test_the_constructor_passes_on_what_ssl_refuses(pki: Pki) -> None:
    with pytest.raises(ValueError, match="server_hostname"):
        OpenSSLHandshake(pki.client(), server_side=False, server_hostname="")
