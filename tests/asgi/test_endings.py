"""Lengths that are wrong, files that shrink, clients that leave, applications that are cancelled, servers that are stopped."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import Authority

from .helpers import (
    FRONTS,
    App,
    Front,
    Server,
    body,
    open_descriptors,
    pathsend,
    read_all,
    read_head,
    request,
    sends,
    start,
    wait_for,
    zerocopysend,
)

TOO_LONG = "Response content longer than Content-Length"
#: uvicorn's on httptools, h11's.
TOO_SHORT = (
    "Response content shorter than Content-Length",
    "Too little data for declared Content-Length",
)
SMALL_BUFFER = 16 * 1024


class Watched:
    """Runs an application and remembers how it ended, and what ``receive`` said then."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.error: BaseException | None = None
        self.afterwards: Any = None
        self.ended = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        try:
            await self._app(scope, receive, send)
            self.afterwards = await receive()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.ended.set()


def raises_too_short(watched: Watched) -> bool:
    """Whether the application has seen that error."""
    return any(text in str(watched.error) for text in TOO_SHORT)


def set_up(server: Server, app: App) -> Watched:
    """Make the server run ``app``, watched."""
    watched = Watched(app)
    server.app = watched
    return watched


@pytest.mark.parametrize("length", [0, 1, 20_000, 1_000_000])
def test_a_file_that_is_longer_is_cut_at_the_length(
    server: Server,
    big: Path,
    contents: bytes,
    length: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = set_up(server, sends(start(length), pathsend(big)))
    with server.connect() as sock:
        sock.sendall(request())
        assert read_all(sock).partition(b"\r\n\r\n")[2] == contents[:length]
    assert watched.ended.wait(20)
    assert TOO_LONG in str(watched.error)
    wait_for(lambda: "Exception in ASGI application" in caplog.text)


def test_parts_that_are_longer_together_are_cut_at_the_length(
    server: Server, big: Path, contents: bytes
) -> None:
    with big.open("rb") as file:
        parts = [zerocopysend(file, offset=0, count=300_000, more_body=True)] * 3
        watched = set_up(server, sends(start(700_001), *parts))
        with server.connect() as sock:
            sock.sendall(request())
            expected = (contents[:300_000] * 3)[:700_001]
            assert read_all(sock).partition(b"\r\n\r\n")[2] == expected
        assert watched.ended.wait(20)
    assert TOO_LONG in str(watched.error)


def test_a_status_without_a_body_gets_none(server: Server, big: Path) -> None:
    watched = set_up(server, sends(start(None, 304), pathsend(big)))
    with server.connect() as sock:
        sock.sendall(request())
        assert read_all(sock).endswith(b"\r\n\r\n")
    assert watched.ended.wait(20)
    assert TOO_LONG in str(watched.error)


@pytest.mark.parametrize("which", ["small", "big"])
def test_a_file_that_is_shorter_is_sent_and_the_connection_closed(
    server: Server, which: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(which)
    expected = path.read_bytes()
    watched = set_up(server, sends(start(len(expected) + 1), pathsend(path)))
    with server.client() as client:
        client.request("GET", "/")
        with pytest.raises(http.client.IncompleteRead) as caught:
            client.getresponse().read()
    assert caught.value.partial == expected
    assert watched.ended.wait(20)
    assert raises_too_short(watched)


@pytest.mark.parametrize("sized", [True, False], ids=["length", "chunked"])
def test_a_file_that_shrinks_while_it_is_sent_ends_the_connection(
    server: Server, growing: Path, contents: bytes, sized: bool
) -> None:
    watched = set_up(server, sends(start(len(contents) if sized else None), pathsend(growing)))
    with server.connect(receive_buffer=SMALL_BUFFER) as sock:
        sock.sendall(request())
        head = read_head(sock)
        os.truncate(growing, 2_000_000)  # more than can be under way
        received = read_all(sock)
    assert watched.ended.wait(20)
    if not sized:
        assert b"chunked" in head
        size, _, received = received.partition(b"\r\n")
        assert int(size, 16) == len(contents)
        assert "shorter while it was being sent" in str(watched.error)
    else:
        assert raises_too_short(watched)
    assert received == contents[: len(received)]
    assert len(received) <= 2_000_000
    wait_for(lambda: not open_descriptors(growing))


def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_was(
    server: Server, growing: Path, contents: bytes
) -> None:
    server.app = sends(start(), pathsend(growing))
    with server.connect(receive_buffer=SMALL_BUFFER) as sock:
        sock.sendall(request("GET", "/", "Connection: close"))
        read_head(sock)
        with growing.open("ab") as file:
            file.write(b"more")
        assert read_all(sock) == b"%x\r\n%s\r\n0\r\n\r\n" % (len(contents), contents)


def test_an_application_that_goes_on_after_the_error_reaches_nobody(
    server: Server, growing: Path, contents: bytes
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(len(contents)))
        with pytest.raises(RuntimeError):
            await send(pathsend(growing))
        await send(body(b"padding" * 1000, more_body=True))
        await send(pathsend(growing))
        await send(body(b"padding" * 1000))

    watched = set_up(server, app)
    with server.connect(receive_buffer=SMALL_BUFFER) as sock:
        sock.sendall(request())
        read_head(sock)
        os.truncate(growing, 2_000_000)
        received = read_all(sock)
    assert received == contents[: len(received)]
    assert watched.ended.wait(20)
    assert watched.afterwards == {"type": "http.disconnect"}


@pytest.mark.parametrize("sized", [True, False], ids=["length", "chunked"])
def test_a_client_that_leaves_is_no_error(
    server: Server, big: Path, sized: bool, caplog: pytest.LogCaptureFixture
) -> None:
    later = body(more_body=True), pathsend(big), body()
    watched = set_up(
        server,
        sends(
            start(4 * big.stat().st_size if sized else None),
            zerocopysend(os.open(big, os.O_RDONLY), more_body=True),
            *later,
        ),
    )
    with server.connect(receive_buffer=SMALL_BUFFER) as sock:
        sock.sendall(request())
        read_head(sock)
        assert open_descriptors(big) == 1
        assert not watched.ended.is_set()  # ``send`` has not returned before the file is gone
        # No farewell: the connection is reset.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        assert watched.ended.wait(20)
    assert watched.error is None
    assert watched.afterwards == {"type": "http.disconnect"}
    assert [record for record in caplog.records if record.levelno > 20] == []
    assert open_descriptors(big) == 1  # the application's own
    _close_all(big)


def test_a_client_that_leaves_what_it_never_read_holds_nothing_up(server: Server) -> None:
    # The response and the goodbye fit into the server's buffers, but not into the client's.
    server.app = sends(start(60_000, 200, (b"connection", b"close")), body(bytes(60_000)))
    with server.connect(receive_buffer=SMALL_BUFFER) as sock:
        sock.sendall(request())
        read_head(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: not server.server_state.connections)


def _close_all(path: Path) -> None:
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and os.readlink(link) == str(path):
            os.close(int(link.name))


def test_a_cancelled_application_leaves_no_response_that_looks_complete(
    server: Server, big: Path, contents: bytes
) -> None:
    sending = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        task = asyncio.ensure_future(send(pathsend(big)))
        await sending.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not open_descriptors(big)
        await send(body(b"padding"))

    watched = set_up(server, app)
    with server.connect(receive_buffer=SMALL_BUFFER) as sock:
        sock.sendall(request())
        read_head(sock)
        wait_for(lambda: open_descriptors(big))
        server.loop.call_soon_threadsafe(sending.set)
        assert watched.ended.wait(20)
        received = read_all(sock).partition(b"\r\n")[2]
    assert watched.error is None
    assert received == contents[: len(received)]
    assert len(received) < len(contents)


@pytest.fixture(params=FRONTS, ids=str)
def own_server(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Server]:
    """A server that the test may stop."""
    with Server(request.param, authority) as server:
        yield server


def test_a_server_that_is_stopped_finishes_what_it_sends(
    own_server: Server, big: Path, contents: bytes
) -> None:
    front: Front = own_server.front
    own_server.app = sends(start(len(contents)), pathsend(big))
    with own_server.connect(receive_buffer=SMALL_BUFFER) as sock, own_server.connect():
        sock.sendall(request())
        read_head(sock)
        own_server.should_exit = True
        assert own_server.stopping.wait(20)
        assert read_all(sock) == contents
    own_server.join()
    assert not own_server.server_state.connections, str(front)
