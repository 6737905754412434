"""``gnutls-cli`` and ``gnutls-serv --echo``, which share no code with OpenSSL.

Their ways: ``gnutls-cli`` writes each byte with a system call of its own (slow in the lab: little data), ``gnutls-serv`` echoes whole lines, and GnuTLS takes
no more than eight KeyUpdates a second.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

import ktls
from ktls import KeyLimitError, LocalProtocolError

from .parties import IS_LAB, TLS12, TLS13, Task, can_rekey, payload, read_exactly, same
from .peers import Link, Peers
from .test_openssl_updates import generations, read_log

SIZE = 12_000 if IS_LAB else 100_000
VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
SUITES = pytest.mark.parametrize(
    ("version", "cipher"),
    [
        pytest.param(version, cipher, id=f"{name}-{cipher}")
        for version, name in ((TLS13, "1.3"), (TLS12, "1.2"))
        for cipher in ("AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305", "AES-128-CCM")
        if (name, cipher) != ("1.3", "AES-128-CCM")  # ``ssl`` does not offer it, see test_openssl
    ],
)


def priority(version: ssl.TLSVersion, cipher: str | None = None, extra: str = "") -> str:
    """A priority string for one version and one cipher."""
    number = "1.3" if version == TLS13 else "1.2"
    ciphers = f":-CIPHER-ALL:+{cipher}" if cipher is not None else ""
    return f"--priority=NORMAL:-VERS-ALL:+VERS-TLS{number}{ciphers}{extra}"


def contexts(peers: Peers, version: ssl.TLSVersion) -> tuple[ktls.SSLContext, ktls.SSLContext]:
    """Our server's and our client's, with every suite of TLS 1.2."""
    ciphers = "ALL" if version == TLS12 else None
    return peers.pki.server(version, ciphers), peers.pki.client(version, ciphers)


def echo(tls: ktls.KTLSSocket, size: int, seed: int = 0) -> None:
    """Have ``gnutls-serv`` send a line back."""
    line = payload(size, seed) + b"\n"
    tls.sendall(line)
    assert same(read_exactly(tls, len(line)), line)


def check_quiet(link: Link) -> None:
    for output in (link.program.out, link.program.err):
        assert b"error" not in bytes(output).lower()


# --- data ------------------------------------------------------------------------------------------------------


@SUITES
def test_our_server(peers: Peers, version: ssl.TLSVersion, cipher: str) -> None:
    server, _ = contexts(peers, version)
    link = peers.gnutls_cli(server, priority(version, cipher))
    link.exchange(SIZE)
    link.exchange(1)
    link.program.end_input()
    assert link.tls.recv(1) == b""
    link.tls.close()
    assert link.program.wait() == 0
    check_quiet(link)


@SUITES
def test_our_client(peers: Peers, version: ssl.TLSVersion, cipher: str) -> None:
    _, client = contexts(peers, version)
    program = peers.gnutls_serv(priority(version, cipher))
    link = Link(peers.connect(program.port, client), program)
    for size in (1, 16_383, 16_384, SIZE):
        echo(link.tls, size)
    peers.stack.enter_context(link.tls.unwrap())
    check_quiet(link)


@VERSIONS
def test_we_close(peers: Peers, version: ssl.TLSVersion) -> None:
    server, _ = contexts(peers, version)
    link = peers.gnutls_cli(server, priority(version))
    link.send(payload(5000))
    link.tls.close()
    link.check_sent()
    link.program.out.expect(b"Peer has closed the GnuTLS connection")
    assert link.program.wait() == 0


@VERSIONS
@pytest.mark.parametrize("size", [512, 1000, 4096])
def test_client_that_takes_small_records_only(
    peers: Peers, version: ssl.TLSVersion, size: int
) -> None:
    """record_size_limit (RFC 8449): longer records are refused. What it sends itself must fit, the rest would be lost."""
    server, _ = contexts(peers, version)
    link = peers.gnutls_cli(server, priority(version), "--recordsize", size)
    for _ in range(3):
        link.send(payload(SIZE // 3))
        link.type(payload(500))
    link.check_sent()
    link.program.end_input()
    assert link.tls.recv(1) == b""
    check_quiet(link)


def command(link: Link, name: str, answer: bytes) -> None:
    """Give ``gnutls-cli`` a command, which has to begin a line, and wait for what it says."""
    link.type(b"\n")
    link.program.type(f"^{name}^\n".encode())
    link.program.out.expect(answer)


# --- KeyUpdate -------------------------------------------------------------------------------------------------


def test_client_updates(peers: Peers) -> None:
    link = peers.gnutls_cli(peers.pki.server(TLS13))
    for number in range(1, 4):
        link.exchange(1000)
        command(link, "rekey1", b"Rekey was completed")
        link.exchange(1000)
        assert generations(link) == (0, number)
    check_quiet(link)


def test_client_asks_us_to_update(peers: Peers) -> None:
    link = peers.gnutls_cli(peers.pki.server(TLS13))
    link.exchange(1000)
    for number in range(1, 4):
        command(link, "rekey", b"Rekey was completed")
        link.type(payload(10))
        if not can_rekey():
            with pytest.raises(KeyLimitError):
                link.tls.send(b"!")
            link.program.out.expect(b"Peer has closed the GnuTLS connection")
            break
        link.exchange(1000)
        assert generations(link) == (number, number)
    check_quiet(link)


def test_we_update_as_a_server(peers: Peers) -> None:
    link = peers.gnutls_cli(peers.pki.server(TLS13))
    link.exchange(1000)
    for number in range(1, 4):
        if not can_rekey():
            with pytest.raises(LocalProtocolError):
                link.tls.refresh_traffic_keys()
            break
        link.tls.refresh_traffic_keys(request_peer=number == 3)
        link.take_turns(1000)
        assert generations(link) == (number, int(number == 3))
    link.exchange(1000)
    check_quiet(link)


def test_we_update_as_a_client(peers: Peers) -> None:
    program = peers.gnutls_serv(priority(TLS13))
    link = Link(peers.connect(program.port, peers.pki.client(TLS13)), program)
    echo(link.tls, 1000)
    for number in range(1, 4):
        if not can_rekey():
            with pytest.raises(LocalProtocolError):
                link.tls.refresh_traffic_keys()
            break
        link.tls.refresh_traffic_keys(request_peer=number == 3)
        echo(link.tls, 1000)
        assert generations(link) == (number, int(number == 3))
    echo(link.tls, 1000)
    peers.stack.enter_context(link.tls.unwrap())
    check_quiet(link)


def test_updates_cross(peers: Peers) -> None:
    """Its request and our update. Not our request: GnuTLS (3.8.9) refuses one while its own is unanswered (illegal_parameter)."""
    link = peers.gnutls_cli(peers.pki.server(TLS13))
    link.exchange(100)
    command(link, "rekey", b"Rekey was completed")
    if not can_rekey():
        with pytest.raises(LocalProtocolError):
            link.tls.refresh_traffic_keys()
        return
    link.tls.refresh_traffic_keys()
    link.take_turns(100)
    link.exchange(100)
    assert generations(link) == (2, 1)
    check_quiet(link)


# --- tickets ---------------------------------------------------------------------------------------------------


@VERSIONS
def test_our_server_resumes(peers: Peers, version: ssl.TLSVersion) -> None:
    """``--resume`` makes two connections."""
    server, _ = contexts(peers, version)
    listener = peers.listener()
    words = [priority(version), "--resume", "--waitresumption"]
    program = peers.start_gnutls_cli(listener, *words)
    first = peers.accept(listener, server)
    assert first.session_reused is False
    assert first.recv(1) == b""
    first.close()
    link = Link(peers.accept(listener, server), program)
    assert link.tls.session_reused is True
    program.out.expect(b"This is a resumed session")
    link.exchange(100)


@VERSIONS
@pytest.mark.parametrize("words", [(), ("--noticket",)], ids=["tickets", "no-tickets"])
def test_our_client_resumes(peers: Peers, version: ssl.TLSVersion, words: tuple[str, ...]) -> None:
    """Without tickets TLS 1.2 has session IDs; in TLS 1.3 there is nothing to resume."""
    _, client = contexts(peers, version)
    program = peers.gnutls_serv(priority(version), *words)
    resumes = version == TLS12 or not words
    session = None
    for number in range(3):
        tls = peers.connect(program.port, client, session=session)
        assert tls.session_reused is (resumes and number > 0)
        echo(tls, 100)
        session = tls.session
        if not resumes:
            assert session is None or not session.has_ticket
            session = None
        peers.stack.enter_context(tls.unwrap())
        tls.close()
    for _ in range(2 * resumes):
        program.out.expect(b"This is a resumed session")
    assert bytes(program.out).count(b"This is a resumed session") == 2 * resumes


# --- the rest --------------------------------------------------------------------------------------------------


@VERSIONS
def test_key_logs_are_equal(peers: Peers, version: ssl.TLSVersion, tmp_path: Path) -> None:
    """GnuTLS logs the first secrets only."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    server, _ = contexts(peers, version)
    server.keylog_filename = str(ours)
    link = peers.gnutls_cli(server, priority(version), env={"SSLKEYLOGFILE": str(theirs)})
    link.exchange(100)
    assert sorted(read_log(ours)) == sorted(read_log(theirs))


