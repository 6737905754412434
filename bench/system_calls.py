"""System calls that a server makes for one message of 1 KiB, received and sent back, for each kind of transport, all in one run.

    lab/run -- .venv/bin/python bench/system_calls.py

Counted by strace, from one call to another that the server makes for no other purpose than to be seen: what is between them is a whole number of messages, and nothing else. Each server is a process of its own; the client
is a blocking socket. The calls that read the clock are left out: on real machines they are none, but a user-mode kernel has no vDSO.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.servers import command, identity, is_plain, listen, parser, run, versions

KINDS = (
    "plain asyncio",
    "ktls asyncio",
    "asyncio ssl",
    "plain uvloop",
    "ktls uvloop",
    "uvloop ssl",
)
MESSAGE = b"x" * 1024
# For this one the server asks for its parent: a call that nothing else makes.
MARK = b"!"


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data == MARK:
            os.getppid()
        self.transport.write(data)


async def serve(kind: str, certificate: str) -> None:
    server = await listen(kind, certificate, Echo)
    await server.serve_forever()


class Counted:
    """A server under strace."""

    def __init__(
        self, kind: str, certificate: str, directory: str, context: ssl.SSLContext
    ) -> None:
        self._server = subprocess.Popen(
            command(__file__, kind, certificate), stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        address = ("127.0.0.1", int(self._server.stdout.readline()))
        sock = socket.create_connection(address)
        if not is_plain(kind):
            sock = context.wrap_socket(sock, server_hostname="localhost")
        self._client = sock
        self._output = Path(directory, kind)
        self._exchange(MESSAGE, times=20)

    def _exchange(self, message: bytes, *, times: int = 1) -> None:
        for _ in range(times):
            self._client.sendall(message)
            left = len(message)
            while left:
                left -= len(self._client.recv(left))

    def count(self, messages: int) -> dict[str, float]:
        """Calls made for one message, by name."""
        tracer = subprocess.Popen([
            "strace", "-qq", "-f", "-e", "trace=!time,clock_gettime,gettimeofday",
            "-o", str(self._output), "-p", str(self._server.pid),
        ])  # fmt: skip
        # Strace may say that it has attached before it sees calls; a mark in its output is the proof.
        deadline = time.monotonic() + 20
        while "getppid" not in self._calls():
            assert time.monotonic() < deadline, "strace did not attach"
            self._exchange(MARK)
        self._exchange(MESSAGE, times=messages - 1)
        self._exchange(MARK)
        tracer.send_signal(signal.SIGINT)
        tracer.wait()
        calls = self._calls()
        last = len(calls) - 1 - calls[::-1].index("getppid")
        before = last - 1 - calls[:last][::-1].index("getppid")
        # From the answer to one mark to the other mark: one message more.
        counter = Counter(calls[before + 1 : last])
        return {name: number / messages for name, number in counter.items()}

    def _calls(self) -> list[str]:
        """Names of the calls seen, in order."""
        written = self._output.read_text() if self._output.exists() else ""
        return re.findall(r"^\d+ +(\w+)\(", written, re.MULTILINE)

    def close(self) -> None:
        self._client.close()
        self._server.kill()
        self._server.communicate()


def measure(
    kind: str, certificate: str, directory: str, context: ssl.SSLContext
) -> dict[str, float]:
    """Calls per message, by name."""
    counted = Counted(kind, certificate, directory, context)
    try:
        return counted.count(200)
    finally:
        counted.close()


def main() -> None:
    options = parser(__doc__, KINDS).parse_args()
    if options.serve is not None:
        run(options.serve, options.certificate, serve)
        return
    with identity() as (certificate, context), tempfile.TemporaryDirectory() as directory:
        result = {kind: measure(kind, certificate, directory, context) for kind in options.kinds}
    if options.json:
        print(json.dumps(result))
        return
    print(versions())
    print("system calls per message of 1 KiB received and sent back:")
    for kind, calls in result.items():
        detail = ", ".join(f"{name} {number:.3g}" for name, number in sorted(calls.items()))
        print(f"  {kind:14} {sum(calls.values()):5.2f}   {detail}")


if __name__ == "__main__":
    main()
