"""From a TCP socket to a TLS connection, and every way in which that fails: as with ``ssl``, and with nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import ssl
from contextlib import suppress
from typing import Any

import pytest

import ktls

from ..support import HOST, TLS12, TLS13, Authority, EchoServer
from .helpers import PATIENCE, Case, Net, descriptors


def wrap(net: Net, context: ssl.SSLContext, sock: socket.socket, **arguments: Any) -> Any:
    """Wrap as a client of HOST; gone at the end."""
    arguments.setdefault("server_hostname", HOST)
    return net.keep(ktls.wrap_socket(sock, context, **arguments))


# --- ways that lead there --------------------------------------------------------------------------------------------


def test_every_public_name_of_ssl_socket_is_there() -> None:
    missing = {
        name
        for name in dir(ssl.SSLSocket)
        if not name.startswith("_") and not hasattr(ktls.KTLSSocket, name)
    }
    # Both need an engine that is gone after the hand-off.
    assert missing == {"shared_ciphers", "verify_client_post_handshake"}


def test_plain_context_is_enough(net: Net, authority: Authority) -> None:
    client, server = net.tcp()
    server_side = net.spawn(ktls.wrap_socket, server, authority.server(), server_side=True)
    ours = wrap(net, authority.client(), client)
    theirs = net.keep(server_side.result())
    assert type(ours) is type(theirs) is ktls.KTLSSocket
    theirs.sendall(b"hello")
    assert ours.recv(100) == b"hello"


def test_wrapped_socket_is_detached(net: Net) -> None:
    client, server = net.tcp()
    fd = client.fileno()
    theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
    ours = wrap(net, net.context("ktls", "client"), client)
    assert client.fileno() == -1
    assert ours.fileno() == fd
    assert ours.family == socket.AF_INET
    assert ours.getpeername() == theirs.result().getsockname()
    net.keep(theirs.result())


def test_unix_sockets(net: Net, role: Case) -> None:
    """No kernel TLS on them, and no host and port for the session cache; still they work."""
    mine, their = (net.keep(sock) for sock in socket.socketpair())
    their_role: Any = "server" if role.role == "client" else "client"
    theirs = net.spawn(
        net.context("stdlib", their_role, role.version).wrap_socket,
        their,
        server_side=their_role == "server",
        server_hostname=HOST if their_role == "client" else None,
    )
    ours = net.context("ktls", role.role, role.version).wrap_socket(
        mine,
        server_side=role.role == "server",
        server_hostname=HOST if role.role == "client" else None,
    )
    net.keep(ours)
    peer = net.keep(theirs.result())
    assert ours.offload.tx == ours.offload.rx == "userspace"
    assert ours.offload.reason
    ours.sendall(b"over a file system")
    assert peer.recv(100) == b"over a file system"


def test_handshake_put_off_until_data(net: Net, role: Case) -> None:
    link_args: dict[str, Any] = {"do_handshake_on_connect": False}
    client, server = net.tcp()
    mine, their = (client, server) if role.role == "client" else (server, client)
    their_role: Any = "server" if role.role == "client" else "client"
    if role.role == "client":
        link_args["server_hostname"] = HOST
    ours = net.context("ktls", role.role, role.version).wrap_socket(
        mine, server_side=role.role == "server", **link_args
    )
    net.keep(ours)
    assert ours.version() is None
    assert ours.cipher() is None
    assert ours.selected_alpn_protocol() is None
    assert ours.session is None
    assert ours.session_reused is None
    assert ours.get_channel_binding() is None
    assert ours.pending() == 0
    assert "no handshake yet" in repr(ours)
    for call in (ours.getpeercert, lambda: ours.offload, lambda: ours.key_usage, ours.unwrap):
        with pytest.raises(ValueError, match="handshake not done yet"):
            call()
    theirs = net.spawn(
        net.context("stdlib", their_role, role.version).wrap_socket,
        their,
        server_side=their_role == "server",
        server_hostname=HOST if their_role == "client" else None,
    )
    ours.sendall(b"hello")
    assert net.keep(theirs.result()).recv(100) == b"hello"


def test_connect(net: Net, stdlib_server: ssl.SSLContext, echo_server: Any) -> None:
    server: EchoServer = echo_server(stdlib_server)
    ours = wrap(net, net.context("ktls", "client"), socket.socket())
    with pytest.raises(OSError) as caught:
        ours.do_handshake()
    assert caught.value.errno == errno.ENOTCONN
    ours.connect(server.address)
    assert ours.version() == "TLSv1.3"
    ours.sendall(b"echo")
    assert ours.recv(100) == b"echo"
    for connect in (ours.connect, ours.connect_ex):
        with pytest.raises(ValueError, match="attempt to connect already-connected"):
            connect(server.address)
    ours.close()


def test_connect_ex(net: Net, stdlib_server: ssl.SSLContext, echo_server: Any) -> None:
    server: EchoServer = echo_server(stdlib_server)
    ours = wrap(net, net.context("ktls", "client"), socket.socket())
    assert ours.connect_ex(server.address) == 0
    assert ours.version() == "TLSv1.3"
    ours.close()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = unused.getsockname()
        refused = wrap(net, net.context("ktls", "client"), socket.socket())
        assert refused.connect_ex(nobody) == errno.ECONNREFUSED
        with pytest.raises(ConnectionRefusedError):
            refused.connect(nobody)


def test_connect_without_waiting(net: Net, stdlib_server: ssl.SSLContext, echo_server: Any) -> None:
    """The connection is made after ``connect`` has returned; the kernel can still have it."""
    server: EchoServer = echo_server(stdlib_server)
    sock = socket.socket()
    sock.setblocking(False)
    ours = wrap(net, net.context("ktls", "client"), sock, do_handshake_on_connect=False)
    assert ours.connect_ex(server.address) == errno.EINPROGRESS
    assert select.select([], [ours], [], PATIENCE)[1]
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    ours.setblocking(True)
    ours.do_handshake()
    assert ours.offload.tx == Case().tx_layer
    assert ours.offload.rx == Case().rx_layer
    ours.sendall(b"echo")
    assert ours.recv(100) == b"echo"
    ours.close()


def test_connect_in_server_mode_is_refused(net: Net) -> None:
    ours = net.context("ktls", "server").wrap_socket(socket.socket(), server_side=True)
    net.keep(ours)
    for connect in (ours.connect, ours.connect_ex):
        with pytest.raises(ValueError, match="can't connect in server-side mode"):
            connect(("127.0.0.1", 1))


@pytest.mark.parametrize("handshake", [True, False], ids=["at-once", "put-off"])
def test_listening_socket(net: Net, handshake: bool) -> None:
    listener = net.context("ktls", "server").wrap_socket(
        socket.create_server(("127.0.0.1", 0)),
        server_side=True,
        do_handshake_on_connect=handshake,
        suppress_ragged_eofs=False,
    )
    net.keep(listener)
    listener.settimeout(PATIENCE)
    for _ in range(2):
        connecting = net.spawn(socket.create_connection, listener.getsockname())
        talking = net.spawn(
            lambda connecting: net.context("stdlib", "client").wrap_socket(
                connecting.result(), server_hostname=HOST
            ),
            connecting,
        )
        accepted, address = listener.accept()
        net.keep(accepted)
        assert type(accepted) is ktls.KTLSSocket
        assert accepted.server_side
        assert accepted.context is net.context("ktls", "server")
        assert (accepted.version() is None) is not handshake
        accepted.settimeout(PATIENCE)
        accepted.sendall(b"welcome")
        peer = net.keep(talking.result())
        assert address == peer.getsockname()
        assert peer.recv(100) == b"welcome"
        socket.socket.shutdown(peer, socket.SHUT_WR)
        with pytest.raises(ktls.TruncatedError):
            accepted.recv(1)


def test_listening_socket_goes_on_after_a_failed_handshake(net: Net) -> None:
    listener = net.context("ktls", "server").wrap_socket(
        socket.create_server(("127.0.0.1", 0)), server_side=True
    )
    net.keep(listener)
    gc.collect()
    before = descriptors()
    with socket.create_connection(listener.getsockname()) as rude:
        rude.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ssl.SSLError):
            listener.accept()
        rude.settimeout(PATIENCE)
        with suppress(ConnectionResetError):
            rude.recv(100)
    assert descriptors() - before == set()
    connecting = net.spawn(socket.create_connection, listener.getsockname())
    talking = net.spawn(
        lambda: net.context("stdlib", "client").wrap_socket(
            connecting.result(), server_hostname=HOST
        )
    )
    net.keep(listener.accept()[0])
    net.keep(talking.result())


def test_ipv6(net: Net) -> None:
    try:
        listener = net.keep(socket.create_server(("::1", 0), family=socket.AF_INET6))
    except OSError:
        # Not a skip: without IPv6 there is nothing that could go wrong with it.
        return
    client = socket.create_connection(listener.getsockname()[:2])
    server, _ = listener.accept()
    theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
    ours = wrap(net, net.context("ktls", "client"), client)
    net.keep(theirs.result()).sendall(b"six")
    assert ours.recv(100) == b"six"
    assert ours.offload.tx == Case().tx_layer


# --- ways that do not ------------------------------------------------------------------------------------------------


def fails(net: Net, client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> Any:
    """Shake hands in vain, as a client; return what was raised."""
    client, server = net.tcp()
    theirs = net.spawn(server_context.wrap_socket, server, server_side=True)
    fd = client.fileno()
    inode = os.fstat(fd).st_ino
    with pytest.raises(OSError) as caught:
        ktls.wrap_socket(client, client_context, server_hostname=HOST)
    with suppress(OSError):
        assert os.fstat(fd).st_ino != inode, "the socket is still open"
    assert theirs.exception() is not None
    return caught.value


def test_untrusted_certificate(net: Net, authority: Authority) -> None:
    error = fails(net, ktls.SSLContext(), authority.server())
    assert isinstance(error, ssl.SSLCertVerificationError)
    assert "unable to get local issuer certificate" in str(error)
    assert error.verify_code == 20


def test_wrong_hostname(net: Net, authority: Authority) -> None:
    client, server = net.tcp()
    theirs = net.spawn(authority.server().wrap_socket, server, server_side=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        authority.ktls_client().wrap_socket(client, server_hostname="example.org")
    # The peer learns it by an alert, not by a reset.
    assert isinstance(theirs.exception(), ssl.SSLError)


def test_no_shared_cipher(net: Net, authority: Authority) -> None:
    client, server = authority.ktls_client(TLS12), authority.server(TLS12)
    client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    server.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
    assert "HANDSHAKE_FAILURE" in str(fails(net, client, server))


def test_no_shared_version(net: Net, authority: Authority) -> None:
    error = fails(net, authority.ktls_client(TLS12), authority.server(TLS13))
    assert isinstance(error, ssl.SSLError)


@pytest.mark.parametrize("role", ["client", "server"])
def test_peer_that_does_not_speak_tls(net: Net, authority: Authority, role: str) -> None:
    client, server = net.tcp()
    if role == "client":
        server.sendall(b"220 mail.example.org ESMTP ready\r\n")
        with pytest.raises(ssl.SSLError, match="WRONG_VERSION_NUMBER"):
            authority.ktls_client().wrap_socket(client, server_hostname=HOST)
    else:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises(ssl.SSLError, match="HTTP_REQUEST"):
            authority.ktls_server().wrap_socket(server, server_side=True)
    assert (client if role == "client" else server).fileno() == -1


@pytest.mark.parametrize("role", ["client", "server"])
def test_peer_closes_in_the_middle(net: Net, authority: Authority, role: str) -> None:
    client, server = net.tcp()
    mine, their = (client, server) if role == "client" else (server, client)
    their.sendall(b"\x16\x03\x03\x00")
    their.shutdown(socket.SHUT_WR)
    context = authority.ktls_client() if role == "client" else authority.ktls_server()
    with pytest.raises(ssl.SSLEOFError):
        context.wrap_socket(
            mine,
            server_side=role == "server",
            server_hostname=HOST if role == "client" else None,
        )
    assert their.recv(1000) is not None


def test_no_plain_text_is_taken_for_tls(net: Net, authority: Authority) -> None:
    """What came before the handshake on a connection that is closed already never reaches ``recv`` (CVE-2023-40217)."""
    client, server = net.tcp()
    client.sendall(b"POST / HTTP/1.1\r\n\r\n")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    select.select([server], [], [], PATIENCE)
    ours: Any = None
    with suppress(OSError):
        ours = net.keep(authority.ktls_server().wrap_socket(server, server_side=True))
    if ours is not None:
        with pytest.raises(OSError):
            ours.recv(100)


def test_arguments_are_checked_as_by_ssl(net: Net, authority: Authority) -> None:
    client, _ = net.tcp()
    server, plain = authority.ktls_server(), authority.ktls_client()
    with pytest.raises(ValueError, match="can only be specified in client mode"):
        server.wrap_socket(client, server_side=True, server_hostname=HOST)
    with pytest.raises(ValueError, match="check_hostname requires server_hostname"):
        plain.wrap_socket(client)
    with pytest.raises(ValueError, match="can only be specified in client mode"):
        server.wrap_socket(client, server_side=True, session=object())  # type: ignore[arg-type]  # that is the mistake
    assert client.fileno() >= 0
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram,
        pytest.raises(NotImplementedError, match="only stream sockets are supported"),
    ):
        plain.wrap_socket(datagram, server_hostname=HOST)
    with pytest.raises(ValueError, match=r"label empty|cannot be an empty string"):
        plain.wrap_socket(client, server_hostname=".example.org")
    assert client.fileno() == -1


def test_repr_of_what_was_refused(net: Net, authority: Authority) -> None:
    """Tracebacks show it."""
    client, _ = net.tcp()
    with pytest.raises(ValueError, match="check_hostname") as caught:
        authority.ktls_client().wrap_socket(client)
    refused = caught.traceback[-1].frame.f_locals["self"]
    assert repr(refused) == "<ktls.KTLSSocket fd=-1 None no handshake yet>"


def test_wrong_role_of_the_context(net: Net, authority: Authority) -> None:
    client, _ = net.tcp()
    with pytest.raises(ssl.SSLError, match="client"):
        authority.ktls_server().wrap_socket(client, server_hostname=HOST)


class ForeignContext(ssl.SSLContext):
    """Claims to be an ``ssl.SSLContext``, and does something else: as truststore's, rustls' and pyOpenSSL's do."""

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        raise AssertionError("must not be called")


