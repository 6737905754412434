"""Writes down what came of every cell of a run; ``render.py`` makes the document of that."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import pytest

from ..peers.parties import LAB
from .matrix import KERNEL, ROWS, Cell, layers

#: Name of the property of a test that holds the reason why a layer does something else than its row says.
DIFFERS: Final = "differs"


class Recorder:
    """Keeps verdicts: ``ok``, ``differs`` (with reasons), ``fail``; and what does not apply here, with the reason."""

    def __init__(self) -> None:
        self._verdicts: dict[str, tuple[Cell, str, list[str]]] = {}

    def note(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Take the report of one phase of a test. A test that fails in any phase has failed."""
        cell = getattr(item, "callspec", None) and item.callspec.params.get("cell")  # type: ignore[attr-defined]  # only functions with parameters have it
        if not isinstance(cell, Cell):
            return
        _, verdict, _ = self._verdicts.get(item.nodeid, (cell, "ok", []))
        reasons = [str(value) for name, value in report.user_properties if name == DIFFERS]
        if not report.passed:
            verdict = "fail"
        elif reasons and verdict == "ok":
            verdict = "differs"
        self._verdicts[item.nodeid] = cell, verdict, reasons

    def write(self, directory: Path) -> None:
        """Write everything to one file, named after the kernel."""
        rows = [
            {
                "peer": row.peer,
                "group": row.group,
                "name": row.name,
                "expected": row.expected,
                "versions": list(row.versions),
                "roles": list(row.roles),
            }
            for row in ROWS
        ]
        results = [
            _result(cell, verdict, reasons) for cell, verdict, reasons in self._verdicts.values()
        ]
        for row in ROWS:
            for version in row.versions:
                for layer in layers(version, every=True):
                    if (why := row.not_applicable.get(layer)) is not None:
                        results += [
                            _result(Cell(row, version, role, layer, ""), "n/a", [why])
                            for role in row.roles
                        ]
        run = {"kernel": KERNEL, "rows": rows, "results": results}
        path = directory / f"{LAB or 'host'}.json"
        path.write_text(json.dumps(run, indent=1) + "\n")


def _result(cell: Cell, verdict: str, reasons: list[str]) -> dict[str, Any]:
    return {
        "peer": cell.row.peer,
        "group": cell.row.group,
        "name": cell.row.name,
        "version": cell.version,
        "role": cell.role,
        "layer": cell.layer,
        "suite": cell.suite,
        "verdict": verdict,
        "reasons": reasons,
    }


def output_directory() -> Path | None:
    """Where to write to, if anywhere."""
    name = os.environ.get("KTLS_MATRIX")
    return Path(name) if name else None
