"""``ktls doctor``: what this kernel can do, why not, and what a connection will therefore use here."""

from __future__ import annotations

import json
import platform
import ssl
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, final

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ktls.handshake.keylog import tap_for
from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.suites import AEAD
from ktls.record.probe import Capabilities, Finding, probe

from .system import Driver, Module, counters, drivers, module_state

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("Report", "Verdict", "command", "verdict")

#: Other ciphers are negotiated only by those who configured them.
_USUAL: Final = (AEAD.AES_128_GCM, AEAD.AES_256_GCM, AEAD.CHACHA20_POLY1305)
_VERSIONS: Final = {ProtocolVersion.TLSv1_3: "TLS 1.3", ProtocolVersion.TLSv1_2: "TLS 1.2"}
_EXIT_STATUS: Final = {"kernel": 0, "degraded": 1, "userspace": 2, "engine": 2}
_STYLE: Final = ("bold green", "bold yellow", "bold red")

_Cipher: TypeAlias = tuple[ProtocolVersion, AEAD]


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What connections will use here: the kernel both ways, not always, or not at all."""

    status: Literal["kernel", "degraded", "userspace", "engine"]
    text: str


@final
@dataclass(frozen=True, slots=True)
class Report:
    """All that is known about this machine."""

    capabilities: Capabilities
    module: Module
    drivers: tuple[Driver, ...]
    counters: Mapping[str, int]
    #: Whether OpenSSL can give us the keys of a connection.
    secrets: Finding

    @classmethod
    def collect(cls) -> Report:
        """Ask the kernel, then the files: probing loads modules, and puts algorithms to use."""
        capabilities = probe()
        module = module_state()
        if capabilities.kernel_tls and not module.loaded:  # there is no /proc to say so
            module = Module(loaded=True, on_disk=None)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        secrets = Finding(tap_for(context).unavailable)
        return cls(capabilities, module, drivers(), counters(), secrets)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def command(*, as_json: bool) -> int:
    """Tell what this kernel can do, and what connections will use.

    Exit status: 0 the kernel both ways, 1 not for everything, 2 not at all.
    As root this loads the kernel's tls module.
    """
    report = Report.collect()
    judgement = verdict(report.capabilities, report.secrets)
    if as_json:
        click.echo(json.dumps(_as_json(report, judgement), indent=2))
    else:
        _show(report, judgement)
    return _EXIT_STATUS[judgement.status]


def verdict(capabilities: Capabilities, secrets: Finding | None = None) -> Verdict:
    """Say in one sentence what connections will use, and why. ``secrets``: whether the engine gives any."""
    if secrets is not None and not secrets:
        return Verdict("engine", f"Every connection stays with OpenSSL, because {secrets.reason}.")
    if not capabilities.kernel_tls:
        why = capabilities.kernel_tls.reason
        return Verdict("userspace", f"Every connection runs in user space, because {why}.")
    usual = [(version, aead) for version in _VERSIONS for aead in _USUAL]
    missing = [
        cipher for cipher in usual if not (capabilities.tx[cipher] and capabilities.rx[cipher])
    ]
    if len(missing) == len(usual):
        return _no_cipher_both_ways(capabilities, usual)
    names = ", ".join(f"{_name(aead)} in {_VERSIONS[version]}" for version, aead in missing)
    rekey = capabilities.rekey_tx and capabilities.rekey_rx
    if not rekey:
        text = (
            f"TLS 1.3 connections send through the kernel and receive in user space, because {rekey.reason} "
            "and the peer may ask for that at any time; TLS 1.2 connections use the kernel both ways"
        )
    else:
        text = "Connections use the kernel both ways, and change their keys there"
    if missing:
        text += f"; {names} need{'s' if len(missing) == 1 else ''} user space"
    return Verdict("kernel" if rekey and not missing else "degraded", text + ".")


def _no_cipher_both_ways(capabilities: Capabilities, usual: list[_Cipher]) -> Verdict:
    """No usual cipher works in both directions; in one of them it may."""
    tx = next((capabilities.tx[c].reason for c in usual if not capabilities.tx[c]), None)
    rx = next((capabilities.rx[c].reason for c in usual if not capabilities.rx[c]), None)
    if any(capabilities.tx[cipher] for cipher in usual):
        text = f"Connections send through the kernel and receive in user space, because {rx}."
        return Verdict("degraded", text)
    if any(capabilities.rx[cipher] for cipher in usual):
        text = f"TLS 1.2 connections receive through the kernel; everything else is in user space, because {tx}."
        return Verdict("degraded", text)
    return Verdict("userspace", f"Every connection runs in user space, because {tx}.")


def _name(aead: AEAD) -> str:
    return aead.name.replace("_", "-")


def _features(capabilities: Capabilities) -> dict[str, tuple[str, Finding]]:
    """JSON name -> (name for humans, finding)."""
    return {
        "rekey_tx": ("rekey: sending", capabilities.rekey_tx),
        "rekey_rx": ("rekey: receiving", capabilities.rekey_rx),
        "zerocopy_sendfile": ("TLS_TX_ZEROCOPY_RO", capabilities.zerocopy_sendfile),
        "expect_no_pad": ("TLS_RX_EXPECT_NO_PAD", capabilities.expect_no_pad),
        "max_payload": ("TLS_TX_MAX_PAYLOAD_LEN", capabilities.max_payload),
    }


def _as_json(report: Report, judgement: Verdict) -> dict[str, Any]:
    capabilities = report.capabilities

    def found(finding: Finding) -> dict[str, Any]:
        return {"works": bool(finding), "reason": finding.reason}

    return {
        "verdict": asdict(judgement),
        "kernel": {"release": platform.release(), "machine": platform.machine()},
        "secrets": found(report.secrets),
        "kernel_tls": found(capabilities.kernel_tls),
        "module": asdict(report.module) | {"advice": report.module.advice()},
        "ciphers": [
            {
                "version": _VERSIONS[version],
                "cipher": _name(aead),
                "tx": found(capabilities.tx[version, aead]),
                "rx": found(capabilities.rx[version, aead]),
            }
            for version, aead in capabilities.tx
        ],
        "features": {
            name: found(finding) for name, (_, finding) in _features(capabilities).items()
        },
        "drivers": [
            {"algorithm": driver.algorithm, "driver": driver.name, "means": driver.means}
            for driver in report.drivers
        ],
        "counters": dict(report.counters),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
    }


@final
class _Notes:
    """Numbers the reasons, so that a table has room for them."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def cell(self, finding: Finding) -> Text:
        if finding.reason is None:
            return Text("yes", style="green")
        if finding.reason not in self._reasons:
            self._reasons.append(finding.reason)
        return Text(f"no ({self._reasons.index(finding.reason) + 1})", style="red")

    def lines(self) -> list[str]:
        return [f"({number}) {reason}" for number, reason in enumerate(self._reasons, 1)]


