"""Starlette and FastAPI as they are: which responses become files, and that the others are what they were."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .helpers import App, Server


class Spy:
    """Counts the messages that an application sends."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.sent: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def spying(message: Any) -> None:
            self.sent.append(message["type"])
            await send(message)

        await self._app(scope, receive, spying)

    @property
    def files(self) -> int:
        """How many files the server was asked to send."""
        return self.sent.count("http.response.pathsend")


def serve(server: Server, path: Path, *middleware: Middleware) -> Spy:
    """Serve ``path`` at /file, and its directory below /static."""

    async def file(request: Request) -> Response:
        return FileResponse(path)

    spy = Spy(
        Starlette(
            routes=[
                Route("/file", file),
                Mount("/static", StaticFiles(directory=path.parent)),
            ],
            middleware=list(middleware),
        )
    )
    server.app = spy
    return spy


@pytest.mark.parametrize("which", ["small", "big"])
@pytest.mark.parametrize("where", ["/file", "/static/{}"])
def test_whole_files_are_sent_as_files(
    server: Server, which: str, where: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(which)
    spy = serve(server, path)
    response, received = server.get(where.format(path.name))
    assert response.status == 200
    assert response.getheader("content-length") == str(path.stat().st_size)
    assert response.getheader("etag") is not None
    assert received == path.read_bytes()
    assert spy.files == 1


def test_head_has_the_length_and_no_body(server: Server, big: Path, contents: bytes) -> None:
    spy = serve(server, big)
    with server.client() as client:
        client.request("HEAD", "/file")
        response = client.getresponse()
        assert response.getheader("content-length") == str(len(contents))
        assert response.read() == b""
        client.request("GET", "/file")
        assert client.getresponse().read() == contents
    assert spy.files == 1


@pytest.mark.parametrize(
    ("asked", "start", "end"), [("5-9", 5, 10), ("2000000-", 2_000_000, None), ("-7", -7, None)]
)
def test_a_range(
    server: Server, big: Path, contents: bytes, asked: str, start: int, end: int | None
) -> None:
    serve(server, big)
    with server.client() as client:
        for _ in range(2):
            client.request("GET", "/file", headers={"Range": f"bytes={asked}"})
            response = client.getresponse()
            assert response.status == 206
            assert response.read() == contents[start:end]


def test_several_ranges(server: Server, big: Path, contents: bytes) -> None:
    serve(server, big)
    response, received = server.get("/file", Range="bytes=0-9,500000-1500000")
    assert response.status == 206
    kind = re.fullmatch("multipart/byteranges; boundary=(.*)", response.headers["content-type"])
    assert kind is not None
    parts = received.split(b"--" + kind[1].encode())
    bodies = [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts[1:-1]]
    assert bodies == [contents[:10], contents[500_000:1_500_001]]


def test_if_range(server: Server, big: Path, contents: bytes) -> None:
    spy = serve(server, big)
    etag = server.get("/file")[0].headers["etag"]
    response, received = server.get("/file", Range="bytes=0-9", If_Range=etag)
    assert (response.status, received) == (206, contents[:10])
    assert spy.files == 1
    response, received = server.get("/file", Range="bytes=0-9", If_Range='"another"')
    assert (response.status, received) == (200, contents)
    assert spy.files == 2


def test_a_range_beyond_the_end(server: Server, small: Path) -> None:
    serve(server, small)
    assert server.get("/file", Range="bytes=1000000-")[0].status == 416


def test_not_modified(server: Server, small: Path) -> None:
    spy = serve(server, small)
    etag = server.get(f"/static/{small.name}")[0].headers["etag"]
    response, received = server.get(f"/static/{small.name}", If_None_Match=etag)
    assert (response.status, received) == (304, b"")
    assert spy.files == 1


async def _untouched(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    response = await call_next(request)
    response.headers["x-middleware"] = "was here"
    return response


@pytest.mark.parametrize("which", ["small", "big"])
@pytest.mark.parametrize(
    "middleware",
    [Middleware(GZipMiddleware), Middleware(BaseHTTPMiddleware, dispatch=_untouched)],
    ids=["gzip", "base"],
)
def test_middleware_lets_files_through(
    server: Server, which: str, middleware: Middleware, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(which)
    spy = serve(server, path, middleware)
    with server.client() as client:
        for _ in range(2):
            client.request("GET", "/file", headers={"Accept-Encoding": "gzip"})
            response = client.getresponse()
            assert response.getheader("content-encoding") is None
            assert response.read() == path.read_bytes()
    assert spy.files == 2


def test_fastapi_runs_background_tasks_after_the_file(
    server: Server, big: Path, contents: bytes
) -> None:
    ran = threading.Event()
    app = fastapi.FastAPI()

    @app.get("/file")
    async def file() -> FileResponse:
        return FileResponse(big, background=BackgroundTask(ran.set))

    spy = Spy(app)
    server.app = spy
    assert server.get("/file")[1] == contents
    assert ran.wait(20)
    assert spy.files == 1


def test_a_missing_file_is_starlettes_error(server: Server, tmp_path: Path) -> None:
    spy = serve(server, tmp_path / "missing")
    assert server.get("/file")[0].status == 500
    assert server.get("/static/missing")[0].status == 404
    assert spy.files == 0
