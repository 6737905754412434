"""A server of the ``websockets`` library: echoes text and binary messages. Arguments: loop factory, certificate."""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys

from websockets.asyncio.server import ServerConnection, serve

import ktls.aio

__all__ = ()


async def echo(websocket: ServerConnection) -> None:
    async for message in websocket:
        if message == "close":
            await websocket.close(4000, "as you like")
            return
        await websocket.send(message)


async def main(certificate: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with serve(echo, "127.0.0.1", 0, ssl=context, max_size=2**24) as server:
        print(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await stopped.wait()


if __name__ == "__main__":
    ktls.aio.run(main(sys.argv[2]), loop_factory=getattr(ktls.aio, sys.argv[1]))
