"""Connections that give us no keys: the handshake engine goes on protecting them, and everything but keys works."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

import ktls
from ktls.handshake.keylog import KeyLogTap

from ..support import HOST, TLS12, TLS13, Authority
from .helpers import PATIENCE, Case, Link, Net, pattern, read_all, read_exactly

if TYPE_CHECKING:
    from pathlib import Path

SUITES = ["ECDHE-RSA-AES128-SHA256", "AES128-SHA"]


def cbc_link(net: Net, authority: Authority, suite: str, role: Any, **arguments: Any) -> Link:
    """A connection with a CBC suite of TLS 1.2."""
    ours: Any
    theirs: Any
    if role == "client":
        ours = authority.ktls_client(TLS12)
        theirs = authority.server(TLS12, chain=authority.rsa_chain)
    else:
        ours = authority.ktls_server(TLS12, chain=authority.rsa_chain)
        theirs = authority.client(TLS12)
    for context in (ours, theirs):
        context.set_ciphers(f"{suite}:@SECLEVEL=0")
    case = Case(version=TLS12, role=role)
    return net.link(case, context=ours, their_context=theirs, **arguments)


@pytest.fixture(params=["client", "server"])
def role(request: pytest.FixtureRequest) -> str:
    role: str = request.param
    return role


@pytest.fixture(params=["cbc", "no-key-log"])
def link(
    request: pytest.FixtureRequest,
    net: Net,
    authority: Authority,
    role: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Link:
    """A connection that stays with its engine, for either reason."""
    if request.param == "cbc":
        return cbc_link(net, authority, SUITES[0], role, suppress_ragged_eofs=False)
    monkeypatch.setattr(
        KeyLogTap, "unavailable", property(lambda self: "somebody took the key log away")
    )
    return net.link(Case(version=TLS13, role=role), suppress_ragged_eofs=False)


@pytest.mark.parametrize("suite", SUITES)
def test_suites(net: Net, authority: Authority, role: str, suite: str) -> None:
    link = cbc_link(net, authority, suite, role)
    cipher = link.ours.cipher()
    assert cipher is not None
    assert cipher[0] == suite
    offload = link.ours.offload
    assert (offload.tx, offload.rx) == ("engine", "engine")
    assert offload.reason is not None
    assert suite in offload.reason


def test_reason_without_a_key_log(net: Net, role: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        KeyLogTap, "unavailable", property(lambda self: "somebody took the key log away")
    )
    ours = net.link(Case(role=role)).ours
    assert ours.offload == ktls.Offload("engine", "engine", "somebody took the key log away")


def test_data(link: Link, net: Net) -> None:
    data = pattern(300_000)
    receiving = net.spawn(read_exactly, link.theirs, len(data))
    link.ours.sendall(data)
    assert receiving.result() == data
    sending = net.spawn(link.theirs.sendall, data)
    assert read_exactly(link.ours, len(data)) == data
    sending.result()
    assert link.ours.recv(0) == b""
    link.theirs.sendall(b"lines\nof text\n")
    assert link.ours.makefile("rb").readline() == b"lines\n"


def test_full_duplex(link: Link, net: Net) -> None:
    data = pattern(300_000)
    reading = net.spawn(read_exactly, link.ours, len(data))
    writing = net.spawn(link.ours.sendall, data)
    assert read_exactly(link.theirs, len(data)) == data
    link.theirs.sendall(data)
    assert reading.result() == data
    writing.result()


def test_files(link: Link, net: Net, tmp_path: Path) -> None:
    data = pattern(200_000)
    (tmp_path / "file").write_bytes(data)
    receiving = net.spawn(read_exactly, link.theirs, len(data))
    with open(tmp_path / "file", "rb") as file:
        assert link.ours.sendfile(file) == len(data)
    assert receiving.result() == data
    sending = net.spawn(link.theirs.sendall, data)
    with open(tmp_path / "received", "wb") as file:
        assert link.ours.recvfile(file, len(data)) == len(data)
    sending.result()
    assert (tmp_path / "received").read_bytes() == data


def test_timeouts(link: Link) -> None:
    link.ours.settimeout(0.05)
    with pytest.raises(TimeoutError, match="The read operation timed out"):
        link.ours.recv(1)
    link.ours.settimeout(0.0)
    with pytest.raises(ssl.SSLWantReadError):
        link.ours.recv(1)


def test_close(link: Link) -> None:
    link.ours.sendall(b"last words")
    link.ours.close()
    assert read_all(link.theirs) == b"last words"


def test_close_loses_nothing(link: Link, net: Net) -> None:
    data = pattern(400_000)
    receiving = net.spawn(read_all, link.theirs)
    link.ours.sendall(data)
    link.ours.close()
    assert receiving.result() == data


def test_peer_closes(link: Link, net: Net) -> None:
    def end() -> None:
        link.theirs.sendall(b"last words")
        net.keep(link.theirs.unwrap())

    ending = net.spawn(end)
    assert read_all(link.ours) == b"last words"
    link.ours.close()
    ending.result()


def test_half_close(link: Link) -> None:
    link.ours.sendall(b"question")
    link.ours.shutdown(socket.SHUT_WR)
    with pytest.raises(ktls.LocalProtocolError, match="the sending side is closed"):
        link.ours.send(b"more")
    assert read_all(link.theirs) == b"question"
    if link.ours.version() == "TLSv1.3":
        link.theirs.sendall(b"answer")
        assert link.ours.recv(100) == b"answer"


def test_half_close_with_an_answer_under_way(link: Link) -> None:
    """What the peer sent before it saw our close_notify is not lost."""
    link.theirs.sendall(b"under way")
    link.ours.shutdown(socket.SHUT_WR)
    assert link.ours.recv(100) == b"under way"


def test_truncation(link: Link) -> None:
    link.theirs.sendall(b"half a mess")
    socket.socket.shutdown(link.theirs, socket.SHUT_WR)
    assert link.ours.recv(100) == b"half a mess"
    with pytest.raises(ktls.TruncatedError):
        link.ours.recv(100)


def test_reset(link: Link) -> None:
    link.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    socket.socket(fileno=link.theirs.detach()).close()
    with pytest.raises(ConnectionResetError):
        link.ours.recv(1)
    link.ours.close()


def test_what_takes_keys_is_refused(link: Link) -> None:
    with pytest.raises(ktls.LocalProtocolError) as caught:
        link.ours.refresh_traffic_keys()
    assert caught.value.recoverable
    usage = link.ours.key_usage
    assert usage.tx.records == usage.rx.records == 0
    assert usage.tx.limit is None
    link.ours.sendall(b"goes on")
    assert link.theirs.recv(100) == b"goes on"


def test_kernel_demanded(net: Net, authority: Authority) -> None:
    context = authority.ktls_client(TLS12)
    context.set_ciphers(f"{SUITES[0]}:@SECLEVEL=0")
    context.offload = "kernel"
    client, server = net.tcp()
    server.settimeout(PATIENCE)
    their = authority.server(TLS12, chain=authority.rsa_chain)
    their.set_ciphers(f"{SUITES[0]}:@SECLEVEL=0")
    theirs = net.spawn(their.wrap_socket, server, server_side=True)
    with pytest.raises(ktls.OffloadError):
        context.wrap_socket(client, server_hostname=HOST)
    net.keep(theirs.result())


def test_facts(link: Link, role: str) -> None:
    assert link.ours.version() == link.theirs.version()
    assert link.ours.server_hostname == HOST
    if role == "client":
        assert link.ours.getpeercert()
    assert "engine" in repr(link.ours)
