"""Kernels just started, with modules missing: the lab boots each kind once, and takes the modules away one after the other (``boot``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .session import KINDS, write_certificates

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT: Final = Path(__file__).parents[2]
NOT_LOADED: Final = "the kernel has no module tls, or it is not loaded and we may not load it"

Found = dict[str, Any]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=["rekey", "norekey"])
def kernel(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def found(kernel: str) -> Mapping[str, Found]:
    """What every session on this kind of kernel printed."""
    # Not in /tmp, which is another one in the lab.
    directory = ROOT / "build" / "degraded"
    directory.mkdir(parents=True, exist_ok=True)
    write_certificates(directory)
    done = subprocess.run(
        [
            *(ROOT / "lab/run", "--kernel", kernel, "--no-tls-module", "--timeout", "250", "--"),
            *(sys.executable, "-m", f"{__package__}.boot", directory),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    sessions: dict[str, Found] = json.loads(done.stdout)
    return sessions


def check_user_space(session: Found, kinds: list[str], reason: str) -> None:
    for kind in kinds:
        for front_end in ("server", "client", "asyncio"):
            connection = session[f"{kind}, {front_end}"]
            assert (connection["tx"], connection["rx"]) == ("userspace", "userspace")
            assert reason in connection["reason"]
        assert reason in session[f"{kind}, demanded"]["refused"]


def check_kernel(session: Found, kinds: list[str], kernel: str) -> None:
    for kind in kinds:
        for front_end in ("server", "client", "asyncio"):
            connection = session[f"{kind}, {front_end}"]
            assert connection["tx"] == "kernel"
            in_user_space = kind == "TLS 1.3" and kernel == "norekey"
            assert connection["rx"] == ("userspace" if in_user_space else "kernel")
        demanded = session[f"{kind}, demanded"]
        assert (demanded["tx"], demanded["rx"]) == ("kernel", "kernel")


@pytest.mark.parametrize(
    ("situation", "verdict"),
    [
        ("module not loaded, nobody", "only an administrator may load it (modprobe tls)"),
        ("no module", "the kernel has no tls module"),
    ],
)
def test_without_the_module(situation: str, verdict: str, found: Mapping[str, Found]) -> None:
    check_user_space(found[situation], list(KINDS), NOT_LOADED)
    assert found[situation]["doctor"]["status"] == 2
    assert verdict in found[situation]["doctor"]["verdict"]


def test_without_any_cipher(found: Mapping[str, Found]) -> None:
    check_user_space(found["no ciphers"], list(KINDS), "the kernel has no cipher for")
    assert found["no ciphers"]["doctor"] == {
        "status": 2,
        "verdict": "Every connection runs in user space, because the kernel has no such crypto algorithm.",
    }


def test_without_one_cipher(kernel: str, found: Mapping[str, Found]) -> None:
    session = found["no ChaCha20"]
    reason = "the kernel has no cipher for CHACHA20_POLY1305"
    check_user_space(session, ["TLS 1.2 ChaCha20"], reason)
    check_kernel(session, ["TLS 1.3", "TLS 1.2 AES-GCM"], kernel)
    assert session["doctor"]["status"] == 1
    assert "CHACHA20-POLY1305 in TLS 1.2 need user space" in session["doctor"]["verdict"]


def test_with_everything_and_no_privileges(kernel: str, found: Mapping[str, Found]) -> None:
    session = found["all modules, nobody"]
    check_kernel(session, list(KINDS), kernel)
    assert session["doctor"]["status"] == (0 if kernel == "rekey" else 1)


def test_nothing_is_left_and_nothing_is_logged(found: Mapping[str, Found]) -> None:
    for session in found.values():
        before, after = session["descriptors"]
        assert before == after
        assert session["log"] == []
