"""What a connection costs: memory while it is idle, system calls for a message. Measured by the programs that the documents name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def measured(program: str, *arguments: str) -> dict[str, object]:
    """What a program of ``bench`` says in JSON."""
    output = subprocess.check_output(
        [sys.executable, str(BENCH / program), "--json", *arguments], text=True, timeout=50
    )
    result: dict[str, object] = json.loads(output)
    return result


@pytest.mark.rekey
@pytest.mark.slow
def test_an_idle_connection_takes_three_kib_at_most() -> None:
    kind = "ktls asyncio"
    octets = measured("idle_memory.py", "--connections", "200", "--kinds", kind)[kind]
    assert isinstance(octets, float)
    assert octets <= 3 * 1024


@pytest.mark.kernel
@pytest.mark.slow
def test_a_message_takes_no_more_system_calls_than_over_plain_tcp() -> None:
    assert shutil.which("strace"), "lab/peers has strace; its directory is to be on PATH"
    calls = measured("system_calls.py", "--kinds", "plain asyncio", "ktls asyncio")
    plain, ours = calls["plain asyncio"], calls["ktls asyncio"]
    assert isinstance(plain, dict)
    assert isinstance(ours, dict)
    assert ours["sendto"] == plain["sendto"] == 1
    assert ours["recvfrom"] <= plain["recvfrom"] + 1
    assert sum(ours.values()) <= sum(plain.values())
    assert set(ours) <= {"sendto", "recvfrom", "epoll_wait"}
