"""What the system says about kernel TLS: the module, the crypto drivers, the counters. Reads files only.

Every function bears the absence of its file: containers hide /lib/modules, sandboxes hide /proc.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

__all__ = ("ALGORITHMS", "Driver", "Module", "counters", "drivers", "module_state")

_PROC: Final = Path("/proc")
_MODULES: Final = Path("/lib/modules")

#: What TLS asks the kernel's crypto layer for (net/tls/tls_sw.c).
ALGORITHMS: Final = ("gcm(aes)", "ccm(aes)", "rfc7539(chacha20,poly1305)")
#: Parts of driver names that say which CPU instructions are used.
_INSTRUCTIONS: Final = (
    ("vaes", "VAES"),
    ("aesni", "AES-NI"),
    ("avx", "AVX"),
    ("simd", "SIMD"),
    ("neon", "NEON"),
    ("-ce", "ARMv8 crypto"),
    ("s390", "CPACF"),
    ("p10", "POWER10"),
)


@final
@dataclass(frozen=True, slots=True)
class Module:
    """The ``tls`` module. ``on_disk`` is None when that can't be seen (no /lib/modules for this kernel, as in containers)."""

    loaded: bool
    on_disk: bool | None

    def advice(self) -> str | None:
        """Return how to load it, if that is what is missing."""
        if self.loaded:
            return None
        if self.on_disk is False:
            return "this kernel was installed without the tls module: install the package with its extra modules"
        where = "" if self.on_disk else " on the host"
        return (
            f"as root{where}: modprobe tls; "
            "to have it after every boot: echo tls > /etc/modules-load.d/ktls.conf"
        )


@final
@dataclass(frozen=True, slots=True)
class Driver:
    """Who does an algorithm: the driver with the highest priority, and what it computes with."""

    algorithm: str
    name: str | None
    priority: int = 0

    @property
    def means(self) -> str:
        """Say what it computes with, as far as the name tells."""
        if self.name is None:
            return "not in use yet"
        for part, meaning in _INSTRUCTIONS:
            if part in self.name:
                return meaning
        return "generic C" if "generic" in self.name else "the kernel's crypto library"


def module_state(proc: Path = _PROC, modules: Path = _MODULES) -> Module:
    """Return the state of the ``tls`` module (built-in counts as loaded, once it is in use)."""
    available = _read(proc / "sys/net/ipv4/tcp_available_ulp").split()
    loaded = "tls" in available or (proc / "net/tls_stat").exists()
    directory = modules / platform.release()
    if loaded or not directory.is_dir():
        return Module(loaded, None)
    lists = _read(directory / "modules.dep") + _read(directory / "modules.builtin")
    # Lines such as "kernel/net/tls/tls.ko.xz: ..."
    return Module(loaded, "/net/tls/tls.ko" in lists)


def drivers(proc: Path = _PROC) -> tuple[Driver, ...]:
    """Return the driver of each algorithm, nothing without /proc/crypto. An algorithm appears there once somebody has used it."""
    listed = _read(proc / "crypto")
    if not listed:
        return ()
    best = {name: Driver(name, None, -1) for name in ALGORITHMS}
    for block in listed.split("\n\n"):
        lines = (line.partition(":") for line in block.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        current = best.get(fields.get("name", ""))
        # Internal ones are parts of others, and can't be asked for.
        if current is None or fields.get("internal") == "yes" or "driver" not in fields:
            continue
        priority = int(fields.get("priority", "0"))
        if priority > current.priority:
            best[current.algorithm] = Driver(current.algorithm, fields["driver"], priority)
    return tuple(best.values())


def counters(proc: Path = _PROC) -> dict[str, int]:
    """Return /proc/net/tls_stat, in its order and spelling; empty when there is none."""
    pairs = (line.split() for line in _read(proc / "net/tls_stat").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
