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
from ktls.handshake.keylog import tap_for
from ktls.handshake.openssl import _max_fragment
from ktls.protocol.enums import Role
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret, tls_exporter

from .helpers import (
    HOST,
    TLS12,
    TLS13,
    VERSIONS,
    Pki,
    check_takeover,
    open_all,
    ours_client,
    ours_server,
    receiver,
    run,
    secrets_of,
    sender,
    their_client,
    their_server,
)

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


# --- server names ----------------------------------------------------------------------------------------------------


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


# --- the rest --------------------------------------------------------------------------------------------------------


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
