"""asyncio's streams over kernel TLS: our functions, and asyncio's own on our loops."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest

import ktls
from ktls.protocol.errors import RemoteProtocolError
from ktls.testing import RecordPeer

from ..sockets.helpers import Net, pattern, read_all
from ..support import HOST, TLS12
from .helpers import TLS13_SUITE, Loop, result, turns, until, wrap


async def open_connection(loop: Loop, *args: Any, **options: Any) -> Any:
    if loop.name.endswith("functions"):
        return await ktls.aio.open_connection(*args, **options)
    return await asyncio.open_connection(*args, **options)


async def start_server(loop: Loop, *args: Any, **options: Any) -> Any:
    if loop.name.endswith("functions"):
        return await ktls.aio.start_server(*args, **options)
    return await asyncio.start_server(*args, **options)


async def visit(net: Net, loop: Loop, serve: Any, **options: Any) -> Any:
    """Start a server, connect to it; return its stop function, and the client's streams."""
    errors: list[BaseException] = []
    tasks: set[asyncio.Task[None]] = set()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except BaseException as error:
            errors.append(error)
        finally:
            writer.close()

    server = await start_server(loop, guarded, "127.0.0.1", 0, ssl=net.context("ktls", "server"))
    reader, writer = await open_connection(
        loop, *server.sockets[0].getsockname(), ssl=net.context("ktls", "client"), **options
    )

    async def stop() -> None:
        await asyncio.gather(*tasks)
        server.close()
        await until(lambda: not server._active)
        assert not errors

    return stop, reader, writer


def test_reading_in_every_way(net: Net, loop: Loop) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"line one\nline two\n")
        writer.writelines([b"exactly", b"|until;", pattern(200_000)])
        await writer.drain()

    async def main() -> None:
        stop, reader, writer = await visit(net, loop, serve)
        assert await reader.readline() == b"line one\n"
        assert [line async for line in one_line(reader)] == [b"line two\n"]
        assert await reader.readexactly(7) == b"exactly"
        assert await reader.readuntil(b";") == b"|until;"
        rest = await reader.read()
        assert rest == pattern(200_000)
        assert await reader.read() == b""
        assert reader.at_eof()
        writer.close()
        await writer.wait_closed()
        await stop()

    loop.run(main)


async def one_line(reader: asyncio.StreamReader) -> Any:
    yield await reader.readline()


