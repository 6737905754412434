"""What goes wrong with ``ktls get``: one line, a status, the part kept where it helps."""

from __future__ import annotations

import resource
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ktls
from ktls.cli import main

from .helpers import DATA, LocalServer, ScriptedServer, download, here

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO


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
    assert download(scripted, "x") == 1
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
    assert download(scripted, "x") == 1
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
    assert download(scripted, "x") == 1
    assert "closed the connection without an answer" in one_line(capsys)
    assert here() == set()


def test_not_found(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert download(server, "missing") == 1
    assert "127.0.0.1 answers 404 File not found" in one_line(capsys)
    assert here() == set()


def test_disk_full(server: LocalServer, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files is the disk that is full without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        status = download(server, "file.bin", "-o", "got")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    err = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("ktls:"))
    assert err.startswith("ktls: cannot write got.part: File too large")
    assert "got" not in here()
    have = Path("got.part").read_bytes()
    assert have == DATA[: len(have)]
    assert download(server, "file.bin", "-o", "got") == 0
    assert Path("got").read_bytes() == DATA


@pytest.mark.parametrize("output", ["/dev/full", "missing/x", "file/x"])
def test_cannot_write(
    scripted: ScriptedServer, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert download(scripted, "x", "-o", output) == 1
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
    assert download(server, "file.bin", "-o", "x") == 1
    said = one_line(capsys)
    assert said.startswith("ktls: 127.0.0.1: The read operation timed out; x.part is kept")
    assert "x" not in here()


def test_not_to_stdout(server: LocalServer, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert download(server, "file.bin", "-o", "-") == 1
    assert "goes into a file" in one_line(capsys)


def test_refused_handshake(scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    scripted._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # knows no certificate: alert
    assert download(scripted, "x") == 1
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
    assert download(server, "file.bin", "--offload", "kernel") == 0
    assert "opened by the kernel, spliced" in capsys.readouterr().err
    assert Path("file.bin").read_bytes() == DATA


@pytest.mark.kernel
@pytest.mark.norekey
def test_lab_says_why_not(
    server: LocalServer, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(server, "file.bin") == 0
    assert "opened in user space (" in capsys.readouterr().err
    assert download(server, "file.bin", "--offload", "kernel") == 0  # at the user's own risk
    assert "opened by the kernel, spliced" in capsys.readouterr().err
