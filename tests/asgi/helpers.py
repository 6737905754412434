"""uvicorn in a thread, on every kind of loop and transport; clients that look closely; applications that send files."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import uvicorn
from tests.support import HOST, Authority

App: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

HTTPTOOLS: Final = "ktls.asgi:PathSendProtocol"
H11: Final = "ktls.asgi:H11PathSendProtocol"
DEADLINE: Final = 20.0


@dataclass(frozen=True)
class Front:
    """What uvicorn is started with."""

    loop: str
    tls: bool
    http: str = HTTPTOOLS

    def __str__(self) -> str:
        http = "h11" if self.http == H11 else "httptools"
        return f"{self.loop.rpartition(':')[2]}-{'tls' if self.tls else 'plain'}-{http}"


KTLS: Final = "ktls.aio:new_event_loop"
KTLS_UVLOOP: Final = "ktls.aio:new_uvloop_event_loop"
#: The transports that are ours.
OURS: Final = [Front(KTLS, tls=True), Front(KTLS_UVLOOP, tls=True), Front(KTLS, tls=True, http=H11)]
#: Everything else that an application may meet.
OTHERS: Final = [
    Front("asyncio", tls=False),
    Front("asyncio", tls=False, http=H11),
    Front("asyncio", tls=True),
    Front("uvloop", tls=False),
    Front("uvloop", tls=True),
    Front("uvloop", tls=True, http=H11),
    Front(KTLS, tls=False),
]
FRONTS: Final = OURS + OTHERS


class Server(uvicorn.Server):
    """A running server whose application can be changed: ``app``."""

    app: App
    loop: asyncio.AbstractEventLoop

    def __init__(self, front: Front, authority: Authority) -> None:
        super().__init__(
            uvicorn.Config(
                self._call,
                loop=front.loop,
                http=front.http,
                interface="asgi3",
                lifespan="off",
                log_config=None,
                log_level="info",
                ssl_certfile=str(authority.server_chain) if front.tls else None,
                timeout_keep_alive=60,
            )
        )
        self.front = front
        self.context = authority.client() if front.tls else None
        self.stopping = threading.Event()
        self._started = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Small enough for a file of a few MiB to be under way for as long as the client likes.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self.run, args=([self._listener],), name=str(front))

    async def _call(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self._started.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.stopping.set()
        await super().shutdown(sockets)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._started.wait(DEADLINE)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.should_exit = True
        self.join()
        self._listener.close()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    @contextlib.contextmanager
    def connect(self, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
        """Open a connection, TLS if the server speaks that."""
        with socket.socket() as sock:
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.settimeout(DEADLINE)
            sock.connect(self.address)
            if self.context is None:
                yield sock
            else:
                with self.context.wrap_socket(sock, server_hostname=HOST) as tls:
                    yield tls

    @contextlib.contextmanager
    def client(self) -> Iterator[http.client.HTTPConnection]:
        """Open a connection with ``http.client``."""
        client = http.client.HTTPConnection(HOST, self.address[1], timeout=DEADLINE)
        with self.connect() as sock:
            client.sock = sock
            yield client
            client.sock = None  # which is not its to close

    def get(
        self, path: str = "/", method: str = "GET", **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Make one request on a connection of its own; underscores in ``headers`` are hyphens."""
        with self.client() as client:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            client.request(method, path, headers=names)
            response = client.getresponse()
            return response, response.read()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def read_all(sock: socket.socket) -> bytes:
    """Read to the end, however it comes."""
    received = bytearray()
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        while data := sock.recv(65536):
            received += data
    return bytes(received)


def read_head(sock: socket.socket) -> bytes:
    """Read a response's head, and not a byte more of the socket than TLS makes necessary."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(1)
    return received


def request(method: str = "GET", path: str = "/", *headers: str, version: str = "1.1") -> bytes:
    """Write a request down."""
    lines = (f"{method} {path} HTTP/{version}", f"Host: {HOST}", *headers, "", "")
    return "\r\n".join(lines).encode()


def open_descriptors(path: Path) -> int:
    """How often this process has ``path`` open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += os.readlink(link) == str(path)
    return count


def start(length: int | None = None, status: int = 200, *headers: tuple[bytes, bytes]) -> Any:
    """Make the message that starts a response."""
    listed = list(headers)
    if length is not None:
        listed.append((b"content-length", b"%d" % length))
    return {"type": "http.response.start", "status": status, "headers": listed}


def pathsend(path: Path) -> Any:
    """Make the message that names a file."""
    return {"type": "http.response.pathsend", "path": str(path)}


def zerocopysend(file: Any, **more: Any) -> Any:
    """Make the message that gives a file."""
    return {"type": "http.response.zerocopysend", "file": file, **more}


def body(data: bytes = b"", *, more_body: bool = False) -> Any:
    """Make the message that carries bytes."""
    return {"type": "http.response.body", "body": data, "more_body": more_body}


def sends(*messages: Any) -> App:
    """Make an application that sends ``messages`` whatever is asked."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app
