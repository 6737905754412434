"""No descriptor of a connection, of a key log or of a pipe gets into a program that is started: who holds one can see the keys."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest

import ktls
import ktls.aio
import ktls.anyio
from ktls.record import probe

from ..cli.helpers import serve_command
from ..sockets.helpers import Case, Net, matrix, read_exactly
from ..support import HOST, TLS13

if TYPE_CHECKING:
    from collections.abc import Callable


#: Prints what it has inherited, without the descriptor of the directory itself.
_LIST: Final = """
import os
for fd in os.listdir("/proc/self/fd"):
    try:
        print(fd, os.readlink(f"/proc/self/fd/{fd}"))
    except FileNotFoundError:
        pass
"""
_O_CLOEXEC: Final = os.O_CLOEXEC


def inherited() -> Counter[str]:
    """What a program inherits that is started by whoever forgets to close everything."""
    found = subprocess.run(
        [sys.executable, "-S", "-c", _LIST], close_fds=False, capture_output=True, check=True
    )
    lines = (line.split(" ", 1) for line in found.stdout.decode().splitlines())
    return Counter(name for fd, name in lines if int(fd) > 2)


def not_closed_on_exec(pid: int) -> set[str]:
    """Open descriptors of a process, beyond the three, that the next program would get."""
    found = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        flags = next(line for line in entry.read_text().splitlines() if line.startswith("flags:"))
        if not int(flags.split()[1], 8) & _O_CLOEXEC and int(entry.name) > 2:
            found.add(os.readlink(f"/proc/{pid}/fd/{entry.name}"))
    return found


@pytest.fixture
def before() -> Counter[str]:
    """What is inherited anyway, the tests' own."""
    return inherited()


def test_the_list_shows_what_is_inherited(before: Counter[str]) -> None:
    """Else nothing below would mean anything."""
    with socket.socket() as sock:
        assert inherited() == before
        sock.set_inheritable(True)
        assert len(inherited() - before) == 1


@pytest.mark.parametrize("case", matrix(versions=(TLS13,)), ids=str)
def test_blocking_sockets(net: Net, case: Case, before: Counter[str], tmp_path: Path) -> None:
    """Sockets, the memory file, the pipe of ``recvfile``, dup'ed sockets of ``makefile``."""
    link = net.link(case, timeout=20)
    link.theirs.sendall(b"data")
    with (tmp_path / "file").open("w+b") as file, link.ours.makefile("rb") as reader:
        assert link.ours.recvfile(file, 4) == 4
        link.theirs.sendall(b"line\n")
        assert reader.readline() == b"line\n"
        with (tmp_path / "file").open("rb") as source:
            link.ours.sendfile(source)
        assert read_exactly(link.theirs, 4) == b"data"
        assert inherited() == before
    successor = socket.socket(fileno=os.dup(link.ours.fileno()))
    tls = net.keep(ktls.KTLSSocket.from_state(successor, link.ours.export_state()))
    tls.sendall(b"on")
    assert inherited() == before


def test_probes(before: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a probe is at work its sockets are there, and after it they are gone."""
    seen: list[Counter[str]] = []
    real = socket.socket.setsockopt

    def setsockopt(self: socket.socket, *arguments: Any) -> None:
        if not seen:
            seen.append(inherited())
        real(self, *arguments)

    monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
    descriptors = set(os.listdir("/proc/self/fd"))
    probe.cache_clear()
    probe.probe()
    assert seen == [before]
    assert set(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    "new_loop",
    [asyncio.new_event_loop, ktls.aio.new_event_loop, ktls.aio.new_uvloop_event_loop],
    ids=["asyncio", "ktls", "ktls-uvloop"],
)
def test_asyncio(
    net: Net, new_loop: Callable[[], asyncio.AbstractEventLoop], before: Counter[str]
) -> None:
    """A server, its connections, and a connection that was taken over from the loop."""

    served: list[asyncio.Task[Any] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        if data := await reader.read(4):
            writer.write(data)
            await writer.drain()
            await ktls.aio.sendfile(writer.transport, io.BytesIO(b"file"))
            await reader.read()
        writer.close()
        await writer.wait_closed()

    async def main() -> Counter[str]:
        server_context, context = (net.context("ktls", role) for role in ("server", "client"))
        server = await ktls.aio.start_server(serve, "127.0.0.1", 0, ssl=server_context)
        assert isinstance(server, ktls.aio.Server)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await ktls.aio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname=HOST
        )
        loop = asyncio.get_running_loop()
        plain, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
        upgraded_reader = asyncio.StreamReader()
        upgraded = await ktls.aio.start_tls(
            plain,
            asyncio.StreamReaderProtocol(upgraded_reader),
            context,
            server_hostname=HOST,
        )
        writer.write(b"ping")
        assert await reader.readexactly(8) == b"pingfile"
        found = await loop.run_in_executor(None, inherited)
        for transport in (writer, upgraded):
            transport.close()
        await writer.wait_closed()
        await upgraded_reader.read()  # until it is lost
        await asyncio.gather(*(task for task in served if task is not None))
        server.close()
        await server.wait_closed()
        return found

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) == before


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_anyio(net: Net, backend: str, before: Counter[str]) -> None:
    """A listener, its connection, and the client's."""

    async def serve(stream: ktls.anyio.KTLSStream) -> None:
        async with stream:
            await stream.send(await stream.receive())

    async def main() -> Counter[str]:
        listener = await ktls.anyio.create_tcp_listener(
            local_host="127.0.0.1", ssl_context=net.context("ktls", "server")
        )
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve)
            async with await ktls.anyio.connect_tcp(
                "127.0.0.1", port, ssl_context=net.context("ktls", "client"), tls_hostname=HOST
            ) as stream:
                await stream.send(b"ping")
                assert await stream.receive() == b"ping"
                found = await anyio.to_thread.run_sync(inherited)
            tasks.cancel_scope.cancel()
        return found

    assert anyio.run(main, backend=backend) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_the_file_server(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes have nothing that a program of theirs would inherit, and leave no core behind."""
    monkeypatch.setenv("PYTHONPATH", str(Path(ktls.__file__).parents[1]))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "a").write_bytes(b"content")
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))  # as generous as it gets
    try:
        with (
            serve_command(tmp_path, tmp_path / "data", "--workers", str(workers)) as command,
            command.connection() as connection,
        ):
            connection.request("GET", "/a")
            assert connection.getresponse().read() == b"content"
            pids = [command.process.pid, *command.workers]
            assert len(pids) == (1 if workers == 1 else 1 + workers)
            for pid in pids:
                assert not_closed_on_exec(pid) == set()
                limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
                (core,) = (line for line in limits if line.startswith("Max core file size"))
                assert core.split()[4:6] == ["0", "0"]
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
