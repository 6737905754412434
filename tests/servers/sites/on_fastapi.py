"""The site as a FastAPI application."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse

from .facts import FILE, facts

__all__ = ("app",)

app = FastAPI()


@app.get("/hello", response_class=PlainTextResponse)
async def hello(request: Request) -> str:
    return f"hello over {request.url.scheme}"


@app.get("/file", response_class=FileResponse)
async def file() -> Any:
    return FILE


@app.post("/digest", response_class=PlainTextResponse)
async def digest(request: Request) -> str:
    return hashlib.sha256(await request.body()).hexdigest()


@app.get("/stream")
async def stream() -> StreamingResponse:
    async def chunks() -> AsyncIterator[bytes]:
        with FILE.open("rb") as contents:
            while chunk := contents.read(10_000):
                yield chunk

    return StreamingResponse(chunks())


@app.get("/facts")
async def about() -> dict[str, Any]:
    return facts()


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text.upper())
