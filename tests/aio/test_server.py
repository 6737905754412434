"""Servers: listening, accepting, errors of both, and how they end."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import sys
from contextlib import closing, suppress
from typing import Any

import pytest

from ktls.aio import Server

from ..sockets.helpers import Net, read_all, read_exactly
from ..support import HOST
from .helpers import Echo, Keeper, Loop, ended, result, turns, until, wrap

LOCAL = "127.0.0.1"


def visit(net: Net, address: Any, said: bytes = b"ping") -> bytes:
    """Connect with the ``ssl`` module, say something, and return what comes back until the end."""
    sock = socket.create_connection(address[:2], 20)
    with wrap(net.context("stdlib", "client"), sock, server_side=False) as tls:
        tls.sendall(said)
        data = read_exactly(tls, len(said))
        with suppress(OSError):
            tls.unwrap()
    return data


class Guests:
    """A protocol factory that remembers."""

    def __init__(self, kind: Any = Echo) -> None:
        self.keepers: list[Any] = []
        self._kind = kind

    def __call__(self) -> Any:
        self.keepers.append(self._kind())
        return self.keepers[-1]

    async def gone(self) -> None:
        await ended(self.keepers)


def refuses(address: Any) -> bool:
    try:
        socket.create_connection(address[:2], 5).close()
    except ConnectionRefusedError:
        return True
    return False


async def serve(net: Net, loop: Loop, factory: Any, host: Any = LOCAL, **options: Any) -> Any:
    options.setdefault("ssl", net.context("ktls", "server"))
    if "sock" not in options:
        options.setdefault("port", 0)
        options["host"] = host
    return await loop.create_server(factory, **options)


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


async def guest(net: Net, server: Any) -> Any:
    """A connection that stays; returns its blocking end."""
    address = server.sockets[0].getsockname()
    sock = net.keep(socket.create_connection(address[:2], 20))
    tls = await result(net.spawn(wrap, net.context("stdlib", "client"), sock, server_side=False))
    return net.keep(tls)


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


# --- accepting -------------------------------------------------------------------------------------------------------


def test_out_of_descriptors(net: Net, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is told, rests, and tries again: no spinning, and nobody is turned away."""
    calls = 0
    accept = socket.socket.accept

    def refuse(self: socket.socket) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    async def main() -> None:
        monkeypatch.setattr("ktls.aio.server._RETRY_DELAY", 1.0)
        guests = Guests()
        server = await serve(net, loop, guests)
        monkeypatch.setattr(socket.socket, "accept", refuse)
        visiting = net.spawn(visit, net, server.sockets[0].getsockname())
        await until(lambda: calls == 1)
        await turns(100)
        assert calls == 1
        problem = loop.problems.pop()
        assert problem["exception"].errno == errno.EMFILE
        assert "out of system resource" in problem["message"]
        assert await result(visiting) == b"ping"
        await guests.gone()
        server.close()

    loop.run(main)


def test_closed_while_out_of_descriptors(
    net: Net, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: socket.socket) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        monkeypatch.setattr("ktls.aio.server._RETRY_DELAY", 0.01)
        server = await serve(net, loop, Keeper)
        monkeypatch.setattr(socket.socket, "accept", refuse)
        client = net.keep(socket.create_connection(server.sockets[0].getsockname()))
        await until(lambda: bool(loop.problems))
        server.close()
        loop.problems.clear()
        await asyncio.to_thread(client.settimeout, 1)
        await asyncio.sleep(0.03)
        assert not loop.problems

    loop.run(main)


def test_peer_that_has_gone_before_accept(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests)
        address = server.sockets[0].getsockname()
        for linger in (False, True):
            with socket.create_connection(address) as client:
                if linger:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert await result(net.spawn(visit, net, address)) == b"ping"
        await until(lambda: len(guests.keepers) == 3)
        await ended(guests.keepers[2:])
        assert [keeper.diary.events for keeper in guests.keepers[:2]] == [[], []]
        server.close()

    loop.run(main)


def test_factory_that_raises(net: Net, loop: Loop) -> None:
    """It costs that connection, not the server."""

    async def main() -> None:
        guests = Guests()
        error = RuntimeError("no")
        failing = [True]

        def factory() -> Any:
            if failing:
                failing.pop()
                raise error
            return guests()

        server = await serve(net, loop, factory)
        address = server.sockets[0].getsockname()
        client = net.keep(socket.create_connection(address))
        assert await asyncio.to_thread(client.recv, 1) == b""
        assert loop.problems.pop()["exception"] is error
        assert await result(net.spawn(visit, net, address)) == b"ping"
        await guests.gone()
        server.close()

    loop.run(main)


def test_connection_made_that_raises(net: Net, loop: Loop) -> None:
    async def main() -> None:
        error = RuntimeError("no")

        def fail(_: Any) -> None:
            raise error

        guests = Guests(lambda: Keeper(on_made=fail))
        server = await serve(net, loop, guests)
        tls = await guest(net, server)
        await until(lambda: bool(guests.keepers))
        await guests.gone()
        assert guests.keepers[0].diary.error is error
        assert loop.problems.pop()["exception"] is error
        with suppress(ssl.SSLError, ConnectionResetError):
            assert tls.recv(1) == b""
        server.close()
        await until(lambda: not server._active)

    loop.run(main)


def test_server_closed_by_its_factory(net: Net, loop: Loop) -> None:
    async def main() -> None:
        keeper = Echo()

        def factory() -> Any:
            server.close()
            return keeper

        server = await serve(net, loop, factory)
        assert await result(net.spawn(visit, net, server.sockets[0].getsockname())) == b"ping"
        await ended([keeper])

    loop.run(main)


def test_backlog(net: Net, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        seen: list[int] = []
        listen = socket.socket.listen

        def watched(self: socket.socket, backlog: int = 5) -> None:
            seen.append(backlog)
            listen(self, backlog)

        monkeypatch.setattr(socket.socket, "listen", watched)
        server = await serve(net, loop, Keeper, backlog=7)
        assert seen[-1] == 7
        server.close()

    loop.run(main)


def test_every_connection_knows_its_addresses(net: Net, loop: Loop) -> None:
    async def main() -> None:
        guests = Guests()
        server = await serve(net, loop, guests, HOST)
        for listener in server.sockets:
            address = listener.getsockname()
            client = net.keep(socket.create_connection(address[:2]))
            tls = await result(
                net.spawn(wrap, net.context("stdlib", "client"), client, server_side=False)
            )
            net.keep(tls)
            await until(lambda: bool(guests.keepers) and bool(guests.keepers[-1].transport))
            transport = guests.keepers[-1].transport
            assert transport.get_extra_info("peername")[:2] == tls.getsockname()[:2]
            assert transport.get_extra_info("sockname")[:2] == tls.getpeername()[:2]
            assert transport.get_extra_info("sslcontext") is net.context("ktls", "server")
            assert transport.get_extra_info("ktls").server_side
            tls.close()
            await guests.gone()
        server.close()

    loop.run(main)
