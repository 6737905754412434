"""``http.response.pathsend`` and ``http.response.zerocopysend`` as the specification of ASGI's extensions has them."""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from typing import Any

import pytest

from .helpers import (
    App,
    Server,
    body,
    pathsend,
    read_all,
    request,
    sends,
    start,
    wait_for,
    zerocopysend,
)

SIZES = [0, 1, 16 * 1024, 64 * 1024 + 1, 1_000_003]


def test_the_scope_offers_both(server: Server) -> None:
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await sends(start(2), body(b"hi"))(scope, receive, send)

    server.app = app
    assert server.get()[1] == b"hi"
    assert scopes[0]["extensions"] == {
        "http.response.pathsend": {},
        "http.response.zerocopysend": {},
    }


@pytest.mark.parametrize("sized", [True, False], ids=["length", "chunked"])
def test_files_of_all_sizes_on_one_connection(
    server: Server, tmp_path: Path, contents: bytes, sized: bool
) -> None:
    with server.client() as client:
        for size in SIZES:
            path = tmp_path / str(size)
            path.write_bytes(contents[:size])
            server.app = sends(start(size if sized else None), pathsend(path))
            client.request("GET", "/")
            response = client.getresponse()
            assert response.getheader("transfer-encoding") == (None if sized else "chunked")
            assert response.read() == contents[:size]


