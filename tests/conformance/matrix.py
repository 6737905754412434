"""The matrix: what a behaviour is, which cells it has on the kernel at hand, and what a test of one cell is given.

How to add a behaviour
----------------------
Write it into a module ``test_*.py`` of this directory. One row is one decorated function; the fixture ``scene`` (see ``scene.py``) is one connection of
``cell``, with our end as ``scene.tls`` and a scripted peer as ``scene.peer``, which can put any record or any bytes on the wire::

    @behaviour("KeyUpdate", "an update, then data under the new key", "the data is read", versions=("1.3",))
    def test_update(scene: Scene) -> None:
        scene.peer.send_update()
        scene.both_ways()

Many rows with one body are a table, whose rows carry what they need as ``case``::

    @behaviours(Row("Records", "type 99", "unexpected_message", case=(99, b"?")), ...)
    def test_refused(scene: Scene) -> None:
        scene.peer.send(*scene.cell.row.case)
        scene.refused(AlertDescription.UNEXPECTED_MESSAGE)

Rules: the texts are the document's, so they say what the peer does, and what we do. A row is for both versions, both roles and every layer unless it says otherwise;
a layer that can't show it is left out with a reason (``not_applicable={"kernel": "..."}``). Where a layer does something else than ``expected`` says, the test asserts what it
does and calls ``scene.differs("why")``: the reason becomes a footnote. A failing test is a red cell; there is no other way to make one.
Every cell costs a handshake in pure Python (20 ms, 50 ms in the lab).

Which cells run: the layers that the kernel at hand uses by default, with the suite going round over the rows, and in the lab our role, too, for scripted peers. With KTLS_TRUST
set: both roles, all suites, and the layers that are not the default with one suite.
With KTLS_MATRIX set to a directory the outcome of every cell is written there, as ``host.json``, ``rekey.json`` or ``norekey.json``; ``render.py`` makes the document of them.
"""

from __future__ import annotations

import os
import re
import ssl
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar, cast

import pytest

from ..peers.parties import TLS12, TLS13
from ..peers.peers import Role
from ..support import kernel_kind

Version: TypeAlias = Literal["1.2", "1.3"]
#: Where records are protected. ``mixed``: sending in the kernel, receiving in user space. ``engine``: the handshake engine goes on.
Layer: TypeAlias = Literal["kernel", "mixed", "userspace", "engine"]

VERSIONS: Final[tuple[Version, ...]] = ("1.3", "1.2")
ROLES: Final[tuple[Role, ...]] = ("client", "server")
#: The peer that follows a script; others are programs.
SCRIPTED: Final = "tlslite-ng"
KERNEL: Final = kernel_kind()
#: The long form: see above.
LONG: Final = "KTLS_TRUST" in os.environ

_OFFERED: Final = {cipher["name"] for cipher in ssl.create_default_context().get_ciphers()}
#: ``ssl`` offers CCM with TLS 1.3 only where OpenSSL's configuration says so: ``openssl.cnf`` beside this file.
_HAS_CCM13: Final = "TLS_AES_128_CCM_SHA256" in _OFFERED
_SUITES: Final = ("AES-128-GCM", "AES-256-GCM", "ChaCha20-Poly1305", "AES-128-CCM")
SUITES: Final[Mapping[Version, tuple[str, ...]]] = {
    "1.3": _SUITES if _HAS_CCM13 else _SUITES[:3],
    "1.2": _SUITES,
}
#: What the engine goes on with: we have no record layer for it.
ENGINE_SUITE: Final = "AES-128-CBC"

#: Kernel, version: the layers that it uses by default, and those that can be had in the long form.
_LAYERS: Final[Mapping[tuple[str, Version], tuple[tuple[Layer, ...], tuple[Layer, ...]]]] = {
    ("none", "1.3"): (("userspace",), ()),
    ("none", "1.2"): (("userspace", "engine"), ()),
    ("rekey", "1.3"): (("kernel",), ("userspace",)),
    ("rekey", "1.2"): (("kernel",), ("userspace", "engine")),
    ("norekey", "1.3"): (("mixed",), ("kernel", "userspace")),
    ("norekey", "1.2"): (("kernel",), ("userspace", "engine")),
}