def test_client_wants_to_renegotiate(peers: Peers) -> None:
    """TLS 1.2: we decline. ``gnutls-cli`` begins again at once, for ever, so it matters that our answers end."""
    server, _ = contexts(peers, TLS12)
    link = peers.gnutls_cli(server, priority(TLS12))
    link.exchange(100)
    link.type(b"\n")
    link.program.type(b"^renegotiate^\n")
    with Task(lambda: link.tls.recv(1)) as reading:
        for _ in range(16):
            link.program.out.expect(rb"Received alert \[100\]: No renegotiation is allowed")
        link.program.kill()
    with pytest.raises((ktls.TruncatedError, ConnectionResetError)):
        reading.result()


def test_server_wants_to_renegotiate(peers: Peers) -> None:
    """TLS 1.2: we decline, and ``gnutls-serv`` gives up, without close_notify."""
    _, client = contexts(peers, TLS12)
    program = peers.gnutls_serv(priority(TLS12))
    tls = peers.connect(program.port, client)
    echo(tls, 100)
    tls.sendall(b"**REHANDSHAKE**\n")
    said = b"Successfully executed command\n"
    assert read_exactly(tls, len(said)) == said
    with pytest.raises((ktls.TruncatedError, ConnectionResetError)):
        tls.recv(1)
    program.err.expect(b"A TLS warning alert has been received")
