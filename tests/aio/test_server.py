"""Servers: listening, and how they end."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from contextlib import closing
from typing import Any

import pytest

from ktls.aio import Server

from ..sockets.helpers import Net, read_all, read_exactly
from .helpers import Keeper, Loop, result, turns, until
from .serving import LOCAL, Guests, guest, serve, visit


def refuses(address: Any) -> bool:
    try:
        socket.create_connection(address[:2], 5).close()
    except ConnectionRefusedError:
        return True
    return False


# --- listening -------------------------------------------------------------------------------------------------------


def test_port_zero(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests)
        assert isinstance(server, Server)
        assert server.is_serving()
        assert server.get_loop() is asyncio.get_running_loop()
        (listener,) = server.sockets
        address = listener.getsockname()
        assert address[1] > 0
        assert await result(net.spawn(visit, net, address)) == b"ping"
        await guests.gone()
        server.close()
        server.close()
        assert not server.is_serving()
        assert server.sockets == ()
        assert refuses(address)
        await server.wait_closed()

    loop.run(main)


def test_several_listeners(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests, [LOCAL, "127.0.0.2"])
        addresses = [listener.getsockname() for listener in server.sockets]
        assert {host for host, _ in addresses} == {LOCAL, "127.0.0.2"}
        for address in addresses:
            assert await result(net.spawn(visit, net, address)) == b"ping"
        server.close()
        assert all(map(refuses, addresses))
        await guests.gone()

    loop.run(main)


def test_socket_of_the_caller(net: Net, loop: Loop) -> None:
    """One that was bound, or already listens, elsewhere: by systemd, or the parent process."""

    async def main() -> None:
        for listens in (False, True):
            sock = socket.socket()
            sock.bind((LOCAL, 0))
            if listens:
                sock.listen()
            guests = Guests()
            server = await serve(net, loop, guests, sock=sock)
            assert await result(net.spawn(visit, net, sock.getsockname())) == b"ping"
            await guests.gone()
            server.close()
            assert sock.fileno() == -1  # as asyncio's own
            await server.wait_closed()

    loop.run(main)


def test_reuse_port(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        first = await serve(net, loop, guests, reuse_port=True)
        port = first.sockets[0].getsockname()[1]
        second = await serve(net, loop, guests, port=port, reuse_port=True)
        for _ in range(4):
            assert await result(net.spawn(visit, net, (LOCAL, port))) == b"ping"
        first.close()
        second.close()
        await guests.gone()

    loop.run(main)


def test_address_in_use(net: Net, loop: Loop) -> None:
    """The loop's own error, with the address in it."""

    async def main() -> None:
        with closing(socket.create_server((LOCAL, 0))) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(OSError, match=f"{LOCAL}.*{port}") as caught:
                await serve(net, loop, Keeper, port=port)
            assert caught.value.errno == errno.EADDRINUSE

    loop.run(main)


def test_address_taken_between_bind_and_listen(net: Net, loop: Loop) -> None:
    async def main() -> None:
        first = await serve(net, loop, Keeper, start_serving=False)
        port = first.sockets[0].getsockname()[1]
        with closing(socket.socket()) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((LOCAL, port))
            other.listen()
            with pytest.raises(OSError, match="in use"):
                await first.start_serving()
            with pytest.raises(OSError, match="in use"):
                await serve(net, loop, Keeper, port=port)
        first.close()

    loop.run(main)


def test_wrong_arguments(net: Net, loop: Loop) -> None:
    async def main() -> None:
        datagram = net.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with pytest.raises(ValueError, match="Stream Socket"):
            await serve(net, loop, Keeper, sock=datagram)
        sock, context = net.keep(socket.socket()), net.context("ktls", "server")
        with pytest.raises(ValueError, match="can not be specified at the same time"):
            await loop.create_server(Keeper, LOCAL, 0, sock=sock, ssl=context)
        with pytest.raises(TypeError, match="SSLContext"):
            await loop.create_server(Keeper, LOCAL, 0, ssl=True)

    loop.run(main)


def test_start_later(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests, start_serving=False)
        address = server.sockets[0].getsockname()
        assert not server.is_serving()
        assert refuses(address)
        await server.start_serving()
        await server.start_serving()
        assert server.is_serving()
        assert await result(net.spawn(visit, net, address)) == b"ping"
        await guests.gone()
        server.close()

    loop.run(main)


def test_serve_forever(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests, start_serving=False)
        address = server.sockets[0].getsockname()
        task = asyncio.ensure_future(server.serve_forever())
        await until(server.is_serving)
        with pytest.raises(RuntimeError, match="already"):
            await server.serve_forever()
        assert await result(net.spawn(visit, net, address)) == b"ping"
        await guests.gone()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.sockets == ()
        assert refuses(address)
        with pytest.raises(RuntimeError, match="closed"):
            await server.serve_forever()

    loop.run(main)


def test_close_ends_serve_forever(net: Net, loop: Loop) -> None:
    async def main() -> None:
        server = await serve(net, loop, Keeper)
        task = asyncio.ensure_future(server.serve_forever())
        await turns()
        server.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run(main)


def test_context_manager(net: Net, loop: Loop) -> None:
    async def main() -> None:
        async with await serve(net, loop, Keeper) as server:
            address = server.sockets[0].getsockname()
        assert refuses(address)

    loop.run(main)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_connections_outlive_their_server(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests)
        tls = await guest(net, server)
        await until(lambda: bool(guests.keepers))
        waiting = asyncio.ensure_future(server.wait_closed())
        await turns()
        server.close()
        await turns()
        tls.sendall(b"still here")
        assert await result(net.spawn(read_exactly, tls, 10)) == b"still here"
        if sys.version_info >= (3, 12):
            assert not waiting.done()
        tls.close()
        await guests.gone()
        await waiting

    loop.run(main)


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
def test_clients_are_sent_away(net: Net, loop: Loop, how: str) -> None:
    """Those in the middle of their handshakes, too."""

    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests)
        tls = await guest(net, server)
        halfway = net.keep(socket.create_connection(server.sockets[0].getsockname()))
        await until(lambda: len(guests.keepers) == 2)
        await until(lambda: any("made" in keeper.diary.events for keeper in guests.keepers))
        server.close()
        getattr(server, how)()
        await until(lambda: not server._active)
        await server.wait_closed()
        assert halfway.recv(1) == b""
        if how == "close_clients":
            assert await result(net.spawn(read_all, tls)) == b""
        else:
            with pytest.raises(OSError):  # cut off: by FIN or RST
                read_all(tls)
        diaries = sorted(keeper.diary.events for keeper in guests.keepers)
        assert diaries == [[], ["made", "lost"]]

    loop.run(main)
