"""What may be asked about a connection: answers of ``ssl.SSLSocket``, sessions, channel bindings, key logs; and no secret anywhere else."""

from __future__ import annotations

import gc
import logging
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

import ktls

from ..support import HOST, TLS12, TLS13, Authority, EchoServer
from .helpers import Case, Link, Net, matrix

if TYPE_CHECKING:
    from pathlib import Path


def chat(link: Link) -> None:
    """A byte each way: whatever came behind the handshake has then been seen at both ends."""
    link.ours.sendall(b"x")
    assert link.theirs.recv(1) == b"x"
    link.theirs.sendall(b"y")
    assert link.ours.recv(1) == b"y"


def test_answers_are_those_of_ssl(net: Net, role: Case, authority: Authority) -> None:
    link = net.link(role)
    ours, theirs = link.ours, link.theirs
    assert ours.version() == theirs.version()
    assert ours.cipher() == theirs.cipher()
    assert ours.compression() is None
    assert ours.selected_alpn_protocol() is None
    assert ours.selected_npn_protocol() is None  # type: ignore[func-returns-value]  # None is what is tested
    assert ours.server_side == (role.role == "server")
    assert ours.server_hostname == HOST  # on a server by SNI
    assert ours.session_reused is False
    if role.role == "client":
        der = ours.getpeercert(True)
        assert der == ours.getpeercert(binary_form=True)
        assert der is not None
        assert ssl.DER_cert_to_PEM_cert(der).strip() in authority.server_chain.read_text()
        certificate = ours.getpeercert()
        assert certificate is not None
        assert ("DNS", HOST) in certificate["subjectAltName"]
    else:
        assert ours.getpeercert() is None
        assert ours.getpeercert(True) is None
    assert isinstance(ours.get_verified_chain(), list)
    assert isinstance(ours.get_unverified_chain(), list)
    for name in ("group", "client_sigalg", "server_sigalg"):  # since Python 3.15
        assert getattr(ours, name)() == getattr(theirs, name, lambda: None)()


def test_certificate_is_the_same_as_from_ssl(net: Net, authority: Authority) -> None:
    case = Case(role="server", peer="stdlib")
    reference = net.link(case).theirs.getpeercert()
    assert net.link(Case(role="client")).ours.getpeercert() == reference


def test_certificate_that_was_not_verified(net: Net) -> None:
    context = net.context("ktls", "client")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    ours = net.link(context=context).ours
    assert ours.getpeercert() == {}
    assert ours.getpeercert(True)


@pytest.mark.parametrize("peer", ["stdlib", "ktls"])
def test_client_certificates(net: Net, authority: Authority, version: Case, peer: Any) -> None:
    server = authority.ktls_server(version.version)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(authority.ca_file)
    their_context = (authority.client if peer == "stdlib" else authority.ktls_client)(
        version.version
    )
    their_context.load_cert_chain(authority.client_chain)
    link = net.link(
        Case(version=version.version, role="server", peer=peer),
        context=server,
        their_context=their_context,
    )
    certificate = link.ours.getpeercert()
    assert certificate is not None
    assert ("email", "client@example.org") in certificate["subjectAltName"]
    chat(link)


def test_missing_client_certificate(net: Net, authority: Authority) -> None:
    server = authority.ktls_server(TLS13)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(authority.ca_file)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        net.link(Case(role="server"), context=server)


def test_alpn(net: Net, case: Case) -> None:
    ours: Any = net.context("ktls", case.role, case.version)
    their_role: Any = "server" if case.role == "client" else "client"
    theirs = net.context(case.peer, their_role, case.version)
    ours.set_alpn_protocols(["http/1.1", "h2"])
    theirs.set_alpn_protocols(["h2"])
    link = net.link(case)
    assert link.ours.selected_alpn_protocol() == "h2"
    assert link.theirs.selected_alpn_protocol() == "h2"


def test_sni_callback_that_switches_the_context(net: Net, authority: Authority) -> None:
    first, second = authority.ktls_server(TLS13), authority.ktls_server(TLS13)
    second.set_alpn_protocols(["second"])
    seen = []

    def switch(sslobject: Any, name: str, context: ssl.SSLContext) -> None:
        seen.append((name, context))
        sslobject.context = second

    first.sni_callback = switch
    client = authority.client(TLS13)
    link = net.link(Case(role="server"), context=first, their_context=client)
    assert seen == [(HOST, first)]
    assert link.ours.server_hostname == HOST
    assert link.ours.offload.tx == Case().tx_layer  # its secrets were found all the same
    chat(link)


# --- channel bindings ------------------------------------------------------------------------------------------------


