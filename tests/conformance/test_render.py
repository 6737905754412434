"""The document of the matrix: what it says of runs, and that a comparison finds every difference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from .render import Matrix, differences, render

_RENDER: Final = Path(__file__).with_name("render.py")
_ROW: Final = {
    "peer": "tlslite-ng",
    "group": "Alerts",
    "name": "one",
    "expected": "the end",
    "versions": ["1.3"],
    "roles": ["client", "server"],
}
_SUITES: Final = ("AES-128-GCM", "AES-256-GCM", "AES-128-CCM")


def _result(role: str, suite: str, verdict: str = "ok", *reasons: str) -> dict[str, Any]:
    place = {"role": role, "layer": "kernel", "suite": suite}
    names = {key: _ROW[key] for key in ("peer", "group", "name")}
    return {**names, "version": "1.3", **place, "verdict": verdict, "reasons": list(reasons)}


def _all(verdict: str = "ok", *reasons: str) -> list[dict[str, Any]]:
    return [
        _result(role, suite, verdict, *reasons)
        for role in ("client", "server")
        for suite in _SUITES
    ]


class _Runs:
    """A directory with what a run on the kernel with rekey wrote down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.document = directory / "document.md"

    def write(self, results: Sequence[dict[str, Any]], **row: Any) -> None:
        run = {"kernel": "rekey", "rows": [{**_ROW, **row}], "results": list(results)}
        (self.directory / "rekey.json").write_text(json.dumps(run))

    def render(self) -> str:
        document = render(Matrix.load([self.directory]))
        self.document.write_text(document)
        return document

    def check(self) -> list[str]:
        return list(differences(Matrix.load([self.directory]), self.document.read_text()))


@pytest.fixture
def runs(tmp_path: Path) -> _Runs:
    return _Runs(tmp_path)


def _line(document: str) -> str:
    return next(line for line in document.splitlines() if line.startswith("| one "))


_CCM: Final = [
    *[one for one in _all() if one["suite"] != "AES-128-CCM"],
    *[_result(role, "AES-128-CCM", "differs", "why") for role in ("client", "server")],
]


@pytest.mark.parametrize(
    ("results", "cell"),
    [
        (_all(), "ok"),
        (_all("differs", "why"), "[1]"),
        (_all("fail"), "**FAIL**"),
        ([_result("client", "AES-128-GCM")], "ok"),
        ([_result("client", "", "n/a", "why"), _result("server", "", "n/a", "why")], "n/a [1]"),
        ([*_all()[:3], *_all("differs", "why")[3:]], "client: ok; server: [1]"),
        (_CCM, "ok; AES-128-CCM: [1]"),
        ([*_all()[:5], _result("server", "AES-128-CCM", "fail")], "ok; server AES-128-CCM: **FAIL**"),
    ],
)  # fmt: skip
def test_cell(runs: _Runs, results: list[dict[str, Any]], cell: str) -> None:
    runs.write(results)
    document = runs.render()
    assert _line(document) == f"| one | the end | 1.3 | client, server | {cell} |"
    assert ("- [1] why" in document) is ("[1]" in cell)
    assert bool(runs.check()) is ("FAIL" in cell)


def test_some_suites_are_compared_with_all(runs: _Runs) -> None:
    runs.write(_CCM)
    runs.render()
    runs.write([_result("client", "AES-128-CCM", "differs", "why")])
    assert runs.check() == []
    runs.write([_result("server", "AES-128-CCM")])
    (said,) = runs.check()
    assert said.endswith("server AES-128-CCM: ok; the document says: [why]")


@pytest.mark.parametrize(
    ("results", "row", "said"),
    [
        (_all("differs", "another reason"), {}, "[another reason]; the document says: ok"),
        (_all("fail"), {}, "**FAIL**; the document says: ok"),
        (_all(), {"expected": "something else"}, "the document has another text"),
        (_all(), {"roles": ["client"]}, "the document has another text"),
        ([], {"name": "two"}, "two, TLS 1.3: not in the document"),
        ([], {"name": "two"}, "one, 1.3: in the document, but there is no such test"),
    ],
)
def test_difference(
    runs: _Runs, results: list[dict[str, Any]], row: dict[str, Any], said: str
) -> None:
    runs.write(_all())
    runs.render()
    runs.write(results, **row)
    assert said in "\n".join(runs.check())


def test_the_same_runs_make_the_same_document(runs: _Runs) -> None:
    runs.write(_all())
    first = runs.render()
    runs.write(list(reversed(_all())))
    assert runs.render() == first


def test_command(runs: _Runs) -> None:
    """What the shell sees: the document, or the differences and a status."""

    def run(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, str(_RENDER), *map(str, arguments), str(runs.directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert run() == (1, "")  # no run at all
    runs.write(_all())
    document = runs.render()
    assert run() == (0, document)
    assert run("--check", runs.document) == (0, "")
    runs.write(_all("fail"))
    status, said = run("--check", runs.document)
    assert status == 1
    assert len(said.splitlines()) == len(_all())