def test_foreign_context_is_refused_by_name(net: Net, authority: Authority) -> None:
    client, server = net.tcp()
    contexts: list[Any] = [ForeignContext(ssl.PROTOCOL_TLS_CLIENT), object()]
    for context in contexts:
        with pytest.raises(TypeError, match=rf"a context of type .*{type(context).__name__}"):
            ktls.wrap_socket(client, context, server_hostname=HOST)
    # The caller's socket is still the caller's.
    theirs = net.spawn(authority.server().wrap_socket, server, server_side=True)
    ours = net.keep(authority.client().wrap_socket(client, server_hostname=HOST))
    net.keep(theirs.result()).sendall(b"usable")
    assert ours.recv(100) == b"usable"


def test_failed_handshakes_leave_no_descriptor(net: Net, authority: Authority) -> None:
    context, server = ktls.SSLContext(), authority.server()
    fails(net, context, server)
    gc.collect()
    before = descriptors()
    for _ in range(20):
        fails(net, context, server)
    assert descriptors() - before == set()


def test_refused_offload_closes_the_socket(net: Net) -> None:
    client, server = net.tcp()
    context = net.context("ktls", "client")
    context.post_handshake_auth = True  # keeps the secrets with the engine
    context.offload = "kernel"
    theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
    with pytest.raises(ktls.OffloadError) as caught:
        context.wrap_socket(client, server_hostname=HOST)
    assert client.fileno() == -1
    assert caught.value.reason
    net.keep(theirs.result())
