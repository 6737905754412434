"""The server of the soak, a process: says on stdout where it listens, serves until a line on stdin says ``end``, says what it knows.

Arguments, as one JSON object: ``loop``, ``chain``, ``file``, ``seed``, ``patience``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import sys
import traceback
from pathlib import Path
from typing import Any, Final

from tests.soak.leaks import Descriptors, find_leaks
from tests.soak.workload import (
    ACK,
    ECHO,
    HALF_CLOSED,
    HEADER_SIZE,
    SEQUENTIAL,
    Account,
    End,
    Header,
    Line,
    Mismatch,
    together,
)
from tests.support import has_kernel_tls, has_rekey

import ktls
import ktls.aio
from ktls.protocol.limits import KeyLimits

#: Enough for a few refreshes of a connection.
FEW_RECORDS: Final = 200


class Soaked:
    """The server's state."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.file = Path(options["file"])
        self.seed = options["seed"]
        self.accounts: dict[int, Account] = {}
        self.connections = self.most = self.total = 0
        self.can_rekey = has_rekey() or not has_kernel_tls()
        self.handlers: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.total += 1
        self.most = max(self.most, self.connections)
        task = asyncio.current_task()
        assert task is not None
        self.handlers.add(task)
        facts = writer.get_extra_info("ktls")
        line = Line(
            reader,
            writer,
            random.Random(f"{self.seed}/server/{self.total}"),
            self.file,
            may_refresh=False,
            may_request=facts.version() == "TLSv1.3",
        )
        try:
            await self.serve(line)
        finally:
            self.connections -= 1
            self.handlers.discard(task)

    async def serve(self, line: Line) -> None:
        account = line.account
        try:
            await self.rounds(line)
            await line.close()
        except asyncio.CancelledError:
            account.error = "cancelled"
            await self.give_up(line)
        except Mismatch as error:
            account.error = f"Mismatch: {error}"
            line.writer.transport.abort()
        except (OSError, End) as error:
            account.error = f"{type(error).__name__}: {error}"
            await self.give_up(line)

    async def give_up(self, line: Line) -> None:
        """Cut the connection, or close it in order."""
        if line.rng.random() < 0.5:
            line.writer.transport.abort()
            return
        try:
            await line.close()
        except (OSError, asyncio.CancelledError):
            # What is waited for here was cancelled, too, if that met us as we closed.
            pass

    async def rounds(self, line: Line) -> None:
        """Serve one round after the other, until the client has closed."""
        while True:
            before = line.account.received
            try:
                header = Header.decode(await line.exactly(HEADER_SIZE))
            except End as end:
                if end.clean and line.account.received == before:
                    return
                raise
            self.begin(line, header)
            await self.round(line, header)
            line.account.rounds += 1
            if header.ending == HALF_CLOSED:
                return

    def begin(self, line: Line, header: Header) -> None:
        self.accounts[header.connection] = line.account
        line.may_refresh = bool(header.style & 1) and self.can_rekey
        line.slowness = 0.02 if header.style & 4 else 0.0
        if header.cancel:
            line.account.disturbed = True
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_later(header.cancel / 1000, task.cancel)

    @staticmethod
    async def round(line: Line, header: Header) -> None:
        end, files = header.ending == HALF_CLOSED, bool(header.style & 2)
        receive, send = line.receive, line.send
        if header.mode == ECHO:
            await echo(line, header, end)
        elif header.mode == SEQUENTIAL:
            await receive(header.start, header.up, end=end)
            await send(header.start, header.down, files=files, end=end)
        else:
            await together(
                receive(header.start, header.up, end=end),
                send(header.start, header.down, files=files, end=end),
            )
        if not end and await line.exactly(1) != ACK:
            raise Mismatch("no acknowledgement")


async def echo(line: Line, header: Header, end: bool) -> None:
    async for piece in line.pieces(header.start, header.up):
        await line.writer.drain()
        line.write(piece)
        line.maybe_refresh()
    if end:
        await line.expect_end()
        line.send_end()


class Complaints(logging.Handler):
    """Everything from a warning upwards, and what the loop's exception handler is told."""

    #: What an application is told that doesn't look at its errors; ours does not, now and then.
    EXPECTED: Final = (
        "write() on a connection that is closed",
        "SSL connection is closed",
        "socket.send() raised exception.",
    )

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.made: list[str] = []
        logging.getLogger().addHandler(self)
        asyncio.get_running_loop().set_exception_handler(self.from_loop)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.EXPECTED:
            self.made.append(f"{record.name}: {message}")

    def from_loop(self, _: Any, context: dict[str, Any]) -> None:
        if type(context.get("protocol")).__name__ == "SSLProtocol":
            return  # the loop's own TLS has its own opinions
        error = context.get("exception")
        lines = traceback.format_exception(error) if error is not None else []
        self.made.append(f"{context['message']}: {context!r} {''.join(lines)}")


async def read_line() -> str:
    """Wait for a line on stdin."""
    loop = asyncio.get_running_loop()
    read: asyncio.Future[str] = loop.create_future()

    def take() -> None:
        loop.remove_reader(0)
        read.set_result(sys.stdin.readline())

    loop.add_reader(0, take)
    try:
        return (await read).strip()
    finally:
        loop.remove_reader(0)


def port_of(server: asyncio.AbstractServer) -> int:
    """Return where it listens."""
    assert isinstance(server, ktls.aio.Server)
    port: int = server.sockets[0].getsockname()[1]
    return port


def say(**facts: Any) -> None:
    """Write one JSON object to stdout."""
    print(json.dumps(facts), flush=True)


async def main(options: dict[str, Any]) -> None:
    complaints = Complaints()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(options["chain"])
    soaked = Soaked(options)
    descriptors = Descriptors()
    limits = KeyLimits(records=FEW_RECORDS) if soaked.can_rekey else KeyLimits()
    servers = [
        await ktls.aio.start_server(
            soaked.connected,
            "127.0.0.1",
            0,
            ssl=context,
            backlog=1024,
            # On a slow machine the rest of a large file may take longer than the default.
            ssl_shutdown_timeout=options["patience"],
            settings=ktls.Settings(key_limits=key_limits),
        )
        for key_limits in (KeyLimits(), limits)
    ]
    say(ports=[port_of(server) for server in servers])
    while (word := await read_line()) != "end":
        say(connections=soaked.connections, word=word)
    for server in servers:
        server.close()
    # With the contexts go the descriptors that their secrets come through.
    del server, servers, context
    await asyncio.wait(soaked.handlers or {asyncio.create_task(asyncio.sleep(0))}, timeout=20)
    leaks = await find_leaks(descriptors)
    say(
        accounts={key: account.as_json() for key, account in soaked.accounts.items()},
        complaints=complaints.made,
        leaks=leaks,
        most=soaked.most,
    )


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    ktls.aio.run(main(arguments), loop_factory=getattr(ktls.aio, arguments["loop"]))
