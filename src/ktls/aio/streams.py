"""asyncio's streams over kernel TLS, with one thing more: half close works.

After the peer's close_notify, asyncio's own streams close a TLS connection; here, as over plain TCP, one may go on writing (TLS 1.3).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final, final

from .api import create_connection, create_server

__all__ = ("open_connection", "start_server")

_LIMIT: Final = 2**16


@final
class _StreamProtocol(asyncio.StreamReaderProtocol):
    """Keeps the connection open after the end of what comes in."""

    def eof_received(self) -> bool:
        super().eof_received()
        return True


async def open_connection(
    host: str | None = None,
    port: int | str | None = None,
    *,
    ssl: ssl.SSLContext | bool,
    limit: int = _LIMIT,
    **options: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect; as ``asyncio.open_connection``, with the options of ``ktls.aio.create_connection``."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = _StreamProtocol(reader, loop=loop)
    transport, _ = await create_connection(lambda: protocol, host, port, ssl=ssl, **options)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_server(
    client_connected_cb: Callable[
        [asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None
    ],
    host: Any = None,
    port: int | None = None,
    *,
    ssl: ssl.SSLContext,
    limit: int = _LIMIT,
    **options: Any,
) -> asyncio.AbstractServer:
    """Serve; as ``asyncio.start_server``, with the options of ``ktls.aio.create_server``."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.BaseProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return _StreamProtocol(reader, client_connected_cb, loop=loop)

    return await create_server(factory, host, port, ssl=ssl, **options)
