"""What goes wrong while ``ktls serve`` serves, what it logs, and what it leaves to the kernel."""

from __future__ import annotations

import errno
import http.client
import os
import re
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from .helpers import (
    BIG,
    DATA,
    LocalServer,
    RunningServer,
    client_context,
    get,
    make_big,
    running_server,
    wait_for,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ktls.cli.local_ca import Identity


def test_file_that_shrinks_is_not_filled_up(server: RunningServer) -> None:
    big = server.directory / "big"
    make_big(big)
    with server.connection() as connection:
        connection.request("GET", "/big")
        response = connection.getresponse()
        assert response.headers["Content-Length"] == str(BIG)
        os.truncate(big, 10)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    wait_for(server.read_complaints, "connection ended: the file shrank: ")


def test_silent_client_keeps_nobody_waiting(server: LocalServer, file: Path) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(3)]
    try:
        with server.connection() as connection:
            assert get(connection, "/file.bin")[1] == DATA
    finally:
        for sock in silent:
            sock.close()


def test_slow_handshake_ends(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktls.cli.serving._HANDSHAKE_TIMEOUT", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        assert sock.recv(1) == b""
    wait_for(server.read_complaints, "handshake is taking longer than 0.05 seconds")


@pytest.mark.parametrize("said", [b"", b"GET /file.bin HT"])
def test_silence_ends_the_connection(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """Between requests and within one."""
    monkeypatch.setattr("ktls.cli.serving._IDLE_TIMEOUT", 0.1)
    with running_server(identity, tmp_path) as server, server.connection() as connection:
        get(connection, "/")
        connection.sock.sendall(said)
        assert connection.sock.recv(1) == b""


def test_client_that_stops_reading_ends(
    identity: Identity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ktls.cli.serving._STALLED_TIMEOUT", 300)  # ms
    make_big(tmp_path / "big")
    with running_server(identity, tmp_path) as server, server.connection() as connection:
        connection.request("GET", "/big")
        wait_for(server.read_complaints, "connection ended: ")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            connection.getresponse().read()


def test_no_descriptors_left(
    server: RunningServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, waits, and goes on."""
    accept = socket.socket.accept
    errors = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    def fail_once(self: socket.socket) -> tuple[socket.socket, object]:
        if errors:
            raise errors.pop()
        return accept(self)

    monkeypatch.setattr("ktls.cli.serving._ACCEPT_DELAY", 0.01)
    monkeypatch.setattr(socket.socket, "accept", fail_once)
    with server.connection() as connection:
        assert get(connection, "/file.bin")[1] == DATA
    assert server.read_complaints() == "cannot accept connections: Too many open files\n"


def test_client_that_does_not_trust_is_one_line(server: RunningServer) -> None:
    with (
        socket.create_connection(("127.0.0.1", server.port), 30) as sock,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(sock, server_hostname="127.0.0.1")
    line = wait_for(server.read_complaints, "\n")
    assert re.fullmatch(r"127\.0\.0\.1: connection ended: .*unknown ca\n", line)


def test_access_log(server: RunningServer, file: Path) -> None:
    with server.connection() as connection:
        get(connection, "/file.bin")
    line = wait_for(server.read_log, "\n")
    match = re.fullmatch(
        r'127\.0\.0\.1 "GET /file\.bin HTTP/1\.1" 200 (\d+) tx=(\w+) rx=(\w+)\n', line
    )
    assert match is not None
    assert int(match[1]) == len(DATA)
    assert {match[2], match[3]} <= {"kernel", "userspace"}


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (b'/%1b[2J"', r'"GET /%1b[2J\x22 HTTP/1.1" 404 14 '),
        (b'/" 200 1\\', r'"UNKNOWN / HTTP/1.0" 400 '),
        (b"/\x1b[2J", r'"UNKNOWN / HTTP/1.0" 400 '),
        (b"/\xc3\xa9\xff\x9b", None),  # parsers differ in whether that is a URL
        (b"/" + b"x" * 5000, "xxx... HTTP/1.1"),
    ],
)
def test_logs_cannot_be_forged(server: RunningServer, target: bytes, shown: str | None) -> None:
    with (
        socket.create_connection(("127.0.0.1", server.port), 30) as sock,
        client_context(server.ca).wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target)
        answer = b""
        while data := tls.recv(4096):
            answer += data
    assert b"\r\nServer: ktls\r\n" in answer
    logged = wait_for(server.read_log, "\n")
    assert shown is None or shown in logged
    for line in (logged + server.read_complaints()).splitlines():
        assert line.isprintable()
        assert line.isascii()
        assert len(line) < 4000  # PIPE_BUF


@pytest.mark.kernel
def test_kernel_takes_the_file(
    server: RunningServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit into a record with its header is not copied; what does is one record."""
    sent, sendfile = [], os.sendfile

    def count(*arguments: int) -> int:
        done = sendfile(*arguments)
        sent.append(done)
        return done

    monkeypatch.setattr(os, "sendfile", count)
    (server.directory / "small").write_bytes(DATA[:1000])
    with server.connection() as connection:
        assert get(connection, "/small")[1] == DATA[:1000]
        assert sent == []
        assert get(connection, "/file.bin", Range="bytes=1000-91000")[1] == DATA[1000:91001]
        assert sum(sent) == 90001


@pytest.mark.kernel
@pytest.mark.rekey
def test_kernel_both_ways(server: RunningServer, file: Path) -> None:
    with server.connection() as connection:
        assert get(connection, "/file.bin")[1] == DATA
    wait_for(server.read_log, "tx=kernel rx=kernel")


@pytest.mark.kernel
@pytest.mark.norekey
def test_kernel_sends_only(server: RunningServer, file: Path) -> None:
    with server.connection() as connection:
        assert get(connection, "/file.bin")[1] == DATA
    wait_for(server.read_log, "tx=kernel rx=userspace")
