"""lab/python gives an interpreter that is one like any other, here and in the lab; lab/test-python runs tests on it, and fails where they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAB = Path(__file__).resolve().parents[2] / "lab"
LAB_FAILED = 125
#: Asks the interpreter and, as ``sys.executable``, itself once more.
QUESTIONS = """
import json, os, ssl, subprocess, sys, sysconfig, zlib
again = [sys.executable, "-c", "import ssl; print(ssl.OPENSSL_VERSION)"]
print(json.dumps({
    "version": sys.version_info[:2],
    "openssl": ssl.OPENSSL_VERSION,
    "again": subprocess.check_output(again, text=True).strip(),
    "executable": sys.executable,
    "running": os.readlink("/proc/self/exe"),
    "library": sysconfig.get_path("stdlib"),
}))
"""

pytestmark = pytest.mark.slow


def run(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.fixture(scope="module")
def interpreter() -> Path:
    return Path(subprocess.check_output([LAB / "python"], text=True).strip())


def test_interpreter_is_whole_here_and_in_the_lab(interpreter: Path) -> None:
    here = run(interpreter, "-c", QUESTIONS)
    assert here.stderr == ""
    answers: dict[str, Any] = json.loads(here.stdout)
    assert tuple(answers["version"]) > sys.version_info[:2] or sys.version_info >= (3, 15)
    assert answers["openssl"] == answers["again"] >= "OpenSSL 3.5"
    assert answers["executable"] == answers["running"] == str(interpreter)
    assert Path(answers["library"]).is_relative_to(interpreter.parents[1])
    there = run(LAB / "run", "--", interpreter, "-c", QUESTIONS)
    assert there.stdout == here.stdout, there.stderr


def test_running_it_changes_nothing_in_the_cache(interpreter: Path) -> None:
    before = (interpreter.parents[1] / "manifest").read_text()
    run(interpreter, "-c", "import asyncio, http.server, unittest.mock")
    again = run(LAB / "python")
    assert (again.stdout.strip(), again.stderr) == (str(interpreter), "")  # not built anew
    assert (interpreter.parents[1] / "manifest").read_text() == before


def test_damaged_cache_is_not_used(
    interpreter: Path, tmp_path: Path, machine_without_mirror: dict[str, str]
) -> None:
    directory = interpreter.parents[1]
    copy = Path(machine_without_mirror["KTLS_LAB_CACHE"]) / directory.name
    shutil.copytree(directory, copy, copy_function=os.link)
    manifest = copy / "manifest"
    content = manifest.read_text().replace(str(directory), str(copy))
    manifest.unlink()
    manifest.write_text(content)
    assert run(LAB / "python", env=machine_without_mirror).returncode == 0
    (copy / "lib" / "libssl.so.3").unlink()
    result = run(LAB / "python", env=machine_without_mirror)
    assert (result.returncode, result.stdout) == (LAB_FAILED, "")
    assert "lab: no mirror in reach: Debian forky" in result.stderr


@pytest.mark.parametrize("script", ["python", "test-python"])
def test_what_cannot_be_had_is_a_failure(
    script: str, machine_without_mirror: dict[str, str]
) -> None:
    result = run(LAB / script, env=machine_without_mirror)
    assert (result.returncode, result.stdout) == (LAB_FAILED, "")
    *_, last = result.stderr.splitlines()
    assert last.startswith("lab: no mirror in reach: Debian forky could not be read from http://")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["python", "2.7"], "usage: python [3.13|3.14|3.15]"),
        (["test-python", "--loud"], "lab: unknown word --loud"),
        (["test-python", "--python"], "lab: --python needs a value"),
        (["test-python", "--python", "2.7"], "usage: python [3.13|3.14|3.15]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_one_line(words: list[str], message: str) -> None:
    script, *rest = words
    result = run(LAB / script, *rest)
    assert result.returncode == LAB_FAILED
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
