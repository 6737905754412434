"""The process that ``long_run`` watches: an asyncio program with kernel TLS, a server for everybody and a client for whoever asks.

Told by JSON in its argument, by lines on its standard input; says what became of every connection as a line of JSON, and forgets it. A stream begins with a name, by which both
sides know it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import ssl
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Final

import ktls
import ktls.aio
from ktls.handshake.keylog import tap_for

from ..support import HOST
from .leaks import Descriptors, find_leaks

#: Length of the name that a stream begins with.
NAME: Final = 12
#: Bytes that our client sends before it waits for all of them to come back.
PIECE: Final = 20_000
#: Records under one key; the kernel's own counter decides.
RECORDS: Final = 200


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


class Account:
    """What went over a connection."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.received = self.sent = 0
        self.name = b""
        self.end = ""
        self.generations = [0, 0]
        self._digest = hashlib.sha256()

    def add(self, data: bytes) -> None:
        self.received += len(data)
        self._digest.update(data)
        if len(self.name) < NAME:
            self.name += data[: NAME - len(self.name)]

    def look(self, writer: asyncio.StreamWriter) -> None:
        """Note how often the keys have changed. After its end nobody can tell."""
        try:
            usage = writer.get_extra_info("ktls").key_usage
        except ValueError:
            return
        self.generations = [usage.tx.generation, usage.rx.generation]

    def close(self) -> None:
        """Say it."""
        say(
            name=self.name.decode(),
            role=self.role,
            received=self.received,
            digest=self._digest.hexdigest(),
            sent=self.sent,
            end=self.end,
            generations=self.generations,
        )


def what(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class Victim:
    """Serves and asks."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._file = Path(options["file"])
        self._settings = ktls.Settings(
            key_limits=ktls.KeyLimits(records=RECORDS), shutdown_timeout=60
        )
        self._server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server_context.load_cert_chain(options["chain"])
        self._client_context = ssl.create_default_context(cafile=options["authority"])
        self._patience = options["patience"]
        for context in (self._server_context, self._client_context):
            tap_for(context)  # now, so that its descriptors are there before they are counted
        self.open = 0

    async def start(self) -> list[asyncio.AbstractServer]:
        """Listen: echo, files, and orders in clear."""
        arguments: Any = {
            "ssl": self._server_context,
            "settings": self._settings,
            "suppress_ragged_eofs": False,
        }
        return [
            await ktls.aio.start_server(self.echo, "127.0.0.1", 0, **arguments),
            await ktls.aio.start_server(self.send_file, "127.0.0.1", 0, **arguments),
            await asyncio.start_server(self.ask, "127.0.0.1", 0, limit=2**20),
        ]

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        account = Account("server")
        self.open += 1
        try:
            async with asyncio.timeout(self._patience):
                while data := await reader.read(65536):
                    account.add(data)
                    writer.write(data)
                    await writer.drain()
                    account.sent += len(data)
            account.end = "clean"
        except (OSError, TimeoutError) as error:
            account.end = what(error)
        await self.finish(account, writer)

    async def finish(self, account: Account, writer: asyncio.StreamWriter) -> None:
        account.look(writer)
        writer.close()
        try:
            await writer.wait_closed()
        except OSError as error:
            if account.end == "clean":
                account.end = "closing: " + what(error)
        self.open -= 1
        account.close()

    async def send_file(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a request of curl's with the file."""
        account = Account("files")
        self.open += 1
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            account.add(request.split()[1][1:])
            size = self._file.stat().st_size
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            with self._file.open("rb") as file:
                account.sent = await ktls.aio.sendfile(writer, file)
            account.end = "clean"
        except (OSError, EOFError) as error:
            account.end = what(error)
        await self.finish(account, writer)

    async def ask(self, orders: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        """Be a client: an order is a port and text to send there, which has to come back."""
        order = json.loads(await orders.readline())
        account = Account("client")
        self.open += 1
        writer = None
        try:
            async with asyncio.timeout(self._patience):
                reader, writer = await ktls.aio.open_connection(
                    "127.0.0.1",
                    order["port"],
                    ssl=self._client_context,
                    server_hostname=HOST,
                    settings=self._settings,
                    suppress_ragged_eofs=False,
                )
                await self._send_and_receive(reader, writer, order["text"].encode(), account)
            account.end = "clean"
        except (OSError, TimeoutError, EOFError, ValueError) as error:
            account.end = what(error)
        if writer is not None:
            await self.finish(account, writer)
        else:
            self.open -= 1
            account.close()
        back.close()
        await back.wait_closed()

    async def _send_and_receive(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        text: bytes,
        account: Account,
    ) -> None:
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE]
            writer.write(piece)
            await writer.drain()
            account.sent += len(piece)
            while account.received < account.sent:
                data = await reader.read(65536)
                if not data:
                    raise EOFError("the peer closed early")
                account.add(data)
        if writer.can_write_eof():  # TLS 1.3
            writer.write_eof()
            if await reader.read(1):
                raise ValueError("more came back than was sent")


class Complaints(logging.Handler):
    """What is logged, of warnings upwards, and exceptions that nobody wanted."""

    def emit(self, record: logging.LogRecord) -> None:
        say(complaint=f"{record.name}: {record.getMessage()}")


def complain(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    say(complaint=f"loop: {context['message']} {what(error) if error is not None else ''}")


async def main(options: dict[str, Any]) -> None:
    logging.getLogger().addHandler(Complaints(logging.WARNING))
    logging.captureWarnings(True)
    warnings.simplefilter("always")
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(complain)
    await loop.run_in_executor(None, int)  # the pool's thread is there before it counts
    victim = Victim(options)
    warm_up, descriptors = threading.active_count(), Descriptors()
    servers: Any = await victim.start()
    say(ports=[server.sockets[0].getsockname()[1] for server in servers])
    while (await loop.run_in_executor(None, sys.stdin.readline)).strip() == "count":
        say(open=victim.open)
    for server in servers:
        server.close()
        await server.wait_closed()
    leaks = await find_leaks(descriptors)
    if (threads := threading.active_count()) > warm_up:
        leaks.append(f"{threads - warm_up} threads")
    say(leaks=leaks)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
