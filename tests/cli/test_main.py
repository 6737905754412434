"""The command line itself, and what ``ktls serve`` refuses."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ktls.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.cli.local_ca import Identity


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ktls: ")
    assert err.count("\n") == 1
    return err.removeprefix("ktls: ").rstrip("\n")


def make_key(password: bytes | None = None) -> bytes:
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        protection = serialization.BestAvailableEncryption(password)
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection
    )


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        for command in ("doctor", "serve", "get"):
            assert command in out
    assert main(["get", "--help"]) == 0
    assert "--cacert" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ktls")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["--nonsense"], "No such option"),
        (["get"], "Missing argument"),
        (["serve", ".", "--port", "99999"], "99999"),
        (["get", "https://a.example/", "--offload", "magic"], "magic"),
    ],
)
def test_wrong_command_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refused(capsys, *arguments, status=2)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from ktls.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "pip install 'ktls[cli]'" in done.stderr


def test_bugs_are_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("ktls.cli.doctor.probe", fail)
    assert refused(capsys, "doctor") == "RuntimeError: two lines"


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ktls.cli.doctor.probe", interrupt)
    assert main(["doctor"]) == 130
    # The empty line is click's: it ends the terminal's "^C".
    assert capsys.readouterr() == ("", "\nktls: interrupted\n")


def test_output_that_nobody_reads(ktls_command: Callable[..., object]) -> None:
    code = f"{sys.executable} -m ktls doctor --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


# --- serve -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "said"), [("missing", "No such file or directory"), ("file", "Not a directory")]
)
def test_wrong_directory(capsys: pytest.CaptureFixture[str], directory: str, said: str) -> None:
    Path("file").touch()
    assert refused(capsys, "serve", directory) == f"cannot serve {directory}: {said}"


def test_key_without_certificate(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "serve", ".", "--key", "x") == "--key needs --cert"


def test_missing_certificate(capsys: pytest.CaptureFixture[str], identity: Identity) -> None:
    for options in (["--cert", "x"], ["--cert", str(identity.certificate), "--key", "x"]):
        said = refused(capsys, "serve", ".", *options)
        assert said == "cannot read x: No such file or directory"


def test_certificate_that_is_none(capsys: pytest.CaptureFixture[str], identity: Identity) -> None:
    Path("x").write_text("no PEM", encoding="ascii")
    for options in (
        ["--cert", "x"],
        ["--cert", "x", "--key", str(identity.key)],
        ["--cert", str(identity.certificate), "--key", "x"],
        ["--cert", str(identity.certificate)],
    ):
        assert "not a certificate and its key" in refused(capsys, "serve", ".", *options)


def test_key_of_another_certificate(capsys: pytest.CaptureFixture[str], identity: Identity) -> None:
    Path("key").write_bytes(make_key())
    said = refused(capsys, "serve", ".", "--cert", str(identity.certificate), "--key", "key")
    assert said.startswith("the key in key does not belong to the certificate in ")


def test_encrypted_key(capsys: pytest.CaptureFixture[str], identity: Identity) -> None:
    Path("key").write_bytes(make_key(b"secret"))
    said = refused(capsys, "serve", ".", "--cert", str(identity.certificate), "--key", "key")
    assert said.startswith("the key is encrypted")


def test_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refused(capsys, "serve", ".", "--port", port)
    assert said == f"cannot listen on 127.0.0.1 port {port}: it is in use"


@pytest.mark.parametrize("where", ["host", "127.0.0.1:", "127.0.0.1:99999", "1:-1"])
def test_wrong_metrics_address(capsys: pytest.CaptureFixture[str], where: str) -> None:
    said = refused(capsys, "serve", ".", "--port", "0", "--metrics", where)
    assert said == f"--metrics needs [HOST:]PORT, not {where}"


def test_metrics_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refused(capsys, "serve", ".", "--port", "0", "--metrics", port)
    assert said == f"cannot listen on 127.0.0.1 port {port}: it is in use"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_that_is_shared_by_others(capsys: pytest.CaptureFixture[str], workers: str) -> None:
    """SO_REUSEPORT is for our own workers: no connection may go to somebody else's."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = str(other.getsockname()[1])
        said = refused(capsys, "serve", ".", "--port", port, "--workers", workers)
    assert said == f"cannot listen on 127.0.0.1 port {port}: it is in use"


@pytest.mark.parametrize("missing", ["aiohttp", "prometheus_client"])
def test_serve_without_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from ktls.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "serve" in run("--help").stdout  # which does not need it
    done = run("serve", ".")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install 'ktls[cli]'" in done.stderr


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b"])
def test_unknown_host(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert refused(capsys, "serve", ".", "--host", host).startswith(f"unknown host {host}: ")


def test_address_of_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "serve", ".", "--host", "192.0.2.1", "--port", "0")
    assert said == "cannot listen on 192.0.2.1 port 0: this machine has no such address"


def test_data_directory_that_cannot_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(Path("file").absolute()))
    assert refused(capsys, "serve", ".").startswith("cannot make a local certificate: ")
