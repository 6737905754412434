"""The site as a Starlette application."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from .facts import FILE, facts

__all__ = ("app",)


async def hello(request: Request) -> Response:
    return PlainTextResponse(f"hello over {request.url.scheme}")


async def file(request: Request) -> Response:
    return FileResponse(FILE)


async def digest(request: Request) -> Response:
    seen = hashlib.sha256()
    async for chunk in request.stream():
        seen.update(chunk)
    return PlainTextResponse(seen.hexdigest())


async def stream(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        with FILE.open("rb") as contents:
            while chunk := contents.read(10_000):
                yield chunk

    return StreamingResponse(chunks())


async def about(request: Request) -> Response:
    return JSONResponse(facts())


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text.upper())


app = Starlette(
    routes=[
        Route("/hello", hello),
        Route("/file", file),
        Route("/digest", digest, methods=["POST"]),
        Route("/stream", stream),
        Route("/facts", about),
        WebSocketRoute("/echo", echo),
    ]
)
