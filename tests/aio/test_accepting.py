"""Servers: accepting, what goes wrong at it, and what the connections know."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..support import HOST
from .helpers import Echo, Keeper, Loop, ended, result, turns, until, wrap
from .serving import Guests, guest, serve, visit

if TYPE_CHECKING:
    import pytest

    from ..sockets.helpers import Net


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
