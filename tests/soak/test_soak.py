"""A short soak. The long one is ``tests/soak/soak_asyncio.py`` itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

PROGRAM: Final = Path(__file__).with_name("soak_asyncio.py")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_nothing_is_lost_or_left(loop: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, PROGRAM, f"--loop={loop}"),
            *("--seconds=3", "--connections=60", "--tail=0.5"),
        ],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["OK"]), done.stdout[-10_000:]
    assert done.stderr == ""
