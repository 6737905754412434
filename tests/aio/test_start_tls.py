"""``start_tls`` of those loops: a plain connection becomes one of kernel TLS, its protocol staying."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

import pytest

from ktls.aio import KTLSTransport

from ..sockets.helpers import Net, read_all
from ..support import HOST
from .helpers import Echo, Keeper, Loop, result, turns, until, wrap
from .plain import chat, connect_plain, lines, own, talk


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
        plain, keeper = await connect_plain(mine)
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
        plain, keeper = await connect_plain(mine)
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
        plain, keeper = await connect_plain(mine)
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
        plain, keeper = await connect_plain(mine)
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
    async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go ahead\n")
        await writer.start_tls(net.context("ktls", "server"))
        assert writer.get_extra_info("ktls").server_side
        writer.write(b"secret " + await reader.readline())

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"go ahead\n"
        await writer.start_tls(net.context("ktls", "client"), server_hostname=HOST)
        assert isinstance(writer.transport, KTLSTransport)
        writer.write(b"question\n")
        assert await reader.read() == b"secret question\n"

    Loop(own).run(lambda: talk(upgrade, visit))


@own
def test_stream_writer_start_tls_after_the_client_has_begun(net: Net, own: str) -> None:
    """Its ClientHello is in the reader by then, and in nobody's socket."""

    async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer: bytearray = reader._buffer  # type: ignore[attr-defined]  # private: reading would take it out
        await until(lambda: bool(buffer))
        await writer.start_tls(net.context("ktls", "server"))
        writer.write(b"secret " + await reader.readline())

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.start_tls(net.context("ktls", "client"), server_hostname=HOST)
        writer.write(b"question\n")
        assert await reader.read() == b"secret question\n"

    Loop(own).run(lambda: talk(upgrade, visit))


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
