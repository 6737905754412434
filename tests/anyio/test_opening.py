"""Handshakes and listeners, on every backend."""

from __future__ import annotations

import logging
import socket
import ssl
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketStream
from anyio.streams.tls import TLSAttribute, TLSStream

import ktls
import ktls.anyio
from ktls.anyio import KTLSAttribute, KTLSListener, KTLSStream

from ..sockets.helpers import Case, Net, descriptors, pattern, read_exactly
from ..support import HOST
from .helpers import Backend, echo, port_of, receive_all, receive_exactly, result, until

# --- handshakes ------------------------------------------------------------------------------------------------------


def test_over_a_stream_of_anyio(net: Net, backend: Backend, case: Case) -> None:
    async def main() -> None:
        client, server = net.tcp()
        mine, their = (client, server) if case.role == "client" else (server, client)
        their_role: Any = "server" if case.role == "client" else "client"
        theirs = net.spawn(
            net.context(case.peer, their_role, case.version).wrap_socket,
            their,
            server_side=their_role == "server",
            server_hostname=HOST if their_role == "client" else None,
        )
        plain = await SocketStream.from_socket(mine)
        context = net.context("ktls", case.role, case.version)
        context.offload = case.offload
        tls = await KTLSStream.wrap(
            plain, hostname=HOST if case.role == "client" else None, ssl_context=context
        )
        peer = net.keep(await result(theirs))
        offload = tls.extra(KTLSAttribute.offload)
        assert (offload.tx, offload.rx) == (case.tx_layer, case.rx_layer)
        peer.sendall(b"hello")
        assert await tls.receive() == b"hello"
        await tls.send(b"hello yourself")
        assert peer.recv(100) == b"hello yourself"
        with pytest.raises((ClosedResourceError, EndOfStream)):  # the latter before anyio 4.16
            await plain.receive()
        await tls.aclose()

    backend.run(main)


def test_what_the_stream_had_read_already(net: Net, backend: Backend) -> None:
    """STARTTLS by a client that does not wait: the ClientHello is in the stream's buffer by then."""

    async def main() -> None:
        client, server = net.tcp()
        client.sendall(b"!")
        theirs = net.spawn(
            net.context("stdlib", "client").wrap_socket, client, server_hostname=HOST
        )
        await until(lambda: len(server.recv(4096, socket.MSG_PEEK)) > 200)
        plain = await SocketStream.from_socket(server)
        assert await plain.receive(1) == b"!"
        tls = await KTLSStream.wrap(plain, ssl_context=net.context("ktls", "server"))
        peer = net.keep(await result(theirs))
        await tls.send(b"hello")
        assert peer.recv(100) == b"hello"
        await tls.aclose()

    backend.run(main)


def test_transports_that_will_not_do(net: Net, backend: Backend) -> None:
    async def main() -> None:
        client, server = net.tcp()
        theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
        plain = await SocketStream.from_socket(client)
        tls = await TLSStream.wrap(
            plain, hostname=HOST, ssl_context=net.context("stdlib", "client")
        )
        net.keep(await result(theirs))
        context = net.context("ktls", "client")
        unfit: Any = tls
        with pytest.raises(TypeError, match="TLSStream"):
            await KTLSStream.wrap(unfit, hostname=HOST, ssl_context=context)
        await anyio.aclose_forcefully(tls)
        with pytest.raises(ClosedResourceError):
            await KTLSStream.wrap(plain, hostname=HOST, ssl_context=context)

    backend.run(main)


def test_a_certificate_that_is_not_trusted(net: Net, backend: Backend) -> None:
    async def main() -> None:
        before = descriptors()
        client, server = net.tcp()
        theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
        with pytest.raises(ssl.SSLCertVerificationError):
            await KTLSStream.wrap(client, hostname=HOST)
        assert isinstance(await anyio.to_thread.run_sync(theirs.exception), ssl.SSLError)
        server.close()
        await until(lambda: descriptors() <= before)

    backend.run(main)


def test_the_peer_goes_during_the_handshake(net: Net, backend: Backend) -> None:
    async def main() -> None:
        for how in (b"", b"\x16\x03\x01\x02\x00\x01"):
            client, server = net.tcp()
            server.sendall(how)
            server.shutdown(socket.SHUT_WR)
            with pytest.raises(BrokenResourceError) as caught:
                await KTLSStream.wrap(
                    client, hostname=HOST, ssl_context=net.context("ktls", "client")
                )
            assert isinstance(caught.value.__cause__, ssl.SSLEOFError)
            assert client.fileno() == -1

    backend.run(main)


def test_a_handshake_that_is_cancelled(net: Net, backend: Backend) -> None:
    async def main() -> None:
        context = net.context("ktls", "client")
        before = descriptors()
        client, server = net.tcp()
        async with anyio.create_task_group() as group:

            async def shake_hands() -> None:
                await KTLSStream.wrap(client, hostname=HOST, ssl_context=context)

            group.start_soon(shake_hands)
            await anyio.wait_all_tasks_blocked()
            assert len(server.recv(4096)) > 100
            group.cancel_scope.cancel()
        assert server.recv(1) == b""
        server.close()
        await until(lambda: descriptors() <= before)

    backend.run(main)


