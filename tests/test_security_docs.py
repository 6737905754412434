"""What docs/security.md and docs/known-mistakes.md promise: the tests that they name exist, and each promise names one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
SOURCES: Final = sorted((ROOT / "src" / "ktls").rglob("*.py"))
DOCUMENTS: Final = ("docs/security.md", "docs/known-mistakes.md")

_TEST: Final = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
#: Anything that looks like a test, however it is written.
_LIKE_A_TEST: Final = re.compile(r"tests/[\w/]+\.py::\S+|\btest_\w+(?!\w|\.py)")


@cache
def functions_of(path: str) -> frozenset[str]:
    """Names of the test functions of a file; parameters are no part of them."""
    tree = ast.parse((ROOT / path).read_text(), path)
    functions = (
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def named_in(text: str) -> list[tuple[str, str]]:
    return _TEST.findall(text)


def read(document: str) -> str:
    return (ROOT / document).read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_exists(document: str) -> None:
    named = named_in(read(document))
    assert len(named) > 20
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).exists() or name not in functions_of(path)
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_test_is_named_in_another_way(document: str) -> None:
    """Else nobody would notice if it went."""
    text = _TEST.sub("", read(document))
    assert _LIKE_A_TEST.findall(text.replace("tests/test_security_docs.py", "")) == []


def test_every_mistake_has_a_test() -> None:
    _, *sections = re.split(r"^## ", read("docs/known-mistakes.md"), flags=re.MULTILINE)
    assert [int(section.split(".")[0]) for section in sections] == list(range(1, 18))
    for section in sections:
        rows = re.findall(r"^\| (?!---|mistake).*$", section, re.MULTILINE)
        for part in rows or [section]:
            assert named_in(part), part


def test_every_promise_has_a_test() -> None:
    promises = read("docs/security.md").partition("## What is promised")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!---|promise).*$", promises, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        assert named_in(row), row


@cache
def names_used(source: Path) -> set[str]:
    """Every name and attribute that a file mentions."""
    nodes = list(ast.walk(ast.parse(source.read_text(), str(source))))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def users_of(*names: str) -> set[str]:
    """Files that mention any of ``names``."""
    return {
        str(source.relative_to(ROOT / "src" / "ktls"))
        for source in SOURCES
        if names_used(source) & set(names)
    }


def test_no_kernel_is_told_by_its_version() -> None:
    """Only the doctor shows it, to people."""
    assert users_of("uname", "platform") - {"cli/doctor.py", "cli/system.py"} == set()
    assert users_of("recvmsg")  # such a search finds something


def test_options_that_are_never_set() -> None:
    """What breaks records when a file changes, leaves one open that a close would lose, or waits in the kernel's buffers."""
    assert users_of("TLS_TX_ZEROCOPY_RO") <= {"record/linux.py", "record/probe.py"}
    for name in ("MSG_MORE", "SPLICE_F_MORE", "MSG_ZEROCOPY", "AF_UNSPEC"):
        assert users_of(name) <= ({"anyio/listening.py"} if name == "AF_UNSPEC" else set()), name
