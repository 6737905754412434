"""Loops whose own ``ssl=`` is kernel TLS: what they take over, what they leave alone, and what they fall back to."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import warnings
from typing import TYPE_CHECKING, Any

import pytest

import ktls
from ktls.aio import KTLSTransport

from ..sockets.helpers import Net, read_all
from ..support import HOST
from .helpers import Echo, Keeper, Loop, result, turns, until, wrap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

own = pytest.mark.parametrize("own", ["asyncio", "uvloop"])


class Foreign(ssl.SSLContext):
    """A context that makes its own connections, as other libraries' do: its secrets can't be had."""

    def wrap_bio(self, *arguments: Any, **options: Any) -> Any:
        return super().wrap_bio(*arguments, **options)


def foreign(net: Net, role: str) -> Foreign:
    """A ``Foreign`` context for that role."""
    if role == "server":
        context = Foreign(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(net.authority.server_chain)
    else:
        context = Foreign(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(net.authority.ca_file)
    return context


def echo(net: Net, sock: socket.socket, context: ssl.SSLContext) -> None:
    """Be a TLS server on ``sock``, which sends back what it gets."""
    tls = net.keep(wrap(context, sock, server_side=True))
    while data := tls.recv(65536):
        tls.sendall(data)
    tls.unwrap()


def nonblocking(sock: socket.socket) -> socket.socket:
    """Make ``sock`` what uvloop wants."""
    sock.setblocking(False)
    return sock


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ktls.aio"]


async def chat(transport: Any, keeper: Any, said: bytes = b"hello") -> None:
    """Say something to an echo, hear it, and end."""
    transport.write(said)
    await until(lambda: keeper.diary.data == said)
    transport.close()
    await until(lambda: keeper.diary.lost)
    assert keeper.diary.error is None


# --- fallbacks -------------------------------------------------------------------------------------------------------


def test_foreign_context(net: Net, loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """Works, by the loop's own TLS, and one line says so."""
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=foreign(net, "server"))
        assert len(lines(caplog)) == 1
        transport, keeper = await loop.create_connection(
            Keeper, *server.sockets[0].getsockname(), ssl=foreign(net, "client")
        )
        assert len(lines(caplog)) == 2
        assert all("event loop's own TLS" in line for line in lines(caplog))
        assert not isinstance(transport, KTLSTransport)
        assert transport.get_extra_info("ktls") is None
        await chat(transport, keeper)
        server.close()
        await server.wait_closed()
        await turns(20)

    loop.run(main)


