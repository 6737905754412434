"""``openssl s_client`` and ``s_server``: data, record sizes, tickets, key logs, ends."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

import ktls
from ktls.protocol.enums import AlertDescription

from .parties import ALPHABET, TLS12, TLS13, payload, read_all, same
from .peers import Link, Peers, Role, openssl_words

SIZE = 256 * 1024
ROLES = pytest.mark.parametrize("role", ["client", "server"])
VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
SUITES = {
    "TLS_AES_128_GCM_SHA256": TLS13,
    "TLS_AES_256_GCM_SHA384": TLS13,
    "TLS_CHACHA20_POLY1305_SHA256": TLS13,
    "ECDHE-ECDSA-AES128-GCM-SHA256": TLS12,
    "ECDHE-ECDSA-AES256-GCM-SHA384": TLS12,
    "ECDHE-ECDSA-CHACHA20-POLY1305": TLS12,
    "ECDHE-ECDSA-AES128-CCM": TLS12,
    "ECDHE-RSA-AES128-GCM-SHA256": TLS12,
    "ECDHE-RSA-AES256-GCM-SHA384": TLS12,
    "ECDHE-RSA-CHACHA20-POLY1305": TLS12,
    "AES128-GCM-SHA256": TLS12,
}
CCM_13 = "TLS_AES_128_CCM_SHA256"


def check_ends(link: Link, role: Role) -> None:
    """One side ends the connection with close_notify, the other answers with its own, and nobody has anything to complain about.

    ``s_client`` begins if its input ends; ``s_server`` can only answer.
    """
    if role == "server":
        link.program.end_input()
    else:
        link.tls.shutdown(socket.SHUT_WR)
    assert link.tls.recv(1) == b""
    link.tls.close()
    if role == "server":
        assert link.program.wait() == 0
    else:
        link.program.out.expect(b"DONE")
    assert b"error" not in bytes(link.program.err).lower()


# --- data ------------------------------------------------------------------------------------------------------


@ROLES
@pytest.mark.parametrize("suite", SUITES)
def test_data_in_both_directions(peers: Peers, role: Role, suite: str) -> None:
    link = peers.openssl(role, SUITES[suite], suite)
    link.exchange(SIZE)
    link.exchange(1)
    check_ends(link, role)


@pytest.mark.parametrize("suite", [CCM_13])
def test_suites_that_ssl_does_not_offer(suite: str, tmp_path: Path) -> None:
    """AES-CCM in TLS 1.3 needs a configuration of OpenSSL, and so a process of its own; it does the same in both roles."""
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = all\n[all]\nssl_conf = ssl\n[ssl]\nsystem_default = suites\n"
        f"[suites]\nCiphersuites = {suite}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.peers.suite13", suite, str(SIZE)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OPENSSL_CONF": str(configuration)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout.split(), done.returncode) == ([suite, suite], 0), done.stderr


@ROLES
@VERSIONS
def test_sendfile(peers: Peers, version: ssl.TLSVersion, role: Role, tmp_path: Path) -> None:
    link = peers.openssl(role, version)
    data = payload(SIZE + 4321)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        assert link.tls.sendfile(file) == len(data)
    link.sent(data)
    link.check_sent()
    link.exchange(1000)
    check_ends(link, role)


@ROLES
@VERSIONS
def test_recvfile(peers: Peers, version: ssl.TLSVersion, role: Role, tmp_path: Path) -> None:
    link = peers.openssl(role, version)
    data = payload(SIZE + 4321)
    path = tmp_path / "file"
    with path.open("wb") as file:
        link.program.type(data[: SIZE // 2])
        assert link.tls.recvfile(file, SIZE // 2) == SIZE // 2
        link.program.type(data[SIZE // 2 :])
        assert link.tls.recvfile(file, len(data) - SIZE // 2) == len(data) - SIZE // 2
    assert same(path.read_bytes(), data)
    check_ends(link, role)


# --- record sizes ----------------------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_client_that_takes_small_records_only(
    peers: Peers, version: ssl.TLSVersion, size: int, tmp_path: Path
) -> None:
    """max_fragment_length (RFC 6066 §4): ``s_client`` refuses records that are longer."""
    link = peers.openssl("server", version, None, "-maxfraglen", size)
    link.exchange(20_000)
    data = payload(50_001, seed=7)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        assert link.tls.sendfile(file) == len(data)
    link.sent(data)
    link.check_sent()
    assert link.tls.key_usage.tx.records >= 70_001 // size
    check_ends(link, "server")


@ROLES
@VERSIONS
@pytest.mark.parametrize("size", [512, 16384])
def test_peer_that_sends_small_records(
    peers: Peers, version: ssl.TLSVersion, role: Role, size: int
) -> None:
    link = peers.openssl(role, version, None, "-max_send_frag", size)
    link.exchange(40_000)
    check_ends(link, role)


@ROLES
@pytest.mark.parametrize("block", [2, 512, 4096])
def test_peer_that_pads_its_records(peers: Peers, role: Role, block: int) -> None:
    link = peers.openssl(role, TLS13, None, "-record_padding", block)
    link.exchange(40_000)
    check_ends(link, role)


# --- tickets ---------------------------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("tickets", [True, False], ids=["tickets", "no-tickets"])
def test_our_server_resumes(
    peers: Peers, version: ssl.TLSVersion, tickets: bool, tmp_path: Path
) -> None:
    context = peers.pki.server(version)
    if not tickets:  # sessions are kept by the server then
        context.options |= ssl.OP_NO_TICKET
    session = tmp_path / "session"
    first = peers.s_client(context, *openssl_words(version, None), "-sess_out", session)
    assert first.tls.session_reused is False
    first.exchange(1000)
    check_ends(first, "server")
    words = [*openssl_words(version, None), "-sess_in", session]
    again = peers.s_client(context, *words, brief=False)
    assert again.tls.session_reused is True
    again.program.out.expect(b"Reused, TLSv1")
    again.program.end_input()
    assert read_all(again.tls) == b""
    again.tls.close()
    assert again.program.wait() == 0


@VERSIONS
@pytest.mark.parametrize(
    "words", [(), ("-num_tickets", 4), ("-no_ticket",)], ids=["tickets", "4-tickets", "no-tickets"]
)
def test_our_client_resumes(
    peers: Peers, version: ssl.TLSVersion, words: tuple[object, ...]
) -> None:
    server = peers.s_server(*openssl_words(version, None), *words)
    context = peers.pki.client(version)
    session = None
    for number in range(3):
        tls = peers.connect(server.port, context, session=session)
        assert tls.session_reused is (number > 0)
        link = Link(tls, server)
        text = payload(100, seed=number)
        link.type(text)  # behind the tickets
        tls.sendall(text)
        server.out.expect(b"[%s]{100}" % ALPHABET)
        assert (b"Reused session-id" in bytes(server.out)) is (number > 0)
        session = tls.session
        assert session is not None
        tls.close()
        server.out.expect(b"DONE")
    assert bytes(server.out).count(b"Reused session-id") == 2


def test_our_client_without_tickets_does_not_resume(peers: Peers) -> None:
    server = peers.s_server("-tls1_3", "-num_tickets", 0)
    link = Link(peers.connect(server.port, peers.pki.client()), server)
    link.exchange(100)
    session = link.tls.session
    assert session is None or not session.has_ticket


@VERSIONS
def test_our_client_resumes_by_itself(peers: Peers, version: ssl.TLSVersion) -> None:
    """The session cache: by name and port, without being asked."""
    server = peers.s_server(*openssl_words(version, None))
    context = peers.pki.client(version)
    context.session_cache = ktls.SessionCache()
    for number in range(3):
        tls = peers.connect(server.port, context)
        assert tls.session_reused is (number > 0)
        Link(tls, server).type(b"!")
        tls.close()
        server.out.expect(b"DONE")


# --- ends ------------------------------------------------------------------------------------------------------


@ROLES
@VERSIONS
def test_we_close(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    """Without our close_notify it would speak of an unexpected eof."""
    link = peers.openssl(role, version)
    link.exchange(10)
    link.send(payload(SIZE, seed=5))
    link.tls.close()
    link.check_sent()
    if role == "server":
        assert link.program.wait() == 0
    else:
        link.program.out.expect(b"DONE")
    assert b"error" not in bytes(link.program.err).lower()


@ROLES
@VERSIONS
def test_unwrap(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    """close_notify crosses close_notify (``s_client``), or is answered (``s_server``)."""
    link = peers.openssl(role, version)
    if role == "server":
        link.program.end_input()
    peers.stack.enter_context(link.tls.unwrap())
    assert b"error" not in bytes(link.program.err).lower()


@ROLES
@VERSIONS
def test_program_ends_without_a_word(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    """FIN or RST, but no close_notify: never a clean end. The command q of ``s_server`` does that, too."""
    link = peers.openssl(role, version)
    link.exchange(10)
    if role == "client":
        link.program.type(b"q\n")
    else:
        link.program.kill()
    with pytest.raises((ktls.TruncatedError, ConnectionResetError)):
        link.tls.recv(1)


# --- renegotiation (TLS 1.2) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "command"), [("server", b"R\n"), ("client", b"r\n"), ("client", b"R\n")]
)
def test_program_wants_to_renegotiate(peers: Peers, role: Role, command: bytes) -> None:
    """We decline with a warning and would go on; OpenSSL will not, and says so."""
    link = peers.openssl(role, TLS12)
    link.exchange(100)
    link.program.type(command)
    for _ in range(2):
        with pytest.raises(ktls.AlertReceived) as caught:
            link.tls.recv(1)
        assert caught.value.description == AlertDescription.HANDSHAKE_FAILURE
    link.program.err.expect(b"no renegotiation")
