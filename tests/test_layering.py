"""Imports go downward only, the protocol stays pure, and no module outgrows its reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

PACKAGE: Final = Path(__file__).parents[1] / "src" / "ktls"
MAX_LINES: Final = 450

CORE: Final = {"protocol", "record", "handshake"}
HELPERS: Final = {
    "closing",
    "established",
    "files",
    "handover",
    "pump",
    "serial",
    "settings",
    "state",
    "waiting",
}
FRONT_ENDS: Final = {"sockets", "context", "aio", "anyio"}

#: Every room (top-level package or module of ktls), and the rooms that it may import.
ROOMS: Final[dict[str, set[str]]] = {
    "protocol": set(),
    "record": {"protocol"},
    "handshake": {"protocol", "record"},
    "settings": CORE,
    "closing": CORE | {"files", "settings", "waiting"},
    "established": CORE,
    "files": CORE | {"waiting"},
    "handover": CORE | {"closing", "established", "settings", "state"},
    "pump": CORE,
    "serial": set(),
    "state": CORE | {"serial"},
    "waiting": CORE,
    "sockets": CORE | HELPERS,
    "context": CORE | HELPERS | {"sockets"},
    "aio": CORE | HELPERS | {"sockets", "context"},
    "anyio": CORE | HELPERS | {"sockets", "context"},
    "asgi": CORE | HELPERS | FRONT_ENDS,
    "cli": CORE | HELPERS | FRONT_ENDS | {"asgi", "__init__"},
    "testing": CORE,
    # What users import, the commands among them; and what ``python -m ktls`` runs.
    "__init__": CORE | HELPERS | FRONT_ENDS | {"asgi"},
    "__main__": CORE | HELPERS | FRONT_ENDS | {"asgi", "cli", "__init__"},
}

#: All that the protocol needs of the standard library: no sockets, no threads, no clock, no randomness.
PROTOCOL_STDLIB: Final = {
    "__future__",
    "collections",
    "dataclasses",
    "enum",
    "hashlib",
    "hmac",
    "typing",
}

SOURCES: Final = sorted(PACKAGE.rglob("*.py"))
IDS: Final = [str(source.relative_to(PACKAGE)) for source in SOURCES]


def room_of(source: Path) -> str:
    """The room that a file belongs to."""
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, wherever in the file it does so."""
    package = ("ktls", *source.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *filter(None, [node.module])))
            if name == "ktls":
                yield from (f"ktls.{alias.name}" for alias in node.names)
            else:
                yield name


def rooms_imported(source: Path) -> set[str]:
    """The rooms that a file imports; a name of the package itself counts as its ``__init__``."""
    found = set()
    for name in imports(source):
        top, _, rest = name.partition(".")
        if top == "ktls":
            room = rest.partition(".")[0]
            found.add(room if room in {room_of(other) for other in SOURCES} else "__init__")
    return found


def test_there_is_something_to_look_at() -> None:
    assert {"protocol", "record"} <= {room_of(source) for source in SOURCES}
    # Absolute and relative imports are both seen.
    assert "ktls.protocol.suites" in set(imports(PACKAGE / "record" / "aead.py"))
    assert "ktls.protocol.suites" in set(imports(PACKAGE / "protocol" / "connection.py"))


def test_every_room_is_known() -> None:
    unknown = {room_of(source) for source in SOURCES} - ROOMS.keys()
    assert not unknown, (
        f"new top-level modules: {', '.join(sorted(unknown))}. "
        "Add each to ROOMS in tests/test_layering.py, with the rooms that it may import."
    )


@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_imports_go_downward(source: Path) -> None:
    room = room_of(source)
    upward = rooms_imported(source) - ROOMS.get(room, set()) - {room}
    assert not upward, f"{room} may not import {', '.join(sorted(upward))}"


def test_the_rooms_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ROOMS):
        ready = {room for room, below in ROOMS.items() if below <= done} - done
        assert ready, f"a cycle among {', '.join(sorted(ROOMS.keys() - done))}"
        done |= ready


def test_nothing_but_tests_imports_testing() -> None:
    assert [room for room, below in ROOMS.items() if "testing" in below] == []


@pytest.mark.parametrize(
    "source", sorted((PACKAGE / "protocol").glob("*.py")), ids=lambda source: source.name
)
def test_the_protocol_is_pure(source: Path) -> None:
    allowed = PROTOCOL_STDLIB | {"ktls"} | ({"ssl"} if source.name == "errors.py" else set())
    foreign = {name.partition(".")[0] for name in imports(source)} - allowed
    assert not foreign, f"protocol/{source.name} imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_a_module_can_be_read_in_one_sitting(source: Path) -> None:
    lines = len(source.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; split it"