def test_pipelined_requests_are_answered_in_order(
    server: Server, big: Path, small: Path, contents: bytes
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = big if scope["path"] == "/big" else small
        await sends(start(path.stat().st_size), pathsend(path))(scope, receive, send)

    server.app = app
    with server.connect() as sock:
        last = request("GET", "/small", "Connection: close")
        sock.sendall(request(path="/small") + request(path="/big") * 2 + last)
        received = read_all(sock)
    bodies = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        bodies.append(received[:length])
        received = received[length:]
    a_small = contents[: small.stat().st_size]
    assert bodies == [a_small, contents, contents, a_small]


def test_an_old_client_gets_the_file_and_the_end(
    server: Server, big: Path, contents: bytes
) -> None:
    server.app = sends(start(len(contents)), pathsend(big))
    with server.connect() as sock:
        sock.sendall(request(version="1.0"))
        assert read_all(sock).partition(b"\r\n\r\n")[2] == contents


@pytest.mark.parametrize("sized", [True, False], ids=["length", "chunked"])
def test_nothing_is_sent_for_head_and_nothing_is_opened(server: Server, sized: bool) -> None:
    server.app = sends(start(100_000 if sized else None), pathsend(Path("/does/not/exist")))
    with server.client() as client:
        for _ in range(2):
            client.request("HEAD", "/")
            assert client.getresponse().read() == b""
        server.app = sends(start(100_000), zerocopysend(-1, more_body=True), zerocopysend(-1))
        client.request("HEAD", "/")
        assert client.getresponse().read() == b""
        server.app = sends(start(2), body(b"hi"))
        client.request("GET", "/")
        assert client.getresponse().read() == b"hi"


@pytest.mark.parametrize("sized", [True, False], ids=["length", "chunked"])
def test_parts_of_files_among_body_messages(
    server: Server, big: Path, contents: bytes, sized: bool
) -> None:
    expected = b"<" + contents[10:20] + b"|" + contents[7:] + contents[100:200_000] + b"" + b">"
    with big.open("rb") as file:
        server.app = sends(
            start(len(expected) if sized else None),
            body(b"<", more_body=True),
            zerocopysend(file, offset=10, count=10, more_body=True),
            body(b"|", more_body=True),
            zerocopysend(file, offset=7, more_body=True),
            zerocopysend(file.fileno(), offset=100, count=199_900, more_body=True),
            zerocopysend(file, offset=len(contents), more_body=True),  # which is nothing
            zerocopysend(file, offset=0, count=0, more_body=True),
            body(b">"),
        )
        with server.client() as client:
            for _ in range(2):
                client.request("GET", "/")
                assert client.getresponse().read() == expected


def test_a_count_beyond_the_end_is_the_end(server: Server, big: Path, contents: bytes) -> None:
    with big.open("rb") as file:
        server.app = sends(start(), zerocopysend(file, offset=5, count=2 * len(contents)))
        assert server.get()[1] == contents[5:]


@pytest.mark.parametrize("buffered", [True, False])
def test_without_an_offset_the_position_is_used_and_moved(
    server: Server, big: Path, contents: bytes, buffered: bool
) -> None:
    with big.open("rb", buffering=-1 if buffered else 0) as file:
        assert file.read(3) == contents[:3]  # a buffered reader has read more now
        server.app = sends(
            start(),
            zerocopysend(file, count=4, more_body=True),
            zerocopysend(file, count=400_000, more_body=True),
            zerocopysend(file, offset=0, count=100_000, more_body=True),  # moves nothing
            zerocopysend(file, count=1),
        )
        end = 3 + 4 + 400_000 + 1
        assert (
            server.get()[1] == contents[3 : end - 1] + contents[:100_000] + contents[end - 1 : end]
        )
        wait_for(lambda: file.tell() == end)  # the client was perhaps faster
        assert file.read(5) == contents[end : end + 5]


def test_a_bare_descriptor_has_a_position_too(server: Server, big: Path, contents: bytes) -> None:
    fd = os.open(big, os.O_RDONLY)
    try:
        os.lseek(fd, 11, os.SEEK_SET)
        server.app = sends(
            start(), zerocopysend(fd, count=300_000, more_body=True), zerocopysend(fd)
        )
        assert server.get()[1] == contents[11:]
        wait_for(lambda: os.lseek(fd, 0, os.SEEK_CUR) == len(contents))
    finally:
        os.close(fd)


def test_the_application_may_close_its_file_at_once(
    server: Server, big: Path, contents: bytes
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(2 * len(contents)))
        for more_body in (True, False):
            with big.open("rb") as file:
                await send(zerocopysend(file, offset=0, more_body=more_body))

    server.app = app
    assert server.get()[1] == contents * 2


@pytest.mark.parametrize(
    ("app", "error"),
    [
        (sends(pathsend(Path("/etc/passwd"))), "Expected ASGI message 'http.response.start'"),
        (sends(start(0), body(), pathsend(Path("/etc/passwd"))), "Unexpected ASGI message"),
        (sends(start(0), pathsend(Path("/does/not/exist"))), "No such file"),
        (sends(start(0), pathsend(Path("/dev"))), "only regular files"),
        (sends(start(0), pathsend(Path("/dev/zero"))), "only regular files"),
    ],
    ids=["early", "late", "missing", "directory", "device"],
)
def test_what_cannot_be_sent_is_an_error_of_the_application(
    server: Server, app: App, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[Exception] = []

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except Exception as exc:
            raised.append(exc)
            raise

    server.app = recording
    with server.connect() as sock:
        sock.sendall(request())
        if "late" not in error and "Unexpected" not in error:
            assert b"root" not in read_all(sock)
        else:
            assert read_all(sock).endswith(b"\r\n\r\n")
    assert error in str(raised[0])
    assert "Exception in ASGI application" in caplog.text


def test_a_fifo_stops_nobody(server: Server, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    server.app = sends(start(1), pathsend(tmp_path / "fifo"))
    with server.client() as client:
        client.request("GET", "/")
        with pytest.raises((http.client.IncompleteRead, http.client.RemoteDisconnected)):
            client.getresponse().read()


def test_the_access_log_is_uvicorns(
    server: Server, big: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "uvicorn.access")
    server.app = sends(start(), pathsend(big))
    server.get("/file?x=1")
    assert caplog.messages[-1].endswith('"GET /file?x=1 HTTP/1.1" 200')
