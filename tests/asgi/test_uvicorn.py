"""How uvicorn is told, what it does besides files, and what happens when it changes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as HttpToolsCycle
from websockets.asyncio.client import connect

import ktls.asgi
from ktls.asgi.seam import check_uvicorn

from ..support import HOST
from .helpers import (
    H11,
    HTTPTOOLS,
    KTLS,
    KTLS_UVLOOP,
    Server,
    body,
    read_all,
    request,
    sends,
    start,
)


def test_the_options_of_uvicorns_command_line_are_import_strings() -> None:
    config = uvicorn.Config(sends(), http=HTTPTOOLS, loop=KTLS, log_config=None)
    config.load()
    assert config.http_protocol_class is ktls.asgi.PathSendProtocol
    assert issubclass(config.http_protocol_class, HttpToolsProtocol)
    config = uvicorn.Config(sends(), http=H11, loop=KTLS_UVLOOP, log_config=None)
    config.load()
    assert config.http_protocol_class is ktls.asgi.H11PathSendProtocol
    assert issubclass(config.http_protocol_class, H11Protocol)
    for loop in (KTLS, KTLS_UVLOOP):
        factory = uvicorn.Config(sends(), loop=loop, log_config=None).get_loop_factory()
        assert factory is not None
        made = factory()
        assert isinstance(made, asyncio.AbstractEventLoop)
        made.close()


class ChangedCycle:
    """A cycle of a uvicorn to come."""

    def __init__(self) -> None:
        self.scope = self.transport = self.flow = None
        self.response_started = self.response_complete = False
        self.expected_content_length = 0

    async def send(self, message: Any) -> None:
        """Does as ever."""


def test_a_uvicorn_that_has_changed_is_refused_by_name() -> None:
    check_uvicorn(HttpToolsProtocol, HttpToolsCycle, "chunked_encoding")
    with pytest.raises(ImportError) as caught:
        check_uvicorn(
            HttpToolsProtocol, ChangedCycle, "chunked_encoding", "expected_content_length"
        )
    message = str(caught.value)
    assert f"uvicorn {uvicorn.__version__}" in message
    assert "no ChangedCycle.disconnected, ChangedCycle.chunked_encoding in" in message
    with pytest.raises(ImportError, match=r"ChangedCycle\.handle_websocket_upgrade"):
        check_uvicorn(ChangedCycle, HttpToolsCycle)


def test_websockets_are_upgraded_as_ever(server: Server) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        message = await receive()
        await send({"type": "websocket.send", "text": message["text"].upper()})
        await send({"type": "websocket.close"})

    async def main() -> None:
        host, port = server.address
        scheme = "ws" if server.context is None else "wss"
        # Not the client with threads: two of them on one object of the ``ssl`` module lose what came, now and then (Python 3.11).
        async with connect(
            f"{scheme}://{HOST}:{port}/", host=host, port=port, ssl=server.context, proxy=None
        ) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "HELLO"

    server.app = app
    asyncio.run(main())


def test_what_is_no_request_gets_its_answer(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")


def test_a_request_body_is_read_and_100_continue_sent(server: Server) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        received, more = b"", True
        while more:
            message = await receive()
            received += message["body"]
            more = message["more_body"]
        await sends(start(len(received)), body(received))(scope, receive, send)

    server.app = app
    with server.connect() as sock:
        head = request(
            "POST", "/", "Expect: 100-continue", "Content-Length: 3", "Connection: close"
        )
        sock.sendall(head)
        expected = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert sock.recv(len(expected)).lower().startswith(b"http/1.1 100")
        sock.sendall(b"abc")
        assert read_all(sock).endswith(b"\r\n\r\nabc")
