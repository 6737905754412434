"""Handshakes of the ``ssl`` module whose secrets we take over: the peer is always a plain ``ssl`` object."""

from __future__ import annotations

import base64
import importlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest

from ktls.handshake.framing import ClientHello
from ktls.handshake.keylog import Expected, KeyLogTap, tap_for
from ktls.handshake.openssl import OpenSSLHandshake, _max_fragment
from ktls.protocol.enums import ContentType, Role
from ktls.protocol.errors import LocalProtocolError
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret, tls_exporter
from ktls.protocol.suites import suite_by_openssl_name
from ktls.record.aead import RecordProtection

from .helpers import (
    HOST,
    TLS12,
    TLS13,
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

VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])

SUITES_12 = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-CCM",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "DHE-RSA-AES128-GCM-SHA256",
    "DHE-RSA-AES256-GCM-SHA384",
    "DHE-RSA-CHACHA20-POLY1305",
    "DHE-RSA-AES128-CCM",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-CCM",
]
SUITES_13 = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_AES_128_CCM_SHA256",
]


@pytest.fixture(scope="session")
def dh_parameters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ffdhe2048 (RFC 7919 §A.1), computed from its definition."""
    scale = 2**2100
    e, term, k = 0, scale, 1
    while term:
        e, term, k = e + term, term // k, k + 1
    p = 2**2048 - 2**1984 + ((e * 2**1918 // scale) + 560316) * 2**64 - 1
    number = b"\x02\x82\x01\x01" + p.to_bytes(257, "big")
    der = b"\x30\x82\x01\x08" + number + b"\x02\x01\x02"  # DHParameter (PKCS #3)
    path = tmp_path_factory.mktemp("dh") / "ffdhe2048.pem"
    text = base64.encodebytes(der).decode()
    path.write_text(f"-----BEGIN DH PARAMETERS-----\n{text}-----END DH PARAMETERS-----\n")
    return path


@pytest.mark.parametrize("name", SUITES_12)
def test_every_suite_of_tls12(pki: Pki, dh_parameters: Path, name: str) -> None:
    client_context = pki.client(TLS12)
    server_context = pki.server(TLS12, rsa="ECDSA" not in name)
    for context in (client_context, server_context):
        context.set_ciphers(f"{name}:@SECLEVEL=0")
    server_context.load_dh_params(str(dh_parameters))

    client, peer = ours_client(client_context), their_server(server_context)
    run(client, peer)
    result = client.result()
    assert (result.version, result.cipher[0]) == ("TLSv1.2", name)
    check_takeover(result, peer)

    server, other = ours_server(server_context), their_client(client_context)
    run(other, server)
    assert isinstance(secrets_of(server.result()).tx, TrafficKeys)
    check_takeover(server.result(), other)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES_13)
def test_every_suite_of_tls13(name: str, tmp_path: Path) -> None:
    # The ssl module can't choose among these suites before Python 3.15; OpenSSL's own configuration can.
    config = tmp_path / "openssl.cnf"
    config.write_text(
        "openssl_conf = a\n[a]\nssl_conf = b\n[b]\nsystem_default = c\n[c]\n"
        f"Ciphersuites = {name}\n"
    )
    environment = {
        **os.environ,
        "OPENSSL_CONF": str(config),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.handshake.suite13"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout.split(), done.returncode) == ([name, name], 0), done.stderr


@VERSIONS
def test_result_of_a_client(pki: Pki, version: ssl.TLSVersion) -> None:
    client_context, server_context = pki.client(version), pki.server(version)
    client_context.set_alpn_protocols(["h2", "http/1.1"])
    server_context.set_alpn_protocols(["http/1.1"])
    client, peer = ours_client(client_context), their_server(server_context)
    with pytest.raises(ValueError, match="not complete"):
        client.result()
    run(client, peer)
    assert client.step()
    result, info = client.result(), client.result().info
    assert result.role is Role.CLIENT
    assert result.cipher == peer.sslobject.cipher()
    assert (info.server_name, info.selected_alpn_protocol) == (HOST, "http/1.1")
    assert (info.compression, info.session_reused) == (None, False)
    assert info.tls_unique == peer.sslobject.get_channel_binding("tls-unique")
    assert info.certificate is not None
    assert info.certificate_dict is not None
    assert info.certificate_dict["subjectAltName"] == (
        ("DNS", "localhost"),
        ("DNS", "other.example"),
    )
    if sys.version_info >= (3, 13):
        assert info.verified_chain[0] == info.unverified_chain[0] == info.certificate
    assert result.max_fragment == 16384
    assert client.bytes_needed() == 0
    check_takeover(result, peer)


@VERSIONS
def test_result_of_a_server_that_verifies_its_client(pki: Pki, version: ssl.TLSVersion) -> None:
    client_context, server_context = pki.client(version), pki.server(version)
    server_context.verify_mode = ssl.CERT_REQUIRED
    pki.ca.configure_trust(server_context)
    pki.rsa.configure_cert(client_context)
    server, peer = ours_server(server_context), their_client(client_context)
    run(peer, server)
    info = server.result().info
    assert info.server_name == HOST
    assert info.certificate_dict is not None
    assert info.certificate_dict["subjectAltName"] == (("DNS", "localhost"),)
    assert server.result().tickets is None
    check_takeover(server.result(), peer)


def test_a_client_with_a_certificate(pki: Pki) -> None:
    client_context, server_context = pki.client(), pki.server()
    server_context.verify_mode = ssl.CERT_REQUIRED
    pki.ca.configure_trust(server_context)
    pki.rsa.configure_cert(client_context)
    client, peer = ours_client(client_context), their_server(server_context)
    run(client, peer)
    check_takeover(client.result(), peer)


@VERSIONS
def test_ours_with_ours(pki: Pki, version: ssl.TLSVersion) -> None:
    client, server = ours_client(pki.client(version)), ours_server(pki.server(version))
    run(client, server, chunk=1)
    one, other = secrets_of(client.result()), secrets_of(server.result())
    assert (one.tx_keys.key, one.tx_keys.iv) == (other.rx_keys.key, other.rx_keys.iv)
    assert (one.rx_keys.key, one.rx_keys.iv) == (other.tx_keys.key, other.tx_keys.iv)
    if version is TLS13:
        assert isinstance(one.tx, TrafficSecret)
        assert one.tx_secret is one.tx
        assert one.exporter_secret is not None
        assert one.exporter_secret == other.exporter_secret
        tls_exporter(one.suite, one.exporter_secret, b"EXPORTER-Channel-Binding", b"", 32)
    else:
        assert (one.tx_secret, one.rx_secret, one.exporter_secret) == (None, None, None)


@pytest.mark.parametrize("role", ["client", "server"])
@VERSIONS
def test_hello_retry_request(pki: Pki, version: ssl.TLSVersion, role: str) -> None:
    client_context, server_context = pki.client(version), pki.server(version)
    server_context.set_ecdh_curve("secp521r1")
    if role == "client":
        client, peer = ours_client(client_context), their_server(server_context)
        run(client, peer)
        check_takeover(client.result(), peer)
    else:
        server, other = ours_server(server_context), their_client(client_context)
        run(other, server)
        check_takeover(server.result(), other)


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


def finish_over_read(party: OpenSSLHandshake, flight: bytes, extra: bytes, chunk: int) -> None:
    """Feed the flight that ends the handshake, and more, before the first step."""
    data = flight + extra
    for start in range(0, len(data), chunk):
        party.feed(data[start : start + chunk])
    assert party.step()
    assert party.result().leftover == extra


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


def check_takeover_after(party: OpenSSLHandshake, peer: StdlibPeer, received: int) -> None:
    """As ``check_takeover``, when the leftover has been dealt with: it had ``received`` records."""
    tx, rx = sender(party.result()), receiver(party.result())
    rx.sequence_number += received
    peer.feed(tx.seal(ContentType.APPLICATION_DATA, b"to peer"))
    assert peer.read() == b"to peer"
    assert open_all(rx, peer.write(b"from peer"))[-1] == (23, b"from peer")


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


# --- server names -------------------------------------------------------------------------------------------------


class UserObject(ssl.SSLObject):
    """A user's own class for ``sslobject_class``."""


