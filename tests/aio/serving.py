"""Servers on the loops of ``ktls.aio``, and who visits them."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

from ..sockets.helpers import Net, read_exactly
from .helpers import Echo, Loop, ended, result, wrap

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
        """Wait until all connections have been lost."""
        await ended(self.keepers)


async def serve(net: Net, loop: Loop, factory: Any, host: Any = LOCAL, **options: Any) -> Any:
    """Start a server. ``options`` go to ``create_server``."""
    options.setdefault("ssl", net.context("ktls", "server"))
    if "sock" not in options:
        options.setdefault("port", 0)
        options["host"] = host
    return await loop.create_server(factory, **options)


async def guest(net: Net, server: Any) -> Any:
    """A connection that stays; returns its blocking end."""
    address = server.sockets[0].getsockname()
    sock = net.keep(socket.create_connection(address[:2], 20))
    tls = await result(net.spawn(wrap, net.context("stdlib", "client"), sock, server_side=False))
    return net.keep(tls)
