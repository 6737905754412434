"""``ktls get``: URLs, whole files, redirects, and files that are gone on with."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path

import pytest

from ktls.cli.failure import Failure
from ktls.cli.get import Location

from .helpers import (
    DATA,
    LocalServer,
    RunningServer,
    ScriptedServer,
    download,
    fields,
    here,
    leave_part,
    wait_for,
)

# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "host_field", "name"),
    [
        ("https://a.example", "a.example", 443, "/", "a.example", "index.html"),
        ("https://a.example/x/", "a.example", 443, "/x/", "a.example", "index.html"),
        ("HTTPS://A.example:8443/x?q=1#f", "a.example", 8443, "/x?q=1", "a.example:8443", "x"),
        ("https://[::1]:8443/x", "::1", 8443, "/x", "[::1]:8443", "x"),
        (
            "https://a.example/%41 b/\u00e9",
            "a.example",
            443,
            "/%41%20b/%C3%A9",
            "a.example",
            "\u00e9",
        ),
        ("https://a.example/x/%2e%2e", "a.example", 443, "/x/%2e%2e", "a.example", "index.html"),
        ("https://a.example/x%2f..%2fy", "a.example", 443, "/x%2f..%2fy", "a.example", "y"),
        (
            "https://b\u00fccher.example/",
            "b\u00fccher.example",
            443,
            "/",
            "xn--bcher-kva.example",
            "index.html",
        ),
    ],
)
def test_locations(url: str, host: str, port: int, path: str, host_field: str, name: str) -> None:
    location = Location.parse(url)
    assert (location.host, location.port, location.path) == (host, port, path)
    assert (location.host_field, location.file_name) == (host_field, name)


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example/",
        "ftp://a.example/",
        "a.example/x",
        "https://",
        "https:///x",
        "https://user:secret@a.example/",
        "https://a.example:99999/",
        "https://a.example:x/",
        "https://[::1/",
    ],
)
def test_wrong_locations(url: str) -> None:
    with pytest.raises(Failure) as caught:
        Location.parse(url)
    assert "secret" not in str(caught.value)


# --- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["auto", "userspace"])
def test_round_trip(
    server: LocalServer, file: Path, offload: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(server, "file.bin", "-o", "got", "--offload", offload) == 0
    assert hashlib.sha256(Path("got").read_bytes()).digest() == hashlib.sha256(DATA).digest()
    assert here() == {"got"}
    err = capsys.readouterr().err
    match = re.search(
        r"got: 102\.4 kB in [0-9.]+ s \(.*/s\); (.*); (\d+) records, key generation 0\n", err
    )
    assert match is not None
    assert match[1].startswith(("opened by the kernel, spliced", "opened in user space"))
    assert int(match[2]) >= 7


def test_name_from_the_url(server: LocalServer, file: Path) -> None:
    assert download(server, "file.bin") == 0
    assert here() == {"file.bin"}


@pytest.mark.parametrize("output", ["dir", "dir/"])
def test_into_a_directory(server: LocalServer, file: Path, output: str) -> None:
    os.mkdir("dir")
    assert download(server, "file.bin", "-o", output) == 0
    assert Path("dir/file.bin").read_bytes() == DATA


def test_empty_file(server: LocalServer) -> None:
    (server.directory / "empty").touch()
    assert download(server, "empty") == 0
    assert Path("empty").read_bytes() == b""
    assert here() == {"empty"}


def test_chunked(scripted: ScriptedServer) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (DATA[:70000], DATA[70000:]))
    scripted.answer("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=body + b"0\r\n\r\n")
    assert download(scripted, "x") == 0
    assert Path("x").read_bytes() == DATA


def test_until_the_connection_ends(scripted: ScriptedServer) -> None:
    scripted.answer("HTTP/1.0 200 OK", body=DATA)
    assert download(scripted, "x") == 0
    assert Path("x").read_bytes() == DATA


@pytest.mark.parametrize("field", ["Repr-Digest: sha-256=:{}:", "Digest: sha-256={}"])
@pytest.mark.parametrize("right", [True, False])
def test_digest(
    scripted: ScriptedServer, field: str, right: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.sha256(DATA if right else b"else").digest()
    scripted.answer(
        "HTTP/1.1 200 OK",
        f"Content-Length: {len(DATA)}",
        'ETag: "1"',
        field.format(base64.b64encode(digest).decode()),
        body=DATA,
    )
    assert download(scripted, "x") == (0 if right else 1)
    assert here() == ({"x"} if right else set())
    assert right or "SHA-256 differs" in capsys.readouterr().err


def test_what_is_asked(scripted: ScriptedServer) -> None:
    scripted.answer("HTTP/1.1 200 OK", "Content-Length: 0")
    assert download(scripted, "a b?c=d") == 0
    request = scripted.requests[0]
    assert request.startswith(b"GET /a%20b?c=d HTTP/1.1\r\n")
    assert fields(request) == {
        "host": scripted.url.split("/")[2],
        "user-agent": "ktls",
        "accept": "*/*",
        "accept-encoding": "identity",
        "connection": "close",
    }


# --- redirects -------------------------------------------------------------------------------------------------------


def test_redirects(scripted: ScriptedServer) -> None:
    scripted.answer("HTTP/1.1 302 Found", "Location: /elsewhere?x")
    scripted.answer("HTTP/1.1 308 Permanent Redirect", f"Location: {scripted.url}third")
    scripted.answer("HTTP/1.1 200 OK", "Content-Length: 2", body=b"ok")
    assert download(scripted, "first", "-o", "got") == 0
    assert Path("got").read_bytes() == b"ok"
    paths = [request.split()[1] for request in scripted.requests]
    assert paths == [b"/first", b"/elsewhere?x", b"/third"]


def test_too_many_redirects(scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(6):
        scripted.answer("HTTP/1.1 302 Found", "Location: /again")
    assert download(scripted, "x") == 1
    assert "redirects more than 5 times" in capsys.readouterr().err
    assert here() == set()


def test_redirect_to_plain_http(
    scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.answer("HTTP/1.1 302 Found", "Location: http://127.0.0.1/x")
    assert download(scripted, "x") == 1
    assert "only https" in capsys.readouterr().err


# --- going on --------------------------------------------------------------------------------------------------------


def etag(server: LocalServer, path: str) -> str:
    with server.connection() as connection:
        connection.request("HEAD", "/" + path)
        response = connection.getresponse()
        response.read()
        return response.headers["ETag"]


@pytest.mark.parametrize("have", [1, 50_000, len(DATA) - 1, len(DATA)])
def test_resume(server: RunningServer, file: Path, have: int) -> None:
    leave_part(server.url + "file.bin", DATA[:have], etag(server, "file.bin"))
    assert download(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA
    assert here() == {"got"}
    offset = min(have, len(DATA) - 1)
    wait_for(server.read_log, f'"GET /file.bin HTTP/1.1" 206 {len(DATA) - offset} ')


def test_resume_of_a_file_that_has_changed(server: RunningServer, file: Path) -> None:
    leave_part(server.url + "file.bin", b"old bytes", '"old"')
    assert download(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA
    wait_for(server.read_log, f'" 200 {len(DATA)} ')


def test_resume_of_another_url(server: LocalServer, file: Path) -> None:
    leave_part(server.url + "other.bin", b"other bytes", etag(server, "file.bin"))
    assert download(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA


def test_resume_refused(scripted: ScriptedServer) -> None:
    """416, whatever the reason: start over."""
    leave_part(scripted.url + "x", DATA[:100], '"1"', None)
    scripted.answer("HTTP/1.1 416 Range Not Satisfiable", "Content-Range: bytes */5")
    scripted.answer("HTTP/1.1 200 OK", "Content-Length: 5", body=b"fresh")
    assert download(scripted, "x", "-o", "got") == 0
    assert Path("got").read_bytes() == b"fresh"
    assert fields(scripted.requests[0])["range"] == "bytes=100-"
    assert fields(scripted.requests[0])["if-range"] == '"1"'
    assert "range" not in fields(scripted.requests[1])


@pytest.mark.parametrize(
    "content_range", ["bytes 99-199/200", "bytes 100-198/200", "bytes 0-199/200", "nonsense"]
)
def test_part_that_was_not_asked_for(
    scripted: ScriptedServer, content_range: str, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_part(scripted.url + "x", DATA[:100], '"1"', 200)
    scripted.answer(
        "HTTP/1.1 206 Partial Content", f"Content-Range: {content_range}", body=b"x" * 100
    )
    assert download(scripted, "x", "-o", "got") == 1
    assert "a part that was not asked for" in capsys.readouterr().err
    assert Path("got.part").read_bytes() == DATA[:100]


def test_interrupted_then_finished(scripted: ScriptedServer) -> None:
    """Cut in the middle, and the same command goes on where it ended."""
    head = [f"Content-Length: {len(DATA)}", 'ETag: "1"']
    scripted.answer("HTTP/1.1 200 OK", *head, body=DATA[:60_000], cut=True)
    assert download(scripted, "x") == 1
    assert here() == {"x.part", "x.part.json"}
    have = Path("x.part").read_bytes()
    assert have == DATA[: len(have)]
    scripted.answer(
        "HTTP/1.1 206 Partial Content",
        f"Content-Range: bytes {len(have)}-{len(DATA) - 1}/{len(DATA)}",
        f"Content-Length: {len(DATA) - len(have)}",
        'ETag: "1"',
        body=DATA[len(have) :],
    )
    assert download(scripted, "x") == 0
    assert fields(scripted.requests[1])["range"] == f"bytes={len(have)}-"
    assert Path("x").read_bytes() == DATA
    assert here() == {"x"}
