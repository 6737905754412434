"""Peers for the commands."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ktls
from ktls.aio import new_event_loop
from ktls.cli import main
from ktls.cli.serving import FileServer, listen
from ktls.settings import settings_of

from ..support import ThreadServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktls.cli.local_ca import Identity
    from ktls.cli.metrics import Metrics

DATA = bytes(range(256)) * 400  # several records
BIG = 20 << 20  # more than any socket buffer


def client_context(ca: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ca))


@dataclass(frozen=True)
class LocalServer:
    """Where the server is, and what it serves."""

    port: int
    directory: Path
    ca: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/"

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPSConnection]:
        """An ``http.client`` connection, by the ``ssl`` module: none of our own code on that side."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=30, context=client_context(self.ca)
        )
        try:
            yield connection
        finally:
            connection.close()


@dataclass(frozen=True)
class RunningServer(LocalServer):
    """A server in a thread of this process."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    server: FileServer
    log: deque[str]
    complaints: deque[str]

    def read_log(self) -> str:
        """What the access log got since it was read."""
        return _take(self.log)

    def read_complaints(self) -> str:
        """Why connections ended early, since it was read."""
        return _take(self.complaints)

    def stop(self, *, now: bool = False) -> None:
        """Do what a signal does."""
        self.loop.call_soon_threadsafe(lambda: self.server.stop(now=now))

    def join(self) -> None:
        """Wait for the end."""
        self.thread.join(30)
        assert not self.thread.is_alive()


def _take(lines: deque[str]) -> str:
    return "".join(lines.popleft() for _ in range(len(lines)))


@contextlib.contextmanager
def running_server(
    identity: Identity, directory: Path, *, grace: float = 30.0, metrics: Metrics | None = None
) -> Iterator[RunningServer]:
    """Serve ``directory`` in a thread."""
    log: deque[str] = deque()
    complaints: deque[str] = deque()
    context = ktls.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(identity.certificate, identity.key)
    settings_of(context).observer = metrics
    (listener,) = listen(socket.AF_INET, ("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = FileServer(
        listener,
        context,
        str(directory),
        log=log.append,
        complain=complaints.append,
        grace=grace,
        metrics=metrics,
    )
    started: queue.SimpleQueue[asyncio.AbstractEventLoop] = queue.SimpleQueue()

    async def serve() -> None:
        started.put(asyncio.get_running_loop())
        await server.run()

    def run() -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, name="serve")
    thread.start()
    running = RunningServer(
        port, directory, identity.ca, started.get(), thread, server, log, complaints
    )
    try:
        yield running
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended
            running.stop(now=True)
        running.join()


@dataclass(frozen=True)
class Command(LocalServer):
    """``ktls serve`` as a process of its own."""

    process: subprocess.Popen[str]
    #: What it announced.
    said: list[str]

    @property
    def metrics(self) -> dict[str, float]:
        """What ``--metrics`` shows: series -> value."""
        url = next(line.split()[2] for line in self.said if line.startswith("metrics on "))
        with urllib.request.urlopen(url, timeout=30) as answer:
            return parse_metrics(answer.read().decode())

    @property
    def workers(self) -> list[int]:
        """Process ids."""
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def end(self, number: int = signal.SIGTERM) -> str:
        """Send a signal; return what was said on stderr when the process has ended well."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, err
        return err


@contextlib.contextmanager
def serve_command(directory: Path, data_home: Path, *options: str) -> Iterator[Command]:
    """Run ``ktls serve`` on a free port."""
    command = [sys.executable, "-m", "ktls", "serve", str(directory), "--port", "0", *options]
    with subprocess.Popen(
        command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said: list[str] = []
            while not (said and said[-1].startswith("listening on ")):
                line = process.stdout.readline()
                assert line, process.stderr and process.stderr.read()
                said.append(line)
            port = int(said[-1].split()[2].rstrip("/").rpartition(":")[2])
            yield Command(port, directory, data_home / "ktls" / "ca.pem", process, said)
        finally:
            process.kill()


def parse_metrics(text: str) -> dict[str, float]:
    """Series -> value."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


class ScriptedServer(ThreadServer):
    """Accepts TLS connections; keeps each request's head, and answers with the next script.

    A script is the bytes of the answer. ``cut``: TCP ends without close_notify after them.
    """

    def __init__(self, identity: Identity) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(identity.certificate, identity.key)
        self._scripts: list[tuple[bytes, bool]] = []
        self.requests: list[bytes] = []
        self.ca = str(identity.ca)
        super().__init__()
        self.url = f"https://127.0.0.1:{self.address[1]}/"

    def answer(self, *lines: str, body: bytes = b"", cut: bool = False) -> None:
        head = "".join(f"{line}\r\n" for line in (*lines, ""))
        self._scripts.append((head.encode("latin-1") + body, cut))

    def _serve(self, sock: socket.socket) -> None:
        with self._context.wrap_socket(sock, server_side=True) as tls:
            head = b""
            while b"\r\n\r\n" not in head:
                data = tls.recv(4096)
                if not data:
                    return
                head += data
            self.requests.append(head)
            answer, cut = self._scripts.pop(0)
            tls.sendall(answer)
            if not cut:
                with contextlib.suppress(OSError):
                    tls.unwrap()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another process is about to do."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(read: Callable[[], str], text: str) -> str:
    """Collect what another thread is about to write, until ``text`` is there; return all of it."""
    deadline = time.monotonic() + 20
    collected = read()
    while text not in collected:
        assert time.monotonic() < deadline, collected
        time.sleep(0.002)
        collected += read()
    return collected


def fields(request: bytes) -> dict[str, str]:
    """The header fields of a request, names in lower case."""
    lines = request.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.lower(): value.strip() for name, _, value in pairs}


def make_big(path: Path) -> None:
    """Make a file of ``BIG`` bytes."""
    with open(path, "wb") as file:
        file.truncate(BIG)


def get(
    connection: http.client.HTTPSConnection, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send a request, and return the whole response and its body. ``headers``: underscores stand for hyphens."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=fields)
    response = connection.getresponse()
    return response, response.read()


def download(server: LocalServer | ScriptedServer, path: str, *options: str) -> int:
    """Run ``ktls get`` in this process, and return its status."""
    return main(["get", server.url + path, "--cacert", str(server.ca), *options])


def here() -> set[str]:
    """The files in the current directory, without what the server serves."""
    return {path.name for path in Path().iterdir() if path.name != "served"}


def leave_part(url: str, data: bytes, validator: str, size: int | None = len(DATA)) -> None:
    """What an earlier, interrupted ``ktls get URL -o got`` leaves behind."""
    Path("got.part").write_bytes(data)
    notes = {"url": url, "validator": validator, "size": size}
    Path("got.part.json").write_text(json.dumps(notes), encoding="utf-8")