def test_tls_unique(net: Net, role: Case) -> None:
    link = net.link(role)
    binding = link.ours.get_channel_binding("tls-unique")
    assert binding == link.theirs.get_channel_binding("tls-unique")
    if role.version is TLS12:
        assert binding


@pytest.mark.parametrize("case", matrix(roles=("client",), peers=("ktls",)), ids=str)
def test_tls_exporter(net: Net, case: Case) -> None:
    link = net.link(case)
    binding = link.ours.get_channel_binding("tls-exporter")
    assert binding == link.theirs.get_channel_binding("tls-exporter")
    if case.version is TLS12:
        assert binding is None
    else:
        assert binding is not None
        assert len(binding) == 32
        assert binding != net.link(case).ours.get_channel_binding("tls-exporter")


def test_unknown_channel_binding(net: Net) -> None:
    with pytest.raises(ValueError, match="tls-nonsense channel binding type not implemented"):
        net.link().ours.get_channel_binding("tls-nonsense")


# --- sessions --------------------------------------------------------------------------------------------------------


def test_session_is_resumed_when_given(net: Net, layer: Case) -> None:
    context = net.context("ktls", "client", layer.version)
    context.session_cache = None
    first = net.link(layer)
    chat(first)
    session = first.ours.session
    assert isinstance(session, ssl.SSLSession)
    assert session.has_ticket
    first.ours.close()
    second = net.link(layer, session=session)
    assert second.ours.session_reused is True
    assert second.theirs.session_reused
    chat(second)
    third = net.link(layer)
    assert third.ours.session_reused is False


def test_session_can_be_set_before_the_handshake(net: Net) -> None:
    context = net.context("ktls", "client")
    context.session_cache = None
    first = net.link()
    chat(first)
    client, server = net.tcp()
    theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
    ours = net.keep(
        context.wrap_socket(client, do_handshake_on_connect=False, server_hostname=HOST)
    )
    ours.session = first.ours.session
    # Python 3.15.0 crashes when its own objects are asked for the group now.
    assert (ours.group(), ours.client_sigalg(), ours.server_sigalg()) == (None, None, None)
    ours.do_handshake()
    net.keep(theirs.result())
    assert ours.session_reused is True
    with pytest.raises(ValueError, match="after handshake"):
        ours.session = first.ours.session


def test_session_comes_with_a_ticket_in_tls13(net: Net) -> None:
    case = Case(version=TLS13)
    link = net.link(case)
    chat(link)
    assert link.ours.session is not None
    assert link.ours.session.has_ticket


def test_tickets_after_key_updates(net: Net) -> None:
    """The engine, which makes the sessions, has followed the keys."""
    case = Case(peer="ktls")
    context = net.context("ktls", "client")
    context.session_cache = None
    link = net.link(case)
    if case.may_refresh:
        for _ in range(3):
            link.ours.refresh_traffic_keys(request_peer=True)
            chat(link)
    else:
        chat(link)
    session = link.ours.session
    assert session is not None
    assert net.link(case, session=session).ours.session_reused is True


def test_servers_have_no_session(net: Net, version: Case) -> None:
    link = net.link(Case(version=version.version, role="server"))
    chat(link)
    assert link.ours.session is None


def test_sessions_can_be_done_without(net: Net) -> None:
    context = net.context("ktls", "client")
    context.keep_session = False
    link = net.link(context=context)
    chat(link)
    assert link.ours.session is None


def test_session_cache_resumes_by_host_and_port(
    net: Net, layer: Case, authority: Authority, echo_server: Any
) -> None:
    context = authority.ktls_client(layer.version)
    context.offload = layer.offload
    server: EchoServer = echo_server(authority.server(layer.version))
    other: EchoServer = echo_server(authority.server(layer.version))

    def visit(server: EchoServer) -> bool | None:
        with (
            socket.create_connection(server.address) as sock,
            context.wrap_socket(sock, server_hostname=HOST) as tls,
        ):
            tls.sendall(b"x")
            assert tls.recv(1) == b"x"
            return tls.session_reused

    assert visit(server) is False
    assert visit(server) is True
    assert visit(server) is True
    assert visit(other) is False  # another port is another server
    context.session_cache = None
    assert visit(server) is False


def test_session_of_another_context_is_refused_as_by_ssl(net: Net, authority: Authority) -> None:
    link = net.link()
    chat(link)
    with pytest.raises(ValueError, match="different SSLContext"):
        net.link(context=authority.ktls_client(), session=link.ours.session)


# --- key logs, and nothing else --------------------------------------------------------------------------------------

