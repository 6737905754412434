"""The site as an aiohttp server. Arguments: how to run it, certificate."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import socket
import ssl
import sys

from aiohttp import WSMsgType, web

import ktls.aio

from .facts import FILE, facts

__all__ = ("application",)


async def hello(request: web.Request) -> web.StreamResponse:
    return web.Response(text=f"hello over {request.scheme}")


async def file(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(FILE)


async def digest(request: web.Request) -> web.StreamResponse:
    seen = hashlib.sha256()
    async for chunk in request.content.iter_any():
        seen.update(chunk)
    return web.Response(text=seen.hexdigest())


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with FILE.open("rb") as contents:
        while chunk := contents.read(10_000):
            await response.write(chunk)
    await response.write_eof()
    return response


async def about(request: web.Request) -> web.StreamResponse:
    return web.json_response(facts())


async def echo(request: web.Request) -> web.StreamResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        if message.type == WSMsgType.TEXT:
            await websocket.send_str(message.data.upper())
    return websocket


def application() -> web.Application:
    app = web.Application(client_max_size=2**24)
    app.add_routes(
        [
            web.get("/hello", hello),
            web.get("/file", file),
            web.post("/digest", digest),
            web.get("/stream", stream),
            web.get("/facts", about),
            web.get("/echo", echo),
        ]
    )
    return app


async def run_with_runner(context: ssl.SSLContext) -> None:
    """Serve until SIGTERM, on whatever loop this runs."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    runner = web.AppRunner(application())
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        print(f"https://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await stopped.wait()
    finally:
        await runner.cleanup()


def main(how: str, certificate: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    match how:
        case "run_app" | "run_app-uvloop":
            uvloop = how == "run_app-uvloop"
            with socket.create_server(("127.0.0.1", 0)) as listener:
                print(f"https://127.0.0.1:{listener.getsockname()[1]}", flush=True)
                web.run_app(
                    application(),
                    sock=listener,
                    ssl_context=context,
                    print=None,
                    loop=ktls.aio.new_uvloop_event_loop() if uvloop else ktls.aio.new_event_loop(),
                )
        case "runner":
            with contextlib.suppress(KeyboardInterrupt):
                ktls.aio.run(run_with_runner(context))


if __name__ == "__main__":
    main(*sys.argv[1:])