def test_what_a_plain_context_can_not_say(net: Net, backend: Backend) -> None:
    async def main() -> None:
        client, server = net.tcp()
        theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
        tls = await KTLSStream.wrap(
            client,
            hostname=HOST,
            ssl_context=net.context("stdlib", "client"),
            settings=ktls.Settings(offload="userspace"),
        )
        net.keep(await result(theirs))
        assert tls.extra(KTLSAttribute.offload).reason == "user space was asked for"
        await tls.aclose()

    backend.run(main)


# --- connect_tcp, listeners ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standard_compatible", [True, False])
def test_our_own_both_ends(net: Net, backend: Backend, standard_compatible: bool) -> None:
    data = pattern(1_000_000)

    async def main() -> None:
        listener = await ktls.anyio.create_tcp_listener(
            local_host="127.0.0.1",
            ssl_context=net.context("ktls", "server"),
            standard_compatible=standard_compatible,
        )
        assert listener.extra(TLSAttribute.standard_compatible) is standard_compatible

        async def client() -> None:
            stream = await ktls.anyio.connect_tcp(
                "127.0.0.1",
                port_of(listener),
                ssl_context=net.context("ktls", "client"),
                tls_hostname=HOST,
                tls_standard_compatible=standard_compatible,
            )
            assert stream.extra(TLSAttribute.standard_compatible) is standard_compatible
            async with stream, anyio.create_task_group() as sending:
                sending.start_soon(stream.send, data)
                assert await receive_exactly(stream, len(data)) == data
                await stream.send_eof()
                assert await receive_all(stream) == b""

        async with listener, anyio.create_task_group() as serving:
            serving.start_soon(listener.serve, echo)
            async with anyio.create_task_group() as clients:
                for _ in range(5):
                    clients.start_soon(client)
            serving.cancel_scope.cancel()

    backend.run(main)


def test_many_connections(net: Net, backend: Backend) -> None:
    """Both ends are ours, and change their keys as they like."""
    settings = ktls.Settings(offload="auto" if Case().may_refresh else "userspace")
    chunks = [pattern(1 + number * 2999 % 50_000, number) for number in range(25)]

    client_context = net.context("ktls", "client")

    async def client(number: int, port: int) -> None:
        stream = await ktls.anyio.connect_tcp(
            "127.0.0.1",
            port,
            ssl_context=client_context,
            tls_hostname=HOST,
            settings=settings,
        )

        async def send() -> None:
            for index, chunk in enumerate(chunks):
                if index % 5 == number % 5:
                    await stream.refresh_traffic_keys(request_peer=index % 2 == 0)
                await stream.send(chunk)
            await stream.send_eof()

        async with stream, anyio.create_task_group() as sending:
            sending.start_soon(send)
            assert await receive_all(stream) == b"".join(chunks)

    async def main() -> None:
        listener = await ktls.anyio.create_tcp_listener(
            local_host="127.0.0.1", ssl_context=net.context("ktls", "server"), settings=settings
        )
        async with listener, anyio.create_task_group() as serving:
            serving.start_soon(listener.serve, echo)
            await client(0, port_of(listener))  # what event loops open once
            before = descriptors()
            async with anyio.create_task_group() as clients:
                for number in range(15):
                    clients.start_soon(client, number, port_of(listener))
            await until(lambda: descriptors() <= before)
            serving.cancel_scope.cancel()

    backend.run(main)


def test_no_connection(net: Net, backend: Backend) -> None:
    async def main() -> None:
        context = net.context("ktls", "client")
        with socket.create_server(("127.0.0.1", 0)) as gone:
            port = gone.getsockname()[1]

        async def fail() -> None:
            with pytest.raises(OSError, match="connection attempts failed"):
                await ktls.anyio.connect_tcp("127.0.0.1", port, ssl_context=context)

        await fail()  # what event loops open once
        before = descriptors()
        await fail()
        await until(lambda: descriptors() <= before)

    backend.run(main)


def test_a_listener_outlives_bad_handshakes(
    net: Net, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    def nonsense(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return sock.recv(100)

    def silence(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            return sock.recv(100)

    def question(port: int) -> bytes:
        context = net.context("stdlib", "client")
        with (
            socket.create_connection(("127.0.0.1", port), timeout=20) as sock,
            context.wrap_socket(sock, server_hostname=HOST) as tls,
        ):
            tls.sendall(b"question")
            return read_exactly(tls, len(b"question"))

    async def main() -> None:
        plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
        listener = KTLSListener(
            plain, net.context("stdlib", "server"), standard_compatible=False, handshake_timeout=0.5
        )
        async with listener, anyio.create_task_group() as serving:
            serving.start_soon(listener.serve, echo)
            port = port_of(listener)
            quiet = net.spawn(silence, port)
            assert (await result(net.spawn(nonsense, port))) == b""
            assert await result(net.spawn(question, port)) == b"question"
            assert await result(quiet) == b""
            await until(lambda: len(caplog.records) == 2)
            assert await result(net.spawn(question, port)) == b"question"
            serving.cancel_scope.cancel()

    with caplog.at_level(logging.ERROR, logger="ktls.anyio"):
        backend.run(main)
    assert {record.getMessage() for record in caplog.records} == {"Error during TLS handshake"}
    kinds = {record.exc_info[0] for record in caplog.records if record.exc_info}
    assert TimeoutError in kinds
    assert any(kind is not None and issubclass(kind, ssl.SSLError) for kind in kinds)
