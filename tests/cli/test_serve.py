from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import http.client
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest

from ktls.cli.file_app import ONE_RECORD

from .helpers import (
    LocalServer,
    RunningServer,
    client_context,
    running_server,
    serve_command,
    wait_for,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ktls.cli.local_ca import Identity

DATA = bytes(range(256)) * 400  # several records
BIG = 20 << 20  # more than any socket buffer


def make_big(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(BIG)


def get(
    connection: http.client.HTTPSConnection, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=fields)
    response = connection.getresponse()
    return response, response.read()


@pytest.fixture
def file(server: LocalServer) -> Path:
    path = server.directory / "file.bin"
    path.write_bytes(DATA)
    return path


# --- the protocol --------------------------------------------------------------------------------------------------


def test_get(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        response, body = get(connection, "/file.bin")
        assert response.status == 200
        assert body == DATA
        assert response.headers["Content-Length"] == str(len(DATA))
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["Server"] == "ktls"


def test_keep_alive(server: LocalServer, file: Path) -> None:
    (server.directory / "empty").touch()
    with server.connection() as connection:
        connection.connect()
        sock = connection.sock
        for path, size in (
            ("/file.bin", len(DATA)),
            ("/empty", 0),
            ("/", None),
            ("/file.bin", len(DATA)),
        ):
            response, body = get(connection, path)
            assert response.status == 200
            assert size is None or len(body) == size
            assert connection.sock is sock


def test_head(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        response, body = get(connection, "/file.bin", "HEAD", Range="bytes=0-4")
        assert (response.status, body) == (200, b"")  # RFC 9110 §14.2: a range is for GET
        assert response.headers["Content-Length"] == str(len(DATA))
        assert get(connection, "/file.bin")[1] == DATA


def test_listing(server: LocalServer, file: Path) -> None:
    (server.directory / "<odd & name>").touch()
    (server.directory / "sub").mkdir()
    with server.connection() as connection:
        response, body = get(connection, "/")
        assert response.headers["Content-Type"].startswith("text/html")
        text = body.decode()
        assert 'href="file.bin"' in text
        assert 'href="sub/"' in text
        assert "&lt;odd &amp; name&gt;" in text
        response, _ = get(connection, "/sub")
        assert (response.status, response.headers["Location"]) == (301, "/sub/")


def test_index(server: LocalServer) -> None:
    (server.directory / "index.html").write_text("hello", encoding="ascii")
    with server.connection() as connection:
        response, body = get(connection, "/")
        assert body == b"hello"
        assert response.headers["Content-Type"] == "text/html"
        assert response.headers["ETag"]


def test_part(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        response, body = get(connection, "/file.bin", Range="bytes=1000-69999")
        assert response.status == 206
        assert body == DATA[1000:70000]
        assert response.headers["Content-Range"] == f"bytes 1000-69999/{len(DATA)}"
        response, body = get(connection, "/file.bin", Range=f"bytes={len(DATA)}-")
        assert (response.status, body) == (416, b"")
        assert response.headers["Content-Range"] == f"bytes */{len(DATA)}"
        assert get(connection, "/file.bin", Range="bytes=-7")[1] == DATA[-7:]


def test_part_of_a_certain_version(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        headers = get(connection, "/file.bin", "HEAD")[0].headers
        for validator in (headers["ETag"], headers["Last-Modified"]):
            response, body = get(connection, "/file.bin", Range="bytes=5-", If_Range=validator)
            assert (response.status, body) == (206, DATA[5:])
        for other in ('"other"', "W/" + headers["ETag"], "Mon, 01 Jan 2001 00:00:00 GMT"):
            response, body = get(connection, "/file.bin", Range="bytes=5-", If_Range=other)
            assert (response.status, body) == (200, DATA)


def test_not_modified(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        headers = get(connection, "/file.bin", "HEAD")[0].headers
        etag, modified = headers["ETag"], headers["Last-Modified"]

        def status(**fields: str) -> int:
            return get(connection, "/file.bin", **fields)[0].status

        assert status(If_None_Match=etag) == 304
        assert status(If_None_Match=f'"x", W/{etag}') == 304
        assert status(If_None_Match="*") == 304
        assert status(If_None_Match='"x"', If_Modified_Since=modified) == 200
        assert status(If_Modified_Since=modified) == 304
        assert status(If_Modified_Since="Mon, 01 Jan 2001 00:00:00 GMT") == 200
        assert status(If_Modified_Since="nonsense") == 200


def test_precondition(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        headers = get(connection, "/file.bin", "HEAD")[0].headers
        etag, modified = headers["ETag"], headers["Last-Modified"]

        def status(**fields: str) -> int:
            return get(connection, "/file.bin", **fields)[0].status

        assert status(If_Match=etag) == 200
        assert status(If_Match="*") == 200
        assert status(If_Match=f"W/{etag}") == 412  # RFC 9110 §13.1.1: strong comparison
        assert status(If_Match='"x"', If_Unmodified_Since=modified) == 412
        assert status(If_Unmodified_Since=modified) == 200
        assert status(If_Unmodified_Since="Mon, 01 Jan 2001 00:00:00 GMT") == 412
        assert status(If_Unmodified_Since="nonsense") == 200


def test_precompressed(server: LocalServer) -> None:
    page, packed = server.directory / "page.html", server.directory / "page.html.gz"
    page.write_text("plain", encoding="ascii")
    with server.connection() as connection:
        assert "Vary" not in get(connection, "/page.html")[0].headers
        packed.write_bytes(gzip.compress(b"packed"))
        response, body = get(connection, "/page.html", Accept_Encoding="br, gzip")
        assert gzip.decompress(body) == b"packed"
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Content-Type"] == "text/html"
        assert response.headers["Vary"] == "Accept-Encoding"
        etag = response.headers["ETag"]
        again, _ = get(connection, "/page.html", Accept_Encoding="gzip", If_None_Match=etag)
        assert (again.status, again.headers["Vary"]) == (304, "Accept-Encoding")
        for accepted in ("identity", "br", "gzip;q=0", "gzip;q=0.5, identity"):
            response, body = get(connection, "/page.html", Accept_Encoding=accepted)
            assert (body, response.headers["Vary"]) == (b"plain", "Accept-Encoding")
            assert "Content-Encoding" not in response.headers
            assert response.headers["ETag"] != etag
        # As itself it is a file like any other.
        response, body = get(connection, "/page.html.gz", Accept_Encoding="gzip")
        assert gzip.decompress(body) == b"packed"
        assert response.headers["Content-Type"] == "application/gzip"
        assert "Content-Encoding" not in response.headers


def test_precompressed_that_is_older_is_not_sent(server: LocalServer) -> None:
    page, packed = server.directory / "page.html", server.directory / "page.html.gz"
    packed.write_bytes(gzip.compress(b"packed"))
    page.write_text("plain", encoding="ascii")
    os.utime(packed, (1e9, 1e9))
    with server.connection() as connection:
        response, body = get(connection, "/page.html", Accept_Encoding="gzip")
        assert (body, response.headers["Vary"]) == (b"plain", None)


def test_precompressed_part(server: LocalServer, file: Path) -> None:
    (server.directory / "file.bin.br").write_bytes(DATA[::-1])
    with server.connection() as connection:
        response, body = get(
            connection, "/file.bin", Accept_Encoding="br", Range="bytes=20000-59999"
        )
        assert (response.status, body) == (206, DATA[::-1][20000:60000])
        assert response.headers["Content-Encoding"] == "br"


@pytest.mark.parametrize("size", [ONE_RECORD - 1, ONE_RECORD, ONE_RECORD + 1])
def test_around_one_record(server: LocalServer, size: int) -> None:
    (server.directory / "file").write_bytes(DATA[:size])
    with server.connection() as connection:
        assert get(connection, "/file")[1] == DATA[:size]
        assert get(connection, "/file", Range="bytes=3-")[1] == DATA[3:size]


def test_absolute_target(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        assert get(connection, "https://any.example/file.bin?x#y")[1] == DATA
        response, _ = get(connection, "https://any.example")
        assert response.status == 200


def test_redirects_stay_here(server: LocalServer) -> None:
    (server.directory / "evil.example").mkdir()
    with server.connection() as connection:
        response, _ = get(connection, "//evil.example?x=1")
        assert (response.status, response.headers["Location"]) == (301, "/evil.example/?x=1")


def test_etag_changes_with_the_file(server: LocalServer, file: Path) -> None:
    with server.connection() as connection:
        before = get(connection, "/file.bin", "HEAD")[0].headers["ETag"]
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert get(connection, "/file.bin", "HEAD")[0].headers["ETag"] != before


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/missing", 404),
        ("/file.bin/", 404),
        ("/%00", 404),
        ("/pipe", 404),
        ("/../../../../../etc/passwd", 404),
        ("/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", 404),
    ],
)
def test_what_is_not_served(server: LocalServer, file: Path, path: str, status: int) -> None:
    os.mkfifo(server.directory / "pipe")  # to open it would wait for a writer
    with server.connection() as connection:
        assert get(connection, path)[0].status == status


def test_forbidden(server: LocalServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("ktls.cli.http_files._open_regular", deny)  # root may read everything
    with server.connection() as connection:
        assert get(connection, "/file.bin")[0].status == 403


def test_other_methods(server: LocalServer) -> None:
    with server.connection() as connection:
        response, _ = get(connection, "/", "DELETE")
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


def test_body_of_a_request_is_not_taken_for_a_request(server: LocalServer, file: Path) -> None:
    smuggled = b"GET /file.bin HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(smuggled)}\r\n\r\n".encode()
    with (
        socket.create_connection(("127.0.0.1", server.port), 30) as sock,
        client_context(server.ca).wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(head + smuggled)
        answer = b""
        try:
            while data := tls.recv(65536):
                answer += data
        except ConnectionResetError:
            pass  # it closed with our "request" unread
    assert answer.count(b"HTTP/1.1 ") == 1


# --- what goes wrong -----------------------------------------------------------------------------------------------


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


# --- the end -------------------------------------------------------------------------------------------------------


def test_end_lets_downloads_finish(identity: Identity, tmp_path: Path) -> None:
    """Idle connections and those without a handshake end at once, a download when it is complete."""
    make_big(tmp_path / "big")
    with running_server(identity, tmp_path) as server, contextlib.ExitStack() as stack:
        raw = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
        idle = stack.enter_context(server.connection())
        slow = stack.enter_context(server.connection())
        get(idle, "/big", "HEAD")
        slow.request("GET", "/big")
        response = slow.getresponse()
        server.stop()
        assert idle.sock.recv(1) == b""
        assert raw.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 30).close()
        assert server.thread.is_alive()
        assert len(response.read()) == BIG
        # The connection was kept for more requests, but there are none any more.
        assert slow.sock is None or slow.sock.recv(1) == b""
        server.join()


@pytest.mark.parametrize("grace", [0.05, 30.0])
def test_end_cuts_what_does_not_finish(identity: Identity, tmp_path: Path, grace: float) -> None:
    """After the grace, or when told twice; and nobody takes a part for the whole."""
    make_big(tmp_path / "big")
    with (
        running_server(identity, tmp_path, grace=grace) as server,
        server.connection() as slow,
    ):
        slow.request("GET", "/big")
        response = slow.getresponse()
        server.stop()
        if grace > 1:
            server.stop(now=True)
        server.join()  # its time limit is the assertion
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    assert re.search(r'"GET /big HTTP/1.1" 200 \d+ tx=', server.read_log())
    assert server.read_complaints() == ""  # it was us


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command(tmp_path: Path, data_home: Path, number: int) -> None:
    """From start to signal, with curl as the client if there is one."""
    (tmp_path / "a").write_bytes(DATA)
    with serve_command(tmp_path, data_home) as command:
        assert any(f"--cacert {command.ca}" in line for line in command.said)
        if curl := shutil.which("curl"):
            use_curl(curl, str(command.ca), command.said[-1].split()[2])
        assert command.end(number) == ""


def use_curl(curl: str, ca: str, url: str) -> None:
    def run(*arguments: str) -> bytes:
        return subprocess.run(
            [curl, "--silent", "--show-error", "--fail", "--cacert", ca, *arguments],
            capture_output=True,
            timeout=30,
            check=True,
        ).stdout

    assert b'href="a"' in run(url)
    assert f"Content-Length: {len(DATA)}".encode() in run("--head", url + "a")
    # The second transfer opens no connection.
    connects = run(
        url + "a", url + "a", "-o", os.devnull, "-o", os.devnull, "-w", "%{num_connects} "
    )
    assert connects == b"1 0 "
    assert run("--range", "5-9", url + "a") == DATA[5:10]
    assert hashlib.sha256(run(url + "a")).digest() == hashlib.sha256(DATA).digest()
