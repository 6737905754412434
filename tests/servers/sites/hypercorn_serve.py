"""hypercorn started by a program of one's own. Argument: certificate."""

from __future__ import annotations

import asyncio
import signal
import sys

from hypercorn.asyncio import serve
from hypercorn.config import Config

import ktls.aio

from .on_starlette import app

__all__ = ()


async def main(certificate: str) -> None:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.certfile = certificate
    config.keyfile = certificate
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await serve(app, config, shutdown_trigger=stopped.wait)  # type: ignore[arg-type]  # hypercorn's types are narrower than what it takes


if __name__ == "__main__":
    ktls.aio.run(main(sys.argv[1]))
