from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import resource
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ktls
from ktls.cli import main
from ktls.cli.failure import Failure
from ktls.cli.get import Location

from .helpers import LocalServer, RunningServer, ScriptedServer, fields, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

DATA = bytes(range(256)) * 400  # several records


def get(server: LocalServer | ScriptedServer, path: str, *options: str) -> int:
    return main(["get", server.url + path, "--cacert", str(server.ca), *options])


def here() -> set[str]:
    return {path.name for path in Path().iterdir() if path.name != "served"}


@pytest.fixture
def file(server: LocalServer) -> Path:
    path = server.directory / "file.bin"
    path.write_bytes(DATA)
    return path


def leave_part(url: str, data: bytes, validator: str, size: int | None = len(DATA)) -> None:
    """What an earlier, interrupted ``ktls get URL -o got`` leaves behind."""
    Path("got.part").write_bytes(data)
    notes = {"url": url, "validator": validator, "size": size}
    Path("got.part.json").write_text(json.dumps(notes), encoding="utf-8")


# --- URLs ----------------------------------------------------------------------------------------------------------


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


# --- whole files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["auto", "userspace"])
def test_round_trip(
    server: LocalServer, file: Path, offload: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get(server, "file.bin", "-o", "got", "--offload", offload) == 0
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
    assert get(server, "file.bin") == 0
    assert here() == {"file.bin"}


@pytest.mark.parametrize("output", ["dir", "dir/"])
def test_into_a_directory(server: LocalServer, file: Path, output: str) -> None:
    os.mkdir("dir")
    assert get(server, "file.bin", "-o", output) == 0
    assert Path("dir/file.bin").read_bytes() == DATA


def test_empty_file(server: LocalServer) -> None:
    (server.directory / "empty").touch()
    assert get(server, "empty") == 0
    assert Path("empty").read_bytes() == b""
    assert here() == {"empty"}


def test_chunked(scripted: ScriptedServer) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (DATA[:70000], DATA[70000:]))
    scripted.answer("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=body + b"0\r\n\r\n")
    assert get(scripted, "x") == 0
    assert Path("x").read_bytes() == DATA


def test_until_the_connection_ends(scripted: ScriptedServer) -> None:
    scripted.answer("HTTP/1.0 200 OK", body=DATA)
    assert get(scripted, "x") == 0
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
    assert get(scripted, "x") == (0 if right else 1)
    assert here() == ({"x"} if right else set())
    assert right or "SHA-256 differs" in capsys.readouterr().err


def test_what_is_asked(scripted: ScriptedServer) -> None:
    scripted.answer("HTTP/1.1 200 OK", "Content-Length: 0")
    assert get(scripted, "a b?c=d") == 0
    request = scripted.requests[0]
    assert request.startswith(b"GET /a%20b?c=d HTTP/1.1\r\n")
    assert fields(request) == {
        "host": scripted.url.split("/")[2],
        "user-agent": "ktls",
        "accept": "*/*",
        "accept-encoding": "identity",
        "connection": "close",
    }


# --- redirects -----------------------------------------------------------------------------------------------------


def test_redirects(scripted: ScriptedServer) -> None:
    scripted.answer("HTTP/1.1 302 Found", "Location: /elsewhere?x")
    scripted.answer("HTTP/1.1 308 Permanent Redirect", f"Location: {scripted.url}third")
    scripted.answer("HTTP/1.1 200 OK", "Content-Length: 2", body=b"ok")
    assert get(scripted, "first", "-o", "got") == 0
    assert Path("got").read_bytes() == b"ok"
    paths = [request.split()[1] for request in scripted.requests]
    assert paths == [b"/first", b"/elsewhere?x", b"/third"]


def test_too_many_redirects(scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(6):
        scripted.answer("HTTP/1.1 302 Found", "Location: /again")
    assert get(scripted, "x") == 1
    assert "redirects more than 5 times" in capsys.readouterr().err
    assert here() == set()


def test_redirect_to_plain_http(
    scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.answer("HTTP/1.1 302 Found", "Location: http://127.0.0.1/x")
    assert get(scripted, "x") == 1
    assert "only https" in capsys.readouterr().err


# --- going on ------------------------------------------------------------------------------------------------------


def etag(server: LocalServer, path: str) -> str:
    with server.connection() as connection:
        connection.request("HEAD", "/" + path)
        response = connection.getresponse()
        response.read()
        return response.headers["ETag"]


@pytest.mark.parametrize("have", [1, 50_000, len(DATA) - 1, len(DATA)])
def test_resume(server: RunningServer, file: Path, have: int) -> None:
    leave_part(server.url + "file.bin", DATA[:have], etag(server, "file.bin"))
    assert get(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA
    assert here() == {"got"}
    offset = min(have, len(DATA) - 1)
    wait_for(server.read_log, f'"GET /file.bin HTTP/1.1" 206 {len(DATA) - offset} ')


def test_resume_of_a_file_that_has_changed(server: RunningServer, file: Path) -> None:
    leave_part(server.url + "file.bin", b"old bytes", '"old"')
    assert get(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA
    wait_for(server.read_log, f'" 200 {len(DATA)} ')


def test_resume_of_another_url(server: LocalServer, file: Path) -> None:
    leave_part(server.url + "other.bin", b"other bytes", etag(server, "file.bin"))
    assert get(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA


def test_resume_refused(scripted: ScriptedServer) -> None:
    """416, whatever the reason: start over."""
    leave_part(scripted.url + "x", DATA[:100], '"1"', None)
    scripted.answer("HTTP/1.1 416 Range Not Satisfiable", "Content-Range: bytes */5")
    scripted.answer("HTTP/1.1 200 OK", "Content-Length: 5", body=b"fresh")
    assert get(scripted, "x", "-o", "got") == 0
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
    assert get(scripted, "x", "-o", "got") == 1
    assert "a part that was not asked for" in capsys.readouterr().err
    assert Path("got.part").read_bytes() == DATA[:100]


def test_interrupted_then_finished(scripted: ScriptedServer) -> None:
    """Cut in the middle, and the same command goes on where it ended."""
    head = [f"Content-Length: {len(DATA)}", 'ETag: "1"']
    scripted.answer("HTTP/1.1 200 OK", *head, body=DATA[:60_000], cut=True)
    assert get(scripted, "x") == 1
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
    assert get(scripted, "x") == 0
    assert fields(scripted.requests[1])["range"] == f"bytes={len(have)}-"
    assert Path("x").read_bytes() == DATA
    assert here() == {"x"}


# --- what goes wrong: one line, a status, the part kept where it helps -----------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("ktls: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("cut", [True, False])
def test_truncated(scripted: ScriptedServer, cut: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer bytes than promised, with and without a clean end of TLS."""
    scripted.answer(
        "HTTP/1.1 200 OK", "Content-Length: 1000", 'ETag: "1"', body=b"x" * 600, cut=cut
    )
    assert get(scripted, "x") == 1
    said = one_line(capsys)
    assert "cut after 600 of 1000 bytes" in said
    assert "x.part is kept" in said
    assert here() == {"x.part", "x.part.json"}


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["HTTP/1.0 200 OK"], b"x" * 600),
        (["HTTP/1.1 200 OK", "Transfer-Encoding: chunked"], b"258\r\n" + b"x" * 600),
        (["HTTP/1.1 200 OK", "Transfer-Encoding: chunked"], b"300\r\n" + b"x" * 600),
    ],
)
def test_truncated_without_known_length(
    scripted: ScriptedServer, lines: list[str], body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only close_notify, or the last chunk, says that this was all."""
    scripted.answer(*lines, body=body, cut=True)
    assert get(scripted, "x") == 1
    assert "cut after 600 bytes" in one_line(capsys)
    assert "x" not in here()


@pytest.mark.parametrize("lines", [[], ["HTTP/1.1 200 OK", "Content-Le"]])
@pytest.mark.parametrize("cut", [True, False])
def test_no_answer(
    scripted: ScriptedServer, lines: list[str], cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that is cut is no answer, also where TLS ends in order."""
    answer = "\r\n".join(lines).encode()
    scripted._scripts.append((answer, cut))
    assert get(scripted, "x") == 1
    assert "closed the connection without an answer" in one_line(capsys)
    assert here() == set()


def test_not_found(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert get(server, "missing") == 1
    assert "127.0.0.1 answers 404 File not found" in one_line(capsys)
    assert here() == set()


def test_disk_full(server: LocalServer, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files is the disk that is full without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        status = get(server, "file.bin", "-o", "got")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    err = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("ktls:"))
    assert err.startswith("ktls: cannot write got.part: File too large")
    assert "got" not in here()
    have = Path("got.part").read_bytes()
    assert have == DATA[: len(have)]
    assert get(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA


@pytest.mark.parametrize("output", ["/dev/full", "missing/x", "file/x"])
def test_cannot_write(
    scripted: ScriptedServer, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert get(scripted, "x", "-o", output) == 1
    assert "cannot write" in one_line(capsys)
    assert Path("/dev/full").is_char_device()


def test_unknown_host(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("no-such-host.invalid", "x" * 64 + ".invalid"):
        assert main(["get", f"https://{host}/x"]) == 1
        assert one_line(capsys).startswith(f"ktls: unknown host {host}: ")
    assert here() == set()


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert main(["get", f"https://127.0.0.1:{port}/x"]) == 1
    assert (
        one_line(capsys) == f"ktls: cannot connect to 127.0.0.1 port {port}: Connection refused\n"
    )


def test_not_trusted(scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", scripted.url + "x"]) == 1
    said = one_line(capsys)
    assert "127.0.0.1 is not trusted" in said
    assert "--cacert" in said
    assert here() == set()


def test_wrong_name(scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = scripted.url.replace("127.0.0.1", "127.0.0.2")
    assert main(["get", url, "--cacert", scripted.ca]) == 1
    assert "127.0.0.2" in one_line(capsys)


def test_not_tls(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert main(["get", f"https://127.0.0.1:{listener.getsockname()[1]}/x"]) == 1
        thread.join()
    assert "no TLS connection with 127.0.0.1" in one_line(capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read ca.pem: No such file"), ("x", "holds no certificates")],
)
def test_wrong_ca_file(content: str | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        Path("ca.pem").write_text(content, encoding="ascii")
    assert main(["get", "https://127.0.0.1/x", "--cacert", "ca.pem"]) == 1
    assert said in one_line(capsys)


def test_plain_http(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "http://127.0.0.1/x"]) == 1
    assert one_line(capsys) == "ktls: only https URLs can be fetched, not http\n"


def test_stalled_server(
    server: LocalServer,
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def time_out(self: ktls.KTLSSocket, into: FileIO, count: int) -> int:
        into.write(DATA[: into.tell() + 1])
        raise TimeoutError("The read operation timed out")

    monkeypatch.setattr(ktls.KTLSSocket, "recvfile", time_out)
    assert get(server, "file.bin", "-o", "x") == 1
    said = one_line(capsys)
    assert said.startswith("ktls: 127.0.0.1: The read operation timed out; x.part is kept")
    assert "x" not in here()


def test_not_to_stdout(server: LocalServer, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get(server, "file.bin", "-o", "-") == 1
    assert "goes into a file" in one_line(capsys)


def test_refused_handshake(scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    scripted._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # knows no certificate: alert
    assert get(scripted, "x") == 1
    assert "no TLS connection" in one_line(capsys)


@pytest.mark.slow
def test_as_a_process(scripted: ScriptedServer, ktls_command: Callable[..., object]) -> None:
    scripted.answer("HTTP/1.1 200 OK", "Content-Length: 2", body=b"ok")
    done = ktls_command("get", scripted.url + "x", "--cacert", scripted.ca)
    assert getattr(done, "returncode", None) == 0
    assert getattr(done, "stdout", None) == ""
    assert Path("x").read_bytes() == b"ok"


@pytest.mark.kernel
@pytest.mark.rekey
def test_lab_splices(server: LocalServer, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get(server, "file.bin", "--offload", "kernel") == 0
    assert "opened by the kernel, spliced" in capsys.readouterr().err
    assert Path("file.bin").read_bytes() == DATA


@pytest.mark.kernel
@pytest.mark.norekey
def test_lab_says_why_not(
    server: LocalServer, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get(server, "file.bin") == 0
    assert "opened in user space (" in capsys.readouterr().err
    assert get(server, "file.bin", "--offload", "kernel") == 0  # at the user's own risk
    assert "opened by the kernel, spliced" in capsys.readouterr().err
