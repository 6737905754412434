"""A process from which something was taken away: connections work, and say where they run and why; ``ktls doctor`` says the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from ..support import has_rekey
from .restrictions import POLICIES
from .session import KINDS, write_certificates

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).parents[2]

Session = dict[str, Any]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Session]:
    """Run ``session`` under restrictions; return what it printed."""
    directory = tmp_path_factory.mktemp("certificates")
    write_certificates(directory)
    for parent in (directory, *directory.parents):
        if parent.stat().st_uid == directory.stat().st_uid and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)  # nobody has to get there

    def run(*words: str) -> Session:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", f"{__package__}.session", directory, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        found: Session = json.loads(done.stdout)
        return found

    return run


@dataclass(frozen=True)
class Expected:
    """What must be said: layers of each direction (both versions, or 1.3 and 1.2), and a part of the reason."""

    reason: str
    tx: str = "userspace"
    rx: str = "userspace"
    rx_of_tls12: str | None = None
    doctor: int = 2
    #: A part of the doctor's verdict.
    verdict: str = "a security policy forbids"


RX_OF_TLS13: Final = "kernel" if has_rekey() else "userspace"
SENDING: Final = "a security policy forbids what sending through the kernel needs"
EXPECTED: Final = {
    "TCP_ULP, EPERM": Expected("a security policy forbids kernel TLS"),
    "TCP_ULP, EACCES": Expected("a security policy forbids kernel TLS"),
    "TCP_ULP, ENOSYS": Expected("a security policy forbids kernel TLS"),
    "SOL_TLS, EPERM": Expected(SENDING),
    "SOL_TLS, ENOSYS": Expected(SENDING),
    "TLS_TX, EPERM": Expected(SENDING, rx_of_tls12="kernel", doctor=1),
    "TLS_RX, EPERM": Expected(
        "a security policy forbids" if has_rekey() else "", tx="kernel", doctor=1
    ),
    "getsockopt SOL_TLS, EPERM": Expected("a security policy forbids reading the record counters"),
    # Without these nobody knows whether what was sent has arrived: user space has it in its own hands.
    "getsockopt TCP_INFO, EPERM": Expected(
        SENDING, rx=RX_OF_TLS13, rx_of_tls12="kernel", doctor=-1, verdict=""
    ),
    "ioctl SIOCOUTQ, EPERM": Expected(
        SENDING, rx=RX_OF_TLS13, rx_of_tls12="kernel", doctor=-1, verdict=""
    ),
    "memfd_create, ENOSYS": Expected(
        "no memory file for the key log",
        tx="engine",
        rx="engine",
        verdict="stays with OpenSSL, because no memory file",
    ),
}


def check(found: Session, expected: Expected) -> None:
    for kind in KINDS:
        rx = expected.rx if kind == "TLS 1.3" else expected.rx_of_tls12 or expected.rx
        for front_end in ("server", "client", "asyncio"):
            connection = found[f"{kind}, {front_end}"]
            assert (connection["tx"], connection["rx"]) == (expected.tx, rx)
            assert expected.reason in connection["reason"]
        assert expected.reason in found[f"{kind}, demanded"]["refused"]
    if expected.doctor >= 0:
        assert found["doctor"]["status"] == expected.doctor
    assert expected.verdict in found["doctor"]["verdict"]
    assert found["log"] == []
    before, after = found["descriptors"]
    assert before == after


def test_every_policy_is_expected() -> None:
    assert set(EXPECTED) == set(POLICIES)


#: Left to the long form: what differs in the errno only, or is like another.
LONG: Final = {"TCP_ULP, EACCES", "TCP_ULP, ENOSYS", "SOL_TLS, EPERM", "getsockopt TCP_INFO, EPERM"}
POLICIES_TRIED: Final = [p for p in POLICIES if p not in LONG or "KTLS_TRUST" in os.environ]


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES_TRIED)
def test_what_a_policy_forbids(policy: str, session: Callable[..., Session]) -> None:
    check(session(f"policy:{policy}"), EXPECTED[policy])


@pytest.mark.kernel
@pytest.mark.slow
def test_without_proc(session: Callable[..., Session]) -> None:
    reason = "the key log can't be opened: there is no /proc"
    check(session("proc"), Expected(reason, tx="engine", rx="engine", verdict=reason))


@pytest.mark.kernel
@pytest.mark.slow
def test_nobody_in_particular(session: Callable[..., Session]) -> None:
    """Where the module is loaded, kernel TLS takes no privilege."""
    found = session("nobody")
    for kind in KINDS:
        for front_end in ("server", "client", "asyncio"):
            connection = found[f"{kind}, {front_end}"]
            assert connection["tx"] == "kernel"
            assert connection["rx"] == (RX_OF_TLS13 if kind == "TLS 1.3" else "kernel")
        assert found[f"{kind}, demanded"]["rx"] == "kernel"
    assert found["doctor"]["status"] == (0 if has_rekey() else 1)