@VERSIONS
@pytest.mark.parametrize("own_class", [False, True])
def test_a_callback_that_switches_the_context(
    pki: Pki, version: ssl.TLSVersion, own_class: bool
) -> None:
    first, second, client_context = pki.server(version), pki.server(version), pki.client(version)
    seen = []

    def switch(sslobject: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        seen.append((type(sslobject), name, sslobject.context is first))
        sslobject.context = second
        assert sslobject.context is second

    first.sni_callback = switch
    if own_class:
        first.sslobject_class = UserObject
    for _ in range(3):
        server, peer = ours_server(first), their_client(client_context)
        run(peer, server)
        check_takeover(server.result(), peer)
    classes = {kind for kind, _, _ in seen}
    assert len(classes) == 1  # not stacked
    assert (classes.pop().__mro__[2] is UserObject) is own_class
    assert [entry[1:] for entry in seen] == [(HOST, True)] * 3
    # Those who use the context without us are not disturbed.
    run(their_client(client_context), their_server(first))


def test_a_callback_that_does_not_switch(pki: Pki) -> None:
    context = pki.server()
    context.sni_callback = lambda *_: None
    server, peer = ours_server(context), their_client(pki.client())
    run(peer, server)
    check_takeover(server.result(), peer)


def test_a_callback_that_switches_to_nonsense(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)  # so does ssl report it

    def switch(sslobject: ssl.SSLObject, *_: object) -> None:
        sslobject.context = "nonsense"  # type: ignore[assignment]  # that is the mistake

    context = pki.server()
    context.sni_callback = switch
    with pytest.raises(ssl.SSLError):
        run(their_client(pki.client()), ours_server(context))
    assert len(errors) == 1


def test_a_callback_that_refuses(pki: Pki) -> None:
    context = pki.server()
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    server, peer = ours_server(context), their_client(pki.client())
    with pytest.raises(ssl.SSLError):
        run(peer, server)
    peer.feed(server.data_to_send())
    with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized"):
        peer.step()


# --- no secrets ---------------------------------------------------------------------------------------------------


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


# --- failures -----------------------------------------------------------------------------------------------------


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


# --- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "length", "limit", "expected"),
    [
        ("TLSv1.3", None, None, 16384),
        ("TLSv1.3", 512, None, 512),
        ("TLSv1.2", 4096, None, 4096),
        ("TLSv1.3", None, 16385, 16384),
        ("TLSv1.2", None, 16385, 16384),
        ("TLSv1.3", None, 1024, 1023),
        ("TLSv1.2", None, 1024, 1024),
        ("TLSv1.3", 1024, 1024, 1023),
        ("TLSv1.3", 512, 1024, 512),
    ],
)
def test_smaller_records_that_a_client_asks_for(
    version: str, length: int | None, limit: int | None, expected: int
) -> None:
    hello = ClientHello(random=bytes(32), max_fragment_length=length, record_size_limit=limit)
    assert _max_fragment(Role.SERVER, version, hello) == expected
    assert _max_fragment(Role.CLIENT, version, hello) == 16384
    assert _max_fragment(Role.SERVER, version, None) == 16384


