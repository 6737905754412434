"""Memory of an idle connection: growth of a server's anonymous resident memory, per connection, for each kind of server, all in one run.

    lab/run -- .venv/bin/python bench/idle_memory.py            # on a kernel with kernel TLS
    .venv/bin/python bench/idle_memory.py --connections 1000    # on this machine's own

Each kind runs in a process of its own. Its application is a protocol with two slots that echoes; every connection has exchanged one message. The clients are in the measuring process, blocking sockets of
the ``ssl`` module. The first connections, which pay for caches and pools, are not counted.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import resource
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.servers import command, identity, is_plain, listen, parser, run, versions

KINDS = ("asyncio ssl", "uvloop ssl", "ktls asyncio", "ktls uvloop", "plain asyncio")
WARM_UP = 100


class Echo(asyncio.Protocol):
    """The application's own part: as small as can be."""

    __slots__ = ("transport",)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def resident() -> int:
    """Anonymous resident memory of this process, in bytes."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


async def serve(kind: str, certificate: str) -> None:
    """Serve; answer each line on stdin with the memory in use, until stdin ends."""
    server = await listen(kind, certificate, Echo, backlog=512)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        await asyncio.sleep(0.2)
        print(resident(), flush=True)
    server.close()


def connect(port: int, context: ssl.SSLContext | None) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    if context is not None:
        sock = context.wrap_socket(sock, server_hostname="localhost")
    sock.sendall(b"ping")
    assert sock.recv(16) == b"ping"
    return sock


def measure(kind: str, connections: int, certificate: str, context: ssl.SSLContext) -> float:
    """Bytes per connection."""
    with subprocess.Popen(
        command(__file__, kind, certificate),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> int:
            process.stdin.write("\n")  # type: ignore[union-attr]  # looked at above
            process.stdin.flush()  # type: ignore[union-attr]  # looked at above
            return int(process.stdout.readline())  # type: ignore[union-attr]  # looked at above

        port = int(process.stdout.readline())
        client_context = None if is_plain(kind) else context
        kept = [connect(port, client_context) for _ in range(WARM_UP)]
        before = ask()
        kept += [connect(port, client_context) for _ in range(connections)]
        after = ask()
        for sock in kept:
            sock.close()
        process.stdin.close()
    return (after - before) / connections


def main() -> None:
    arguments = parser(__doc__, KINDS)
    arguments.add_argument("--connections", type=int, default=300)
    options = arguments.parse_args()
    files = 2 * options.connections + 1000
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    if options.serve is not None:
        run(options.serve, options.certificate, serve)
        return
    with identity() as (certificate, context):
        result = {
            kind: measure(kind, options.connections, certificate, context) for kind in options.kinds
        }
    if options.json:
        print(json.dumps(result))
        return
    print(versions())
    print(f"KiB of anonymous resident memory per idle connection ({options.connections} counted):")
    for kind, octets in result.items():
        print(f"  {kind:15} {octets / 1024:8.2f}")


if __name__ == "__main__":
    main()
