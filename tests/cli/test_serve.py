"""What ``ktls serve`` answers, how it ends, and the command."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from ktls.cli.file_app import ONE_RECORD

from .helpers import (
    BIG,
    DATA,
    LocalServer,
    client_context,
    get,
    make_big,
    running_server,
    serve_command,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ktls.cli.local_ca import Identity


# --- the protocol ----------------------------------------------------------------------------------------------------


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


# --- the end ---------------------------------------------------------------------------------------------------------


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


# --- the command -----------------------------------------------------------------------------------------------------


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
