"""The ``websockets`` library: its server with its own client, and its client on our loops against a server on plain ``ssl``."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from tests.peers.programs import PATIENCE
from tests.support import HOST, Authority, TlsStat
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK

import ktls.aio

from .clients import in_kernel
from .conftest import Start

FACTORIES = ["new_event_loop", "new_uvloop_event_loop"]
MESSAGES: list[str | bytes] = ["hello", b"\x00\x01", "ä" * 50_000, bytes(1_000_000), "", b""]


@pytest.mark.parametrize("factory", FACTORIES)
def test_server(start: Start, authority: Authority, factory: str) -> None:
    visitor = start(
        *(sys.executable, "-m", "tests.servers.sites.on_websockets"),
        *(factory, authority.server_chain),
        says="out",
    )
    options: dict[str, Any] = {"ssl": authority.client(), "proxy": None, "max_size": None}
    url = visitor.url("/", "wss")

    async def main() -> None:
        stat = TlsStat()
        async with connect(url, **options) as websocket:
            for message in MESSAGES:
                await websocket.send(message)
                assert await websocket.recv() == message
            in_kernel(stat, 1)
            await websocket.close(1000, "enough")
            assert websocket.close_code == 1000
        in_kernel(stat, 0)
        async with connect(url, **options) as websocket:  # now the server begins to close
            await websocket.send("close")
            with pytest.raises(ConnectionClosedError) as closed:
                await websocket.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "as you like")
        async with connect(url, **options) as websocket:  # and here by the end of the server
            await websocket.send("still here?")
            assert await websocket.recv() == "still here?"
            stopping = asyncio.get_running_loop().run_in_executor(None, visitor.server.stop)
            with pytest.raises(ConnectionClosedOK) as going_away:
                await websocket.recv()
            assert going_away.value.rcvd is not None
            assert going_away.value.rcvd.code == 1001
            await stopping

    asyncio.run(main())


@pytest.fixture
def plain_server(authority: Authority) -> Iterator[int]:
    """Where the library's server on asyncio's own TLS echoes."""

    async def echo(websocket: ServerConnection) -> None:
        async for message in websocket:
            if message == "close":
                await websocket.close(4000, "as you like")
                return
            await websocket.send(message)

    async def main() -> None:
        async with serve(echo, "127.0.0.1", 0, ssl=authority.server(), max_size=None) as server:
            port.set_result(server.sockets[0].getsockname()[1])
            await stop.wait()

    stop = asyncio.Event()
    port: Future[int] = Future()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    yield port.result(PATIENCE)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.mark.parametrize(
    "loop_factory",
    [ktls.aio.new_event_loop, ktls.aio.new_uvloop_event_loop],
    ids=["ours", "uvloop"],
)
def test_client(
    authority: Authority,
    plain_server: int,
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        url = f"wss://{HOST}:{plain_server}/"
        stat = TlsStat()
        async with connect(url, ssl=authority.client(), proxy=None, max_size=None) as websocket:
            assert isinstance(websocket.transport, ktls.aio.KTLSTransport)
            for message in MESSAGES:
                await websocket.send(message)
                assert await websocket.recv() == message
            in_kernel(stat, 1)
            await websocket.close(1000, "enough")
            assert websocket.close_code == 1000
        in_kernel(stat, 0)
        async with connect(url, ssl=authority.client(), proxy=None) as websocket:
            await websocket.send("close")
            with pytest.raises(ConnectionClosedError) as closed:
                await websocket.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "as you like")

    ktls.aio.run(main(), loop_factory=loop_factory)