@dataclass(frozen=True, eq=False)
class Row:
    """One behaviour: a row of the document."""

    group: str
    #: What the peer does; unique within its group, peer and version.
    name: str
    #: What we do.
    expected: str
    peer: str = SCRIPTED
    versions: tuple[Version, ...] = VERSIONS
    roles: tuple[Role, ...] = ROLES
    #: None: those of the version. Empty: the row has nothing to do with suites.
    suites: tuple[str, ...] | None = None
    #: Layers that can't show it, and why not.
    not_applicable: Mapping[Layer, str] = field(default_factory=dict)
    #: One of many of a kind: one suite will do, in turn, and in the short form one role.
    many: bool = False
    #: Whether it is shown with the engine's own record layer, too.
    engine: bool = False
    #: What the body of a table of rows needs to know of this one.
    case: Any = None

    @property
    def places(self) -> set[tuple[str, str, str, Version]]:
        """Its lines in the document."""
        return {(self.peer, self.group, self.name, version) for version in self.versions}

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell of the matrix; its kernel is the one at hand. ``role`` is ours."""

    row: Row
    version: Version
    role: Role
    layer: Layer
    suite: str

    @property
    def tls_version(self) -> ssl.TLSVersion:
        return TLS13 if self.version == "1.3" else TLS12

    @property
    def id(self) -> str:
        words = (self.row.slug, self.version, self.role, self.layer, self.suite)
        return "-".join(word for word in words if word)


#: All rows of all modules that were imported, in their order.
ROWS: Final[list[Row]] = []


def layers(version: Version, *, every: bool = LONG) -> tuple[Layer, ...]:
    """Layers of the kernel at hand; ``every``: also those that it does not use by default."""
    by_default, others = _LAYERS[KERNEL, version]
    return by_default + others if every else by_default


def _suites(row: Row, version: Version, role: Role, layer: Layer) -> tuple[str, ...]:
    if layer == "engine":
        return (ENGINE_SUITE,)
    suites = SUITES[version] if row.suites is None else row.suites
    if not suites:
        return ("",)
    if LONG and not row.many and layer in layers(version, every=False):
        return suites
    return (suites[_turn(row, version, role, layer) % len(suites)],)


def _turn(*what: object) -> int:
    """A number that stays the same when rows are added."""
    words = (one.group + one.name if isinstance(one, Row) else str(one) for one in what)
    return zlib.crc32(" ".join(words).encode())


def _roles(row: Row, version: Version) -> tuple[Role, ...]:
    in_turn = row.many or (row.peer == SCRIPTED and KERNEL != "none")
    if LONG or not in_turn:
        return row.roles
    return (row.roles[_turn(row, version, KERNEL) % len(row.roles)],)


def cells(row: Row) -> Iterator[Cell]:
    """Cells of ``row`` that are to be run here."""
    for version in row.versions:
        for layer in layers(version):
            if layer in row.not_applicable or (layer == "engine" and not row.engine):
                continue
            for role in _roles(row, version):
                for suite in _suites(row, version, role, layer):
                    yield Cell(row, version, role, layer, suite)


_Test = TypeVar("_Test", bound=Callable[..., None])


class Mark(Protocol):
    """A decorator of tests."""

    def __call__(self, test: _Test, /) -> _Test: ...


def behaviours(*rows: Row) -> Mark:
    """Make a test of every cell of ``rows``; it is given the cell as ``cell``."""
    known = {place for row in ROWS for place in row.places}
    for row in rows:
        assert known.isdisjoint(row.places), f"two rows {row.group}: {row.name}"
        known |= row.places
    ROWS.extend(rows)
    parameters = [pytest.param(cell, id=cell.id) for row in rows for cell in cells(row)]

    mark = pytest.mark.parametrize("cell", parameters)
    return cast("Mark", mark)


def behaviour(group: str, name: str, expected: str, **options: Any) -> Mark:
    """Make a test of every cell of one row; ``options`` are further fields of ``Row``."""
    return behaviours(Row(group, name, expected, **options))
