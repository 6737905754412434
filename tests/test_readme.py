"""The README's code runs, and what it says of commands and names is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ktls

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """``ktls serve`` on a free port: (port, file to trust)."""
    root = tmp_path / "www"
    root.mkdir()
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "data"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ktls", "serve", str(root), "--port", "0"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"listening on https://\S+:(\d+)", line):
                    yield found[1], str(next((tmp_path / "data").rglob("ca.pem")))
                    break
            else:
                raise AssertionError("ktls serve did not start")
        finally:
            process.terminate()
            process.communicate()


def test_the_ten_lines_run(server: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    port, ca = server
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.split("\n")) <= 11
    code = code.replace("8443", port).replace("ca.pem", ca)
    if os.environ.get("KTLS_LAB") == "norekey":
        with pytest.raises(ktls.LocalProtocolError):  # as the README says of this kernel
            exec(compile(code, "README.md", "exec"), {})
        return
    exec(compile(code, "README.md", "exec"), {})
    output = capsys.readouterr().out
    assert "HTTP/1.1 200 OK" in output
    assert "Offload(tx=" in output
    assert "generation=1" in output


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"\nmake {target} " in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_names_in_the_tables_exist() -> None:
    socket_names = re.findall(r"^\| `tls\.(\w+)", README, re.MULTILINE)
    context_names = re.findall(r"^\| `context\.(\w+)", README, re.MULTILINE)
    assert len(socket_names) > 5
    assert len(context_names) > 2
    for name in socket_names:
        assert hasattr(ktls.KTLSSocket, name)
    for name in context_names:
        assert hasattr(ktls.SSLContext, name)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