@pytest.mark.parametrize(("version", "expected"), [((3, 4), 999), ((3, 3), 1000)])
def test_a_client_that_really_asks_for_smaller_records(
    pki: Pki, version: tuple[int, int], expected: int
) -> None:
    """ssl can't; tlslite-ng can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports asyncore
        tlslite = importlib.import_module("tlslite.api")
    settings = tlslite.HandshakeSettings()
    settings.minVersion = settings.maxVersion = version
    settings.record_size_limit = 1000
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        client = tlslite.TLSConnection(theirs)
        steps = client.handshakeClientCert(serverName=HOST, settings=settings, async_=True)
        server = ours_server(pki.server(rsa=True))
        while not server.step():
            ours.sendall(server.data_to_send())
            next(steps, None)
            server.feed(ours.recv(server.bytes_needed()))
        assert server.result().max_fragment == expected
        secrets_of(server.result())
        ours.sendall(server.data_to_send())
        for _ in steps:
            pass
        ours.sendall(sender(server.result()).seal(23, b"small"))
        assert client.read() == b"small"


@pytest.mark.slow
def test_threads_never_mix_up_their_secrets(pki: Pki) -> None:
    client_context, server_context = pki.client(), pki.server()
    errors: list[BaseException] = []

    def work(version: ssl.TLSVersion) -> None:
        try:
            for _ in range(50):
                client, server = ours_client(client_context), ours_server(server_context)
                run(client, server)
                text = os.urandom(16)
                record = sender(client.result()).seal(23, text)
                assert open_all(receiver(server.result()), record) == [(23, text)]
                record = sender(server.result()).seal(23, text)
                rx = receiver(client.result())
                rx.sequence_number = secrets_of(server.result()).tx_sequence_number
                assert open_all(rx, record) == [(23, text)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(TLS13,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_nothing_secret_is_printed(pki: Pki) -> None:
    client, server = ours_client(pki.client()), ours_server(pki.server())
    run(client, server)
    secrets = secrets_of(client.result())
    assert secrets.tx_secret is not None
    printed = repr(
        (client, client.result(), secrets, client.result().tickets, tap_for(pki.client()))
    )
    for secret in (secrets.tx_secret.secret, secrets.tx_keys.key, secrets.exporter_secret or b"-"):
        assert secret.hex() not in printed
        assert repr(secret)[2:-1] not in printed


def test_handshake_and_engine_are_no_reference_cycle(pki: Pki) -> None:
    context = pki.server()
    context.sni_callback = lambda *_: None
    server, peer = ours_server(context), their_client(pki.client())
    run(peer, server)
    gone = weakref.ref(server)
    del server
    assert gone() is None
