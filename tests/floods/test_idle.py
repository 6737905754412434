"""Many idle connections on one server: what each takes, that they take no time, and that all of them end in order."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..aio.helpers import Echo, Keeper, Loop, until
from ..support import HOST, TLS13

if TYPE_CHECKING:
    from ..sockets.helpers import Net

#: The long form has as many as a busy server may have; the short one shows the same figures.
_COUNT: Final = 2000 if os.environ.get("KTLS_TRUST") else 300
_WARM_UP: Final = 50
#: Seconds for all of it.
_PATIENCE: Final = 240 if os.environ.get("KTLS_TRUST") else 30
#: KiB of anonymous memory for both ends of one: ours that is a client keeps its handshake engine, for tickets. (The server's end by itself: ``bench/idle_memory.py``.)
_BOTH_ENDS: Final = 96


def memory() -> int:
    gc.collect()
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= count, f"ulimit -n {hard}: too few descriptors"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def busy_time() -> float:
    """CPU time that this process takes while nothing happens for a while."""
    start = time.process_time()
    await asyncio.sleep(0.1)
    return time.process_time() - start


def test_many_idle_connections(net: Net, loop: Loop) -> None:
    allow_descriptors(2 * _COUNT + 1000)
    taken: list[float] = []

    async def main() -> None:
        echoes: list[Echo] = []

        def make() -> Echo:
            echoes.append(Echo())
            return echoes[-1]

        context = net.context("ktls", "server", TLS13)
        their_context = net.context("ktls", "client", TLS13)
        server = await loop.create_server(make, "127.0.0.1", 0, ssl=context, backlog=512)
        address = server.sockets[0].getsockname()
        clients: list[Any] = []

        async def connect(number: int) -> None:
            for _ in range(number):
                _, client = await loop.create_connection(
                    Keeper, *address, ssl=their_context, server_hostname=HOST
                )
                client.transport.write(b"ping")
                clients.append(client)
            await until(lambda: all(client.diary.data == b"ping" for client in clients))

        await connect(_WARM_UP)
        before = memory()
        await connect(_COUNT)
        taken.append((memory() - before) / _COUNT)
        # What is put off ends some time; a busy machine's clock may count others' time once.
        assert min([await busy_time() for _ in range(5)]) < 0.05
        for client in clients:
            client.transport.close()
        await until(lambda: all(client.diary.lost for client in clients))
        await until(lambda: all(echo.diary.lost for echo in echoes))
        assert {echo.diary.error for echo in echoes} == {None}
        assert {client.diary.error for client in clients} == {None}
        assert len(echoes) == _COUNT + _WARM_UP
        server.close()

    loop.run(main, patience=_PATIENCE)
    assert taken[0] < _BOTH_ENDS
