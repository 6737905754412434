"""Known secrets, and where another process has them."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ktls.protocol.key_schedule import TrafficSecret

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ktls.protocol.suites import CipherSuite

_LINE = re.compile(r"^([A-Z_0-9]+) [0-9a-f]+ ([0-9a-f]+)$", re.MULTILINE)


@dataclass
class Secrets:
    """Secrets by name. A traffic secret's keys and IV are with it: ``CLIENT_TRAFFIC_SECRET_1.key``."""

    known: dict[str, bytes] = field(default_factory=dict)

    def read_key_log(self, path: Path, suite: CipherSuite) -> None:
        """Learn all that a key log says, and what follows from it."""
        for label, digits in _LINE.findall(path.read_text()):
            self.known[label] = secret = bytes.fromhex(digits)
            if "TRAFFIC_SECRET" in label:
                keys = TrafficSecret(suite, secret).keys()
                self.known |= {f"{label}.key": keys.key, f"{label}.iv": keys.iv}

    def found_in(self, data: bytes) -> set[str]:
        """Names of the secrets that are in ``data``, as they are or in hexadecimal digits; the latter with a mark."""
        found = {name for name, secret in self.known.items() if secret in data}
        return found | {
            f"{name} (text)" for name, secret in self.known.items() if secret.hex().encode() in data
        }

    def shown_in(self, text: str) -> set[str]:
        """Names of the secrets that are spelled out in ``text``, in any of the usual ways."""
        lowered = text.lower()
        return {
            name
            for name, secret in self.known.items()
            if any(spelling in lowered for spelling in spellings(secret))
        }


def spellings(secret: bytes) -> Iterator[str]:
    """How a secret looks as text, in lower case."""
    yield secret.hex()
    yield secret.hex(" ")
    yield secret.hex(":")
    yield repr(secret)[2:-1].lower()
    yield str(list(secret))[1:-1]
    yield str(int.from_bytes(secret, "big"))
    yield base64.b64encode(secret).decode().lower().rstrip("=")[:-1]


def memory_of(pid: int) -> Iterator[bytes]:
    """Everything that a process may have written to."""
    with Path(f"/proc/{pid}/maps").open() as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            where, permissions, *_ = line.split()
            if permissions[:2] != "rw":
                continue
            start, end = (int(part, 16) for part in where.split("-"))
            memory.seek(start)
            try:
                yield memory.read(end - start)
            except OSError:
                continue  # device memory


def key_logs_of(pid: int) -> Iterable[bytes]:
    """What is in each memory file that a process holds open."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "memfd:ktls-keylog" in os.readlink(descriptor):
                yield descriptor.read_bytes()
        except FileNotFoundError:
            continue  # closed meanwhile
