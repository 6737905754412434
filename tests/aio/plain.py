"""Plain connections under the loops of ``ktls.aio``, which are to become TLS or to be left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from .helpers import Keeper, turns, until, wrap

if TYPE_CHECKING:
    import socket
    import ssl

    from ..sockets.helpers import Net


#: What one end of a connection of streams does.
Talk: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

#: The loops whose own ``ssl=`` is kernel TLS.
own = pytest.mark.parametrize("own", ["asyncio", "uvloop"])


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


async def connect_plain(sock: socket.socket) -> tuple[Any, Keeper]:
    """Make a plain transport of ``sock``, as the running loop does."""
    loop = asyncio.get_running_loop()
    return await loop.create_connection(Keeper, sock=nonblocking(sock))


async def stop(server: asyncio.Server) -> None:
    """Close ``server``, and let its connections come to their ends."""
    server.close()
    await server.wait_closed()
    await turns(20)


async def talk(serve: Talk, visit: Talk) -> None:
    """Run ``serve`` and ``visit`` over a plain connection, one at each end, and close it."""
    done = asyncio.get_running_loop().create_future()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer)
        writer.close()
        await writer.wait_closed()
        done.set_result(None)

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await visit(reader, writer)
    writer.close()
    await writer.wait_closed()
    await done
    await stop(server)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What ``ktls.aio`` has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "ktls.aio"]


async def chat(transport: Any, keeper: Any, said: bytes = b"hello") -> None:
    """Say something to an echo, hear it, and end."""
    transport.write(said)
    await until(lambda: keeper.diary.data == said)
    transport.close()
    await until(lambda: keeper.diary.lost)
    assert keeper.diary.error is None