def test_foreign_context_on_an_accepted_socket(
    net: Net, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        mine, theirs = net.tcp()
        visiting = net.spawn(wrap, net.context("stdlib", "client"), theirs, server_side=False)
        keeper = Keeper()  # uvloop returns another protocol
        transport, _ = await loop.connect_accepted_socket(
            lambda: keeper, nonblocking(mine), ssl=foreign(net, "server")
        )
        assert not isinstance(transport, KTLSTransport)
        assert len(lines(caplog)) == 1
        tls = net.keep(await result(visiting))
        tls.sendall(b"x")
        await until(lambda: keeper.diary.data == b"x")
        await asyncio.to_thread(tls.unwrap)
        await until(lambda: keeper.diary.lost)

    loop.run(main)


def test_foreign_context_for_start_tls(
    net: Net, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        mine, theirs = net.tcp()
        nonblocking(mine)
        serving = net.spawn(echo, net, theirs, net.context("stdlib", "server"))
        plain, keeper = await asyncio.get_running_loop().create_connection(
            Keeper, sock=nonblocking(mine)
        )
        transport = await loop.start_tls(
            plain, keeper, foreign(net, "client"), server_hostname=HOST
        )
        assert not isinstance(transport, KTLSTransport)
        assert len(lines(caplog)) == 1
        await chat(transport, keeper)
        await result(serving)

    loop.run(main)


@own
def test_unix_sockets(net: Net, own: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(own)

    async def main() -> None:
        running = asyncio.get_running_loop()
        path = str(tmp_path / "socket")
        server = await running.create_unix_server(Echo, path, ssl=net.context("stdlib", "server"))
        transport, keeper = await running.create_unix_connection(
            Keeper, path, ssl=net.context("stdlib", "client"), server_hostname=HOST
        )
        await chat(transport, keeper)
        server.close()
        await server.wait_closed()
        await turns(20)

    loop.run(main)


def test_unix_socket_of_the_caller(net: Net, loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        mine, theirs = socket.socketpair()
        nonblocking(mine)
        serving = net.spawn(echo, net, net.keep(theirs), net.context("stdlib", "server"))
        transport, keeper = await loop.create_connection(
            Keeper, sock=mine, ssl=net.context("ktls", "client"), server_hostname=HOST
        )
        assert not isinstance(transport, KTLSTransport)
        (line,) = lines(caplog)
        assert "not a TCP socket" in line
        await chat(transport, keeper)
        await result(serving)

    loop.run(main)


@own
def test_plain_traffic_is_untouched(net: Net, own: str) -> None:
    loop = Loop(own)

    async def main() -> None:
        running = asyncio.get_running_loop()
        server = await running.create_server(Echo, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        for options in ({}, {"ssl": None}, {"ssl": False}):
            transport, keeper = await running.create_connection(Keeper, *address, **options)
            assert not isinstance(transport, KTLSTransport)
            assert transport.get_extra_info("sslcontext") is None
            await chat(transport, keeper)
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await running.create_connection(Keeper, *address, ssl_handshake_timeout=1)
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await running.create_server(Keeper, *address, ssl_handshake_timeout=1)
        server.close()
        await server.wait_closed()
        await turns(20)

    loop.run(main)


# --- start_tls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["client", "server"])
def test_start_tls(net: Net, loop: Loop, role: str) -> None:
    """Unsent plain data goes out first; the protocol is not told of a new connection, but of its end."""
    plain_text = bytes(100_000)

    async def main() -> None:
        mine, theirs = net.tcp(buffers=8192)
        context, their_context = (
            (net.context("ktls", "client"), net.context("stdlib", "server"))
            if role == "client"
            else (net.context("ktls", "server"), net.context("stdlib", "client"))
        )

        def serve() -> bytes:
            theirs.settimeout(20)
            received = b""
            while len(received) < len(plain_text):
                received += theirs.recv(len(plain_text) - len(received))
            tls = net.keep(wrap(their_context, theirs, server_side=role == "client"))
            while data := tls.recv(65536):
                tls.sendall(data)
            tls.unwrap()
            return received

        serving = net.spawn(serve)
        plain, keeper = await asyncio.get_running_loop().create_connection(
            Keeper, sock=nonblocking(mine)
        )
        plain.write(plain_text)
        transport = await loop.start_tls(
            plain,
            keeper,
            context,
            server_side=role == "server",
            server_hostname=HOST if role == "client" else None,
        )
        assert isinstance(transport, KTLSTransport)
        assert "SSL" in type(transport).__name__ or "TLS" in type(transport).__name__
        assert transport.get_extra_info("sslcontext") is context
        assert plain.is_closing()
        await chat(transport, keeper, b"secret")
        assert keeper.diary.events.count("made") == keeper.diary.events.count("lost") == 1
        assert await result(serving) == plain_text

    loop.run(main)


def test_start_tls_that_fails(net: Net, loop: Loop) -> None:
    """The protocol had a connection and has lost it: it must be told, or ``StreamWriter.wait_closed`` would wait for ever."""

    async def main() -> None:
        mine, theirs = net.tcp()
        plain, keeper = await asyncio.get_running_loop().create_connection(
            Keeper, sock=nonblocking(mine)
        )
        starting = asyncio.ensure_future(
            loop.start_tls(plain, keeper, net.context("ktls", "client"), server_hostname=HOST)
        )
        await turns()
        theirs.sendall(b"plain nonsense")
        with pytest.raises(ssl.SSLError) as caught:
            await starting
        await until(lambda: keeper.diary.lost)
        assert keeper.diary.error is caught.value
        assert keeper.diary.events == ["made", "lost"]

    loop.run(main)


def test_start_tls_that_is_cancelled(net: Net, loop: Loop) -> None:
    async def main() -> None:
        mine, theirs = net.tcp()
        plain, keeper = await asyncio.get_running_loop().create_connection(
            Keeper, sock=nonblocking(mine)
        )
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                loop.start_tls(plain, keeper, net.context("ktls", "client"), server_hostname=HOST),
                0.05,
            )
        await until(lambda: keeper.diary.lost)
        assert isinstance(keeper.diary.error, ConnectionError)
        theirs.settimeout(20)
        while await asyncio.to_thread(theirs.recv, 65536):
            pass

    loop.run(main)


def test_start_tls_that_can_not_begin(net: Net, loop: Loop) -> None:
    async def main() -> None:
        mine, _ = net.tcp()
        plain, keeper = await asyncio.get_running_loop().create_connection(
            Keeper, sock=nonblocking(mine)
        )
        with pytest.raises(TypeError, match="SSLContext"):
            await loop.start_tls(plain, keeper, None)
        with pytest.raises(TypeError):
            await loop.start_tls(None, keeper, net.context("ktls", "client"))
        plain.close()
        await until(lambda: keeper.diary.lost)
        with pytest.raises(ConnectionAbortedError):
            await loop.start_tls(plain, keeper, net.context("ktls", "client"), server_hostname=HOST)

    loop.run(main)


@own
def test_stream_writer_start_tls(net: Net, own: str) -> None:
    loop = Loop(own)

    async def main() -> None:
        async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"STARTTLS\n"
            writer.write(b"go ahead\n")
            await writer.start_tls(net.context("ktls", "server"))
            assert writer.get_extra_info("ktls").server_side
            writer.write(b"secret " + await reader.readline())
            writer.close()
            await writer.wait_closed()
            done.set_result(None)

        done = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(upgrade, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"go ahead\n"
        await writer.start_tls(net.context("ktls", "client"), server_hostname=HOST)
        assert isinstance(writer.transport, KTLSTransport)
        writer.write(b"question\n")
        assert await reader.read() == b"secret question\n"
        writer.close()
        await writer.wait_closed()
        await done
        server.close()
        await server.wait_closed()
        await turns(20)

    loop.run(main)


@own
def test_stream_writer_start_tls_after_the_client_has_begun(net: Net, own: str) -> None:
    """Its ClientHello is in the reader by then, and in nobody's socket."""
    loop = Loop(own)

    async def main() -> None:
        async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            buffer: bytearray = reader._buffer  # type: ignore[attr-defined]  # private: reading would take it out
            await until(lambda: bool(buffer))
            await writer.start_tls(net.context("ktls", "server"))
            writer.write(b"secret " + await reader.readline())
            writer.close()
            await writer.wait_closed()
            done.set_result(None)

        done = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(upgrade, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await writer.start_tls(net.context("ktls", "client"), server_hostname=HOST)
        writer.write(b"question\n")
        assert await reader.read() == b"secret question\n"
        writer.close()
        await writer.wait_closed()
        await done
        server.close()
        await server.wait_closed()
        await turns(20)

    loop.run(main)


def test_tls_inside_of_tls(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy reached by TLS, and TLS through it: the inner one is asyncio's."""
    caplog.set_level(logging.INFO, "ktls.aio")
    loop = Loop("asyncio")
    payload = bytes(range(256)) * 2000

    async def main() -> None:
        running = asyncio.get_running_loop()

        async def inside(transport: Any) -> None:
            keeper = Echo()
            keeper.transport = await running.start_tls(
                transport, keeper, net.context("stdlib", "server"), server_side=True
            )

        tasks = []

        def made(transport: Any) -> None:
            transport.pause_reading()
            tasks.append(asyncio.ensure_future(inside(transport)))

        server = await running.create_server(
            lambda: Keeper(on_made=made), "127.0.0.1", 0, ssl=net.context("ktls", "server")
        )
        outer, keeper = await running.create_connection(
            Keeper, *server.sockets[0].getsockname(), ssl=net.context("ktls", "client")
        )
        assert isinstance(outer, KTLSTransport)
        inner = await running.start_tls(
            outer, keeper, net.context("stdlib", "client"), server_hostname=HOST
        )
        assert inner is not None
        assert not isinstance(inner, KTLSTransport)
        assert any("start_tls" in line for line in lines(caplog))
        await asyncio.gather(*tasks)
        inner.write(payload)
        await until(lambda: len(keeper.diary.data) == len(payload))
        assert keeper.diary.data == payload
        inner.close()
        await until(lambda: keeper.diary.lost)
        server.close()
        await until(lambda: not server._active)  # type: ignore[attr-defined]  # ours has it; typed as asyncio's

    loop.run(main)


def test_tls_inside_of_tls_for_those_who_give_up(net: Net) -> None:
    """The inner handshake fails: the outer connection goes, too."""
    loop = Loop("asyncio")

    async def main() -> None:
        running = asyncio.get_running_loop()
        mine, theirs = net.tcp()

        def babble() -> bytes:
            tls = net.keep(wrap(net.context("stdlib", "server"), theirs, server_side=True))
            tls.recv(65536)
            tls.sendall(b"this is not TLS")
            return read_all(tls)

        babbling = net.spawn(babble)
        outer, keeper = await running.create_connection(
            Keeper, sock=mine, ssl=net.context("ktls", "client"), server_hostname=HOST
        )
        with pytest.raises(ssl.SSLError):
            await running.start_tls(
                outer, keeper, net.context("stdlib", "client"), server_hostname=HOST
            )
        await asyncio.gather(asyncio.wrap_future(babbling), return_exceptions=True)
        await until(lambda: mine.fileno() == -1)

    loop.run(main)


# --- run, install ----------------------------------------------------------------------------------------------------


@pytest.fixture
def policy() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.14 on
        before = asyncio.get_event_loop_policy()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(before)


@pytest.mark.parametrize("factory", [ktls.aio.new_event_loop, ktls.aio.new_uvloop_event_loop])
def test_install(policy: None, factory: Any) -> None:
    """Programs that call ``asyncio.run`` by themselves."""
    ktls.aio.install(factory)
    kind = type(factory_made(factory))

    async def main() -> None:
        assert type(asyncio.get_running_loop()) is kind

    asyncio.run(main())


def factory_made(factory: Any) -> Any:
    made = factory()
    made.close()
    return made


def test_run() -> None:
    async def main(answer: int) -> int:
        assert isinstance(asyncio.get_running_loop(), ktls.aio.KTLSEventLoop)
        assert asyncio.get_running_loop().get_debug()
        return answer

    assert ktls.aio.run(main(42), debug=True) == 42
    with pytest.raises(ZeroDivisionError):
        ktls.aio.run(fail())


async def fail() -> None:
    raise ZeroDivisionError


def test_loop_with_a_selector() -> None:
    """As ``asyncio.SelectorEventLoop`` takes one."""
    import selectors

    selector = selectors.PollSelector()
    loop = ktls.aio.KTLSEventLoop(selector)
    assert loop._selector is selector
    loop.close()


@pytest.mark.parametrize("debug", [True, False])
def test_debug_mode(net: Net, loop: Loop, debug: bool) -> None:
    """A loop in debug mode checks more, and logs more."""

    async def main() -> None:
        asyncio.get_running_loop().set_debug(debug)
        server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=net.context("ktls", "server"))
        address = server.sockets[0].getsockname()
        transport, keeper = await loop.create_connection(
            Keeper, *address, ssl=net.context("ktls", "client")
        )
        await chat(transport, keeper)
        with pytest.raises(ssl.SSLError):
            await loop.create_connection(
                Keeper, *address, ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            )
        server.close()
        await until(lambda: not server._active)

    loop.run(main)