LINE = re.compile(r"^([A-Z_0-9]+) ([0-9a-f]{64}) ([0-9a-f]{64,96})$")


def logged(path: Path) -> dict[str, str]:
    """Secrets by label."""
    found = {}
    for line in path.read_text().splitlines():
        match = LINE.match(line)
        assert match is not None or line.startswith("#"), line
        if match is not None:
            found[match[1]] = match[3]
    return found


def test_key_log(net: Net, role: Case, authority: Authority, tmp_path: Path) -> None:
    context = (authority.ktls_client if role.role == "client" else authority.ktls_server)(
        role.version
    )
    path = tmp_path / "keys"
    context.keylog_filename = path
    assert context.keylog_filename == str(path)
    link = net.link(role, context=context)
    chat(link)
    secrets = logged(path)
    if role.version is TLS12:
        assert set(secrets) == {"CLIENT_RANDOM"}
        return
    assert {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0", "EXPORTER_SECRET"} <= set(secrets)
    assert {"CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_HANDSHAKE_TRAFFIC_SECRET"} <= set(secrets)
    if role.may_refresh:
        link.ours.refresh_traffic_keys()
        ours, theirs = ("CLIENT", "SERVER") if role.role == "client" else ("SERVER", "CLIENT")
        secrets = logged(path)
        assert f"{ours}_TRAFFIC_SECRET_1" in secrets
        assert f"{theirs}_TRAFFIC_SECRET_1" not in secrets
        assert secrets[f"{ours}_TRAFFIC_SECRET_1"] != secrets[f"{ours}_TRAFFIC_SECRET_0"]
        link.ours.refresh_traffic_keys(request_peer=True)
        chat(link)
        assert f"{theirs}_TRAFFIC_SECRET_1" in logged(path)


def test_key_log_of_the_environment(
    net: Net, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(path))
    context = ktls.create_default_context(cafile=authority.ca_file)
    chat(net.link(context=context))
    assert "CLIENT_TRAFFIC_SECRET_0" in logged(path)


def test_both_ends_log_the_same(net: Net, authority: Authority, tmp_path: Path) -> None:
    client, server = authority.ktls_client(TLS13), authority.ktls_server(TLS13)
    client.keylog_filename = str(tmp_path / "client")
    server.keylog_filename = str(tmp_path / "server")
    case = Case(peer="ktls")
    link = net.link(case, context=client, their_context=server)
    if case.may_refresh:
        link.ours.refresh_traffic_keys(request_peer=True)
    chat(link)
    ours, theirs = logged(tmp_path / "client"), logged(tmp_path / "server")
    assert {label: theirs[label] for label in ours if label in theirs} == {
        label: ours[label] for label in ours if label in theirs
    }
    if case.may_refresh:
        assert "CLIENT_TRAFFIC_SECRET_1" in set(ours) & set(theirs)
        assert "SERVER_TRAFFIC_SECRET_1" in set(ours) & set(theirs)


def test_no_secret_is_in_a_repr_or_a_log(
    net: Net,
    layer: Case,
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    context = authority.ktls_client(layer.version)
    path = tmp_path / "keys"
    context.keylog_filename = str(path)
    link = net.link(layer, context=context)
    chat(link)
    if layer.may_refresh:
        link.ours.refresh_traffic_keys(request_peer=True)
        chat(link)
    secrets = [bytes.fromhex(secret) for secret in logged(path).values()]
    assert secrets
    texts = [caplog.text, *capfd.readouterr(), str(link.ours), repr(link.ours)]
    texts.extend(
        repr(thing)
        for thing in gc.get_objects()
        # Some classes of others have something else than a string there.
        if str(type(thing).__module__).startswith("ktls")
    )
    texts.extend(repr(value) for value in reachable(link.ours))
    for text in texts:
        for secret in secrets:
            assert secret.hex() not in text.lower()
            assert repr(secret)[2:20] not in text


def reachable(root: Any) -> list[Any]:
    """Objects of this package below ``root``."""
    seen: dict[int, Any] = {}
    todo = [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        todo.extend(
            value
            for value in gc.get_referents(thing)
            if type(value).__module__.startswith("ktls") and not isinstance(value, type)
        )
    return list(seen.values())


def test_repr(net: Net, layer: Case) -> None:
    ours = net.link(layer).ours
    text = repr(ours)
    assert text.startswith(f"<ktls.KTLSSocket fd={ours.fileno()} TLSv1.")
    assert layer.tx_layer in text
    ours.close()
    assert "fd=-1" in repr(ours)
    assert "no handshake yet" not in repr(ours)
