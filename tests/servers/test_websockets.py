"""The ``websockets`` library: its server with its own client, and its client on our loops against a server on plain ``ssl``."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.peers.programs import PATIENCE
from tests.support import HOST, Authority, TlsStat
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

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
    stat = TlsStat()
    options: dict[str, Any] = {"ssl": authority.client(), "proxy": None, "max_size": None}
    url = visitor.url("/", "wss")
    with connect(url, **options) as websocket:
        for message in MESSAGES:
            websocket.send(message)
            assert websocket.recv(PATIENCE) == message
        in_kernel(stat, 1)
        websocket.close(1000, "enough")
        assert websocket.close_code == 1000
    in_kernel(stat, 0)
    with connect(url, **options) as websocket:  # now the server begins to close
        websocket.send("close")
        with pytest.raises(ConnectionClosedError) as closed:
            websocket.recv(PATIENCE)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "as you like")
    with connect(url, **options) as websocket:  # and here by the end of the server
        websocket.send("still here?")
        assert websocket.recv(PATIENCE) == "still here?"
        visitor.server.stop()
        with pytest.raises(ConnectionClosedOK) as going_away:
            websocket.recv(PATIENCE)
        assert going_away.value.rcvd is not None
        assert going_away.value.rcvd.code == 1001


@pytest.fixture
def plain_server(authority: Authority) -> Iterator[int]:
    """Where the library's blocking server, on sockets of the ``ssl`` module, echoes."""

    def echo(websocket: ServerConnection) -> None:
        for message in websocket:
            if message == "close":
                websocket.close(4000, "as you like")
            else:
                websocket.send(message)

    with serve(echo, "127.0.0.1", 0, ssl=authority.server(), max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join()


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
        async with connect_async(
            url, ssl=authority.client(), proxy=None, max_size=None
        ) as websocket:
            assert isinstance(websocket.transport, ktls.aio.KTLSTransport)
            for message in MESSAGES:
                await websocket.send(message)
                assert await websocket.recv() == message
            in_kernel(stat, 1)
            await websocket.close(1000, "enough")
            assert websocket.close_code == 1000
        in_kernel(stat, 0)
        async with connect_async(url, ssl=authority.client(), proxy=None) as websocket:
            await websocket.send("close")
            with pytest.raises(ConnectionClosedError) as closed:
                await websocket.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "as you like")

    ktls.aio.run(main(), loop_factory=loop_factory)