def test_echo(net: Net, loop: Loop) -> None:
    """More than any buffer holds, both ways."""
    data = pattern(2_000_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = len(data)
        while left:
            chunk = await reader.read(50_000)
            left -= len(chunk)
            writer.write(chunk)
            await writer.drain()

    async def main() -> None:
        stop, reader, writer = await visit(net, loop, serve)

        async def send() -> None:
            for start in range(0, len(data), 100_000):
                writer.write(data[start : start + 100_000])
                await writer.drain()

        sending = asyncio.ensure_future(send())
        assert await reader.readexactly(len(data)) == data
        await sending
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        await stop()

    loop.run(main)


def test_limit_holds_the_sender_back(net: Net, loop: Loop) -> None:
    """The reader's limit pauses the transport, and reading lets it go on."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(pattern(3_000_000))
        await writer.drain()

    async def main() -> None:
        stop, reader, writer = await visit(net, loop, serve, limit=1000)
        await until(lambda: not writer.transport.is_reading())
        data = b""
        while chunk := await reader.read(60_000):
            data += chunk
        assert data == pattern(3_000_000)
        writer.close()
        await writer.wait_closed()
        await stop()

    loop.run(main)


@pytest.mark.parametrize("name", ["functions", "uvloop-functions"])
def test_half_close(net: Net, name: str) -> None:
    """With our functions one may go on writing after the peer's end, as over plain TCP; asyncio's own streams close a TLS connection then."""
    loop = Loop(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.read()
        for turn in range(5):
            writer.write(question + b" %d" % turn)
            await writer.drain()
            await turns(3)

    async def main() -> None:
        stop, reader, writer = await visit(net, loop, serve)
        assert writer.can_write_eof()
        writer.write(b"question")
        writer.write_eof()
        assert await reader.read() == b"".join(b"question %d" % turn for turn in range(5))
        writer.close()
        await writer.wait_closed()
        await stop()

    loop.run(main)


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_asyncio_streams_write_eof(net: Net, name: str) -> None:
    loop = Loop(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"question"

    async def main() -> None:
        stop, reader, writer = await visit(net, loop, serve)
        writer.write(b"question")
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        await stop()

    loop.run(main)


def test_no_half_close_in_tls12(net: Net, loop: Loop) -> None:
    async def main() -> None:
        mine, theirs = net.tcp()
        serving = net.spawn(wrap, net.context("stdlib", "server", TLS12), theirs, server_side=True)
        reader, writer = await open_connection(
            loop, sock=mine, ssl=net.context("ktls", "client", TLS12), server_hostname=HOST
        )
        tls = net.keep(await result(serving))
        assert not writer.can_write_eof()
        await asyncio.to_thread(end, tls)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()

    loop.run(main)


def end(tls: ssl.SSLSocket) -> None:
    tls.unwrap()


def test_bad_record(net: Net, loop: Loop) -> None:
    """The reader gets an ``ssl.SSLError``, and so does ``wait_closed``."""

    async def main() -> None:
        mine, theirs = net.tcp()
        serving = net.spawn(wrap, net.context("stdlib", "server"), theirs, server_side=True)
        reader, writer = await open_connection(
            loop, sock=mine, ssl=net.context("ktls", "client"), server_hostname=HOST
        )
        tls = net.keep(await result(serving))
        # Under its TLS: a record that no key opens.
        raw = RecordPeer(net.keep(tls_below(tls)), TLS13_SUITE)
        raw.send_raw(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError) as caught:
            await reader.readline()
        assert isinstance(caught.value, RemoteProtocolError)
        writer.close()
        with pytest.raises(ssl.SSLError):
            await writer.wait_closed()

    loop.run(main)


def tls_below(tls: ssl.SSLSocket) -> Any:
    """The same connection, without TLS."""
    import os
    import socket

    return socket.socket(fileno=os.dup(tls.fileno()))


def test_close_waits_for_the_data(net: Net, loop: Loop) -> None:
    async def main() -> None:
        mine, theirs = net.tcp(buffers=8192)
        serving = net.spawn(wrap, net.context("stdlib", "server"), theirs, server_side=True)
        _, writer = await open_connection(
            loop, sock=mine, ssl=net.context("ktls", "client"), server_hostname=HOST
        )
        reading = net.spawn(read_all, net.keep(await result(serving)))
        writer.write(pattern(500_000))
        writer.close()
        await writer.wait_closed()
        assert await result(reading) == pattern(500_000)

    loop.run(main)


def test_cancelled_reader(net: Net, loop: Loop) -> None:
    """A cancelled read takes nothing with it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"0123456789")

    async def main() -> None:
        stop, reader, writer = await visit(net, loop, serve)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(10), 0.02)
        writer.write(b"now\n")
        assert await reader.readexactly(10) == b"0123456789"
        writer.close()
        await writer.wait_closed()
        await stop()

    loop.run(main)


def test_plain_callback(net: Net, loop: Loop) -> None:
    """``client_connected_cb`` need not be a coroutine function."""
    met = []

    def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.append(reader)
        writer.write(b"hello")
        writer.close()

    async def main() -> None:
        server = await start_server(loop, greet, "127.0.0.1", 0, ssl=net.context("ktls", "server"))
        reader, writer = await open_connection(
            loop, *server.sockets[0].getsockname(), ssl=net.context("ktls", "client")
        )
        assert await reader.read() == b"hello"
        assert met
        writer.close()
        await writer.wait_closed()
        server.close()
        await until(lambda: not server._active)

    loop.run(main)
