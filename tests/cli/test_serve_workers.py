"""Several workers, from outside: the command and its processes."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .helpers import BIG, client_context, make_big, serve_command, wait_until

if TYPE_CHECKING:
    from .helpers import Command

pytestmark = pytest.mark.slow

CONNECTIONS = 30
FEW = 8


def request(
    connection: http.client.HTTPSConnection, path: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request("GET", path)
    response = connection.getresponse()
    return response, response.read()


def sockets_of(pid: int) -> int:
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += os.readlink(descriptor).startswith("socket:")
    return count


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_all_workers_answer(tmp_path: Path, data_home: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    options = ("--workers", "2", "--metrics", "0")
    with serve_command(tmp_path, data_home, *options) as command, contextlib.ExitStack() as stack:
        wait_until(lambda: len(command.workers) == 2)
        before = {pid: sockets_of(pid) for pid in command.workers}
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(command.connection())
            assert request(connection, "/a")[1] == b"content"
        shares = [sockets_of(pid) - count for pid, count in before.items()]
        assert sum(shares) >= CONNECTIONS
        assert min(shares) > 4  # an event loop has some of its own
        # Whichever answers, answers for all.
        wait_until(lambda: answers(command) == CONNECTIONS)
        assert open_connections(command) == CONNECTIONS
        assert command.end() == ""


def test_sessions_resume_with_any_worker(tmp_path: Path, data_home: Path) -> None:
    """Their ticket keys are the same: the context was made before the fork."""
    (tmp_path / "a").write_bytes(b"content")
    with serve_command(tmp_path, data_home, "--workers", "2") as command:
        context = client_context(command.ca)
        session: ssl.SSLSession | None = None
        for _ in range(8):
            with (
                socket.create_connection(("127.0.0.1", command.port), 30) as sock,
                context.wrap_socket(sock, server_hostname="127.0.0.1", session=session) as tls,
            ):
                assert tls.session_reused == (session is not None)
                tls.sendall(b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                while tls.recv(4096):
                    pass
                session = tls.session
        assert command.end(signal.SIGINT) == ""


def test_worker_that_dies_is_replaced(tmp_path: Path, data_home: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    options = ("--workers", "2", "--metrics", "0")
    with serve_command(tmp_path, data_home, *options) as command:
        wait_until(lambda: len(command.workers) == 2)
        first, second = command.workers
        # It has connections that will be nobody's.
        with contextlib.ExitStack() as stack:
            for _ in range(FEW):
                request(stack.enter_context(command.connection()), "/a")
            wait_until(lambda: answers(command) == FEW)
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: len(command.workers) == 2 and first not in command.workers)
        for _ in range(FEW):
            with command.connection() as connection:
                assert request(connection, "/a")[1] == b"content"
        # What the dead one counted, counts; what it had open does not.
        wait_until(lambda: answers(command) == 2 * FEW)
        wait_until(lambda: open_connections(command) == 0)
        os.kill(second, signal.SIGTERM)  # ends in order, and is replaced
        wait_until(lambda: len(command.workers) == 2 and second not in command.workers)
        assert command.end() == (
            f"ktls: worker {first} was killed by signal 9; another takes its place\n"
            f"ktls: worker {second} ended with status 0; another takes its place\n"
        )


def answers(command: Command) -> float:
    return command.metrics['ktls_http_requests_total{code="200",method="GET"}']


def open_connections(command: Command) -> float:
    return sum(v for k, v in command.metrics.items() if k.startswith("ktls_open_"))


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 30).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize(
    ("workers", "number"), [("1", signal.SIGTERM), ("2", signal.SIGTERM), ("2", signal.SIGINT)]
)
def test_downloads_finish(tmp_path: Path, data_home: Path, workers: str, number: int) -> None:
    make_big(tmp_path / "big")
    with serve_command(tmp_path, data_home, "--workers", workers) as command:
        with contextlib.ExitStack() as stack:
            idle = stack.enter_context(command.connection())
            idle.request("HEAD", "/big")
            idle.getresponse().read()
            connection = stack.enter_context(command.connection())
            connection.request("GET", "/big")
            response = connection.getresponse()
            group = command.workers if workers != "1" else []
            command.process.send_signal(number)
            for pid in group:  # as ^C and service managers do
                with contextlib.suppress(ProcessLookupError):  # it had nothing left to do
                    os.kill(pid, number)
            assert idle.sock.recv(1) == b""
            wait_until(lambda: refused(command.port))
            assert command.process.poll() is None
            assert len(response.read()) == BIG
        _, err = command.process.communicate(timeout=30)
        assert command.process.returncode == 0
        # Our own probing.
        assert all(line.endswith("closed during the handshake") for line in err.splitlines())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_second_signal_cuts(tmp_path: Path, data_home: Path, workers: str) -> None:
    make_big(tmp_path / "big")
    with (
        serve_command(tmp_path, data_home, "--workers", workers) as command,
        command.connection() as idle,
        command.connection() as connection,
    ):
        idle.request("HEAD", "/big")
        idle.getresponse().read()
        connection.request("GET", "/big")
        response = connection.getresponse()
        command.process.send_signal(signal.SIGTERM)
        assert idle.sock.recv(1) == b""  # it was heard
        assert command.end() == ""
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()


def test_log_that_nobody_reads(tmp_path: Path, data_home: Path) -> None:
    """More than a pipe holds: neither requests nor the end wait for it."""
    name = "x" * 1500
    with serve_command(tmp_path, data_home) as command, command.connection() as connection:
        for _ in range(100):
            assert request(connection, f"/{name}")[0].status == 404
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(timeout=30) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_signal_at_once(tmp_path: Path, data_home: Path, workers: str) -> None:
    """As soon as it says that it listens, it also hears."""
    with serve_command(tmp_path, data_home, "--workers", workers) as command:
        assert command.end() == ""


def test_grace_ends(tmp_path: Path, data_home: Path) -> None:
    make_big(tmp_path / "big")
    with (
        serve_command(tmp_path, data_home, "--workers", "2", "--grace", "0.1") as command,
        command.connection() as connection,
    ):
        connection.request("GET", "/big")
        response = connection.getresponse()
        assert command.end() == ""
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()


def test_workers_do_not_outlive_their_supervisor(tmp_path: Path, data_home: Path) -> None:
    with serve_command(tmp_path, data_home, "--workers", "2") as command:
        wait_until(lambda: len(command.workers) == 2)
        workers = command.workers
        command.process.kill()
        wait_until(lambda: not any(alive(pid) for pid in workers))
