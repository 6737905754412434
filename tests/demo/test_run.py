"""Where the demo runs: here, in the lab, or, if there is no lab to be had, in user space; CI demands the lab."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..support import has_rekey

DEMO = Path(__file__).resolve().parents[2] / "demo"
KERNEL = "shown: kernel"
USERSPACE = "shown: userspace"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The demo's ``run.py``, with a lab that can be told how to end and nothing to show."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "lab").mkdir()
    shutil.copy(DEMO / "run.py", tmp_path / "demo")
    (tmp_path / "demo" / "show.py").write_text(
        "import os, sys\nprint('shown:', sys.argv[1])\nsys.exit(int(os.environ['SHOW_STATUS']))\n"
    )
    lab = tmp_path / "lab" / "run"
    lab.write_text('#!/bin/sh\necho "lab: asked"\nexit "$LAB_STATUS"\n')
    peers = tmp_path / "lab" / "peers"
    peers.write_text("#!/bin/sh\necho curl=/nowhere/bin/curl\n")
    lab.chmod(0o755)
    peers.chmod(0o755)
    return tmp_path


def run(stage: Path, *, lab: int, show: int = 0, demand: bool = False) -> tuple[int, list[str]]:
    environment = {**os.environ, "LAB_STATUS": str(lab), "SHOW_STATUS": str(show)}
    environment.pop("KTLS_REQUIRE_LAB", None)
    if demand:
        environment["KTLS_REQUIRE_LAB"] = "1"
    done = subprocess.run(
        [sys.executable, str(stage / "demo" / "run.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("status", [0, 1])
def test_the_best_place_is_taken(stage: Path, status: int) -> None:
    returned, lines = run(stage, lab=status, show=status)
    assert returned == status
    if has_rekey():
        assert KERNEL in lines
        assert "lab: asked" not in lines
        assert lines[0].startswith("This machine's kernel has kernel TLS")
    else:
        assert "lab: asked" in lines
        assert lines[0].startswith("This machine's kernel will not do")
    assert USERSPACE not in lines


@pytest.mark.parametrize("status", [0, 1])
def test_without_a_lab_it_says_so_and_runs_in_user_space(stage: Path, status: int) -> None:
    returned, lines = run(stage, lab=125, show=status)
    assert returned == status
    assert (KERNEL if has_rekey() else USERSPACE) in lines
    if not has_rekey():
        assert any("the demo runs in user space instead" in line for line in lines)


def test_ci_demands_the_lab(stage: Path) -> None:
    returned, lines = run(stage, lab=125, demand=True)
    assert USERSPACE not in lines
    assert returned == (0 if has_rekey() else 125)