def _show(report: Report, judgement: Verdict) -> None:
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    notes = _Notes()
    console.print(_facts(report))
    if report.capabilities.kernel_tls:  # else all would say "no", for the verdict's reason
        console.print(_cipher_table(report.capabilities, notes))
        console.print(_feature_table(report.capabilities, notes))
        for line in notes.lines():
            console.print(Text(line))
        if report.drivers:
            console.print(_driver_table(report.drivers))
        if report.counters:
            console.print(_counter_table(report.counters))
    else:
        console.print()
    console.print(Text(judgement.text, style=_STYLE[_EXIT_STATUS[judgement.status]]))


def _facts(report: Report) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_row("kernel", f"Linux {platform.release()} {platform.machine()}")
    grid.add_row("tls module", "loaded" if report.module.loaded else "not loaded")
    advice = report.module.advice()
    if advice is not None:
        grid.add_row("to load it", advice)
    grid.add_row("Python", platform.python_version())
    grid.add_row("OpenSSL", ssl.OPENSSL_VERSION.removeprefix("OpenSSL "))
    return grid


def _cipher_table(capabilities: Capabilities, notes: _Notes) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("cipher", no_wrap=True)
    for version in _VERSIONS.values():
        for direction in ("send", "receive"):
            table.add_column(f"{version}\n{direction}")
    for aead in dict.fromkeys(aead for _, aead in capabilities.tx):
        cells = [
            notes.cell(findings[version, aead])
            for version in _VERSIONS
            for findings in (capabilities.tx, capabilities.rx)
        ]
        table.add_row(_name(aead), *cells)
    return table


def _feature_table(capabilities: Capabilities, notes: _Notes) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("feature", no_wrap=True)
    table.add_column("works")
    for label, finding in _features(capabilities).values():
        table.add_row(label, notes.cell(finding))
    return table


def _driver_table(found: tuple[Driver, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("algorithm", no_wrap=True)
    table.add_column("driver", overflow="fold")
    table.add_column("computes with")
    for driver in found:
        # "rfc7539(chacha20,poly1305)" is the kernel's name; the column is too narrow for it twice
        algorithm = "chacha20-poly1305" if "chacha" in driver.algorithm else driver.algorithm
        table.add_row(algorithm, driver.name or "", driver.means)
    return table


def _counter_table(values: Mapping[str, int]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for _ in range(2):
        table.add_column("counter", no_wrap=True)
        table.add_column("value", justify="right")
    items = list(values.items())
    half = (len(items) + 1) // 2
    for index in range(half):
        row = [cell for name, value in items[index::half] for cell in (name, str(value))]
        table.add_row(*row)
    return table
