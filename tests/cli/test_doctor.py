from __future__ import annotations

import json
import platform
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from ktls.cli import main
from ktls.cli.doctor import verdict
from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.suites import AEAD
from ktls.record.probe import Capabilities, Finding, probe

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

WORKS = Finding()
ALL = MappingProxyType(dict.fromkeys(((v, a) for v in ProtocolVersion for a in AEAD), WORKS))
FULL = Capabilities(
    kernel_tls=WORKS,
    tx=ALL,
    rx=ALL,
    rekey_tx=WORKS,
    rekey_rx=WORKS,
    zerocopy_sendfile=WORKS,
    expect_no_pad=WORKS,
    max_payload=WORKS,
)


def without(*ciphers: tuple[ProtocolVersion, AEAD]) -> Capabilities:
    missing = dict(ALL) | dict.fromkeys(ciphers, Finding("missing"))
    return replace(FULL, tx=missing, rx=missing)


def show(monkeypatch: pytest.MonkeyPatch, capabilities: Capabilities, *options: str) -> int:
    monkeypatch.setattr("ktls.cli.doctor.probe", lambda: capabilities)
    monkeypatch.setenv("COLUMNS", "80")
    return main(["doctor", *options])


def test_verdict_kernel() -> None:
    judged = verdict(FULL)
    assert judged.status == "kernel"
    assert judged.text == "Connections use the kernel both ways, and change their keys there."


def test_verdict_is_not_lowered_by_what_nobody_negotiates() -> None:
    ccm = [(version, AEAD.AES_128_CCM) for version in ProtocolVersion]
    assert verdict(without(*ccm)).status == "kernel"


def test_verdict_without_rekey() -> None:
    no = Finding("this kernel can't change keys")
    judged = verdict(replace(FULL, rekey_tx=no, rekey_rx=no))
    assert judged.status == "degraded"
    assert "TLS 1.3 connections send through the kernel and receive in user space" in judged.text
    assert "because this kernel can't change keys" in judged.text


def test_verdict_without_a_cipher() -> None:
    judged = verdict(without((ProtocolVersion.TLSv1_3, AEAD.CHACHA20_POLY1305)))
    assert judged.status == "degraded"
    assert judged.text.endswith("CHACHA20-POLY1305 in TLS 1.3 needs user space.")


def test_verdict_userspace() -> None:
    judged = verdict(replace(FULL, kernel_tls=Finding("no module")))
    assert (judged.status, judged.text) == (
        "userspace",
        "Every connection runs in user space, because no module.",
    )
    assert verdict(without(*ALL)).status == "userspace"


@pytest.mark.parametrize(
    ("capabilities", "status"),
    [
        (FULL, 0),
        (replace(FULL, rekey_tx=Finding("no rekey"), rekey_rx=Finding("no rekey")), 1),
        (replace(without(*ALL), kernel_tls=Finding("no module")), 2),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capabilities: Capabilities,
    status: int,
) -> None:
    assert show(monkeypatch, capabilities) == status
    assert show(monkeypatch, capabilities, "--json") == status


def test_reads_well_at_80_columns_without_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_rekey = Finding("this kernel can't change keys")
    show(monkeypatch, replace(FULL, rekey_tx=no_rekey, rekey_rx=no_rekey))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("AES-256-GCM", "CHACHA20-POLY1305", "yes", "no (1)", "gcm(aes)", "Python"):
        assert word in out
    assert out.count("(1) this kernel can't change keys") == 1
    assert "TLS 1.2 connections use the kernel both ways." in " ".join(out.split())


def test_json_says_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show(monkeypatch, replace(FULL, max_payload=Finding("not known")), "--json")
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["verdict"]["status"] == "kernel"
    assert said["kernel"]["release"] == platform.release()
    assert len(said["ciphers"]) == 8
    cipher = said["ciphers"][0]
    assert set(cipher) == {"version", "cipher", "tx", "rx"}
    assert cipher["tx"] == {"works": True, "reason": None}
    assert said["features"]["max_payload"] == {"works": False, "reason": "not known"}
    assert set(said["features"]) == {
        "rekey_tx",
        "rekey_rx",
        "zerocopy_sendfile",
        "expect_no_pad",
        "max_payload",
    }
    assert {driver["algorithm"] for driver in said["drivers"]} >= {"gcm(aes)", "ccm(aes)"}
    assert set(said) >= {"module", "counters", "python", "openssl", "kernel_tls"}


def test_without_proc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the probe has done counts, whatever files are missing."""
    monkeypatch.setattr("ktls.cli.system._read", lambda path: "")
    show(monkeypatch, FULL)
    out = capsys.readouterr().out
    assert "tls module  loaded" in out
    assert "modprobe" not in out
    assert "gcm(aes)" not in out


def test_here(
    ktls_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Whatever this kernel is: text, JSON and probe say the same."""
    expected = {"kernel": 0, "degraded": 1, "userspace": 2}[verdict(probe()).status]
    done = ktls_command("doctor", "--json")
    assert (done.returncode, done.stderr) == (expected, "")
    assert json.loads(done.stdout)["verdict"]["text"] == verdict(probe()).text


@pytest.mark.kernel
@pytest.mark.rekey
def test_lab_with_rekey(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no (" not in out
    assert "TlsRxRekeyReceived" in out
    assert "tls module  loaded" in out


@pytest.mark.kernel
@pytest.mark.norekey
def test_lab_without_rekey(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    assert "this kernel can't change keys" in capsys.readouterr().out
