"""aiohttp's client: against a server of the standard library, directly and through a proxy, where it uses ``start_tls``."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from tests.support import Authority, TlsStat

import ktls.aio

from .clients import in_kernel
from .proxy import ConnectProxy

LOOPS = pytest.mark.parametrize(
    "loop_factory",
    [ktls.aio.new_event_loop, ktls.aio.new_uvloop_event_loop],
    ids=["ours", "uvloop"],
)
Factory = Callable[[], asyncio.AbstractEventLoop]


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends a file, and says what was uploaded."""

    protocol_version = "HTTP/1.1"
    timeout = 20
    contents = b""

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer(self.contents)

    def do_POST(self) -> None:
        received = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(hashlib.sha256(received).hexdigest().encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Say nothing."""


@pytest.fixture
def port(authority: Authority, served_file: Path) -> Iterator[int]:
    """Where ``http.server`` serves on sockets of the ``ssl`` module."""
    handler = type("FileHandler", (Handler,), {"contents": served_file.read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = authority.server().wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


async def use(
    session: aiohttp.ClientSession, url: str, contents: bytes, proxy: str | None = None
) -> None:
    """Download and upload, three times each on one connection, which must be in the kernel."""
    stat = TlsStat()
    for _ in range(3):
        async with session.get(url, proxy=proxy) as response:
            assert (response.status, await response.read()) == (200, contents)
            if (connection := response.connection) is not None and connection.transport is not None:
                assert isinstance(connection.transport, ktls.aio.KTLSTransport)
        async with session.post(url, proxy=proxy, data=contents) as response:
            assert (response.status, await response.text()) == (
                200,
                hashlib.sha256(contents).hexdigest(),
            )
    in_kernel(stat, 1)


@LOOPS
def test_directly(
    authority: Authority, served_file: Path, port: int, loop_factory: Factory
) -> None:
    async def main() -> None:
        connector = aiohttp.TCPConnector(ssl=authority.client())
        async with aiohttp.ClientSession(connector=connector) as session:
            await use(session, f"https://localhost:{port}/", served_file.read_bytes())

    stat = TlsStat()
    ktls.aio.run(main(), loop_factory=loop_factory)
    in_kernel(stat, 0)


@LOOPS
def test_through_a_proxy(
    authority: Authority, served_file: Path, port: int, loop_factory: Factory
) -> None:
    async def main(proxy: str) -> None:
        connector = aiohttp.TCPConnector(ssl=authority.client())
        async with aiohttp.ClientSession(connector=connector) as session:
            await use(session, f"https://localhost:{port}/", served_file.read_bytes(), proxy)

    stat = TlsStat()
    with ConnectProxy() as proxy:
        ktls.aio.run(main(proxy.url), loop_factory=loop_factory)
        assert proxy.asked == [f"CONNECT localhost:{port} HTTP/1.1"]
    in_kernel(stat, 0)


def test_a_certificate_of_nobodys_is_refused_as_ever(port: int) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(f"https://localhost:{port}/")

    ktls.aio.run(main())
