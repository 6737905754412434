"""The demo's table can say no: a step that fails, or a kernel that did not count, makes it bad."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SHOW = Path(__file__).resolve().parents[2] / "demo" / "show.py"


@pytest.fixture
def show() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("ktls_demo_show", SHOW)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run_step(
    show: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    counters: list[dict[str, int]],
    *,
    mode: str = "kernel",
    error: Exception | None = None,
) -> list[bool]:
    monkeypatch.setattr(show, "tls_stat", lambda: counters.pop(0))

    def work() -> str:
        if error is not None:
            raise error
        return "done"

    demo = show.Demo(Path(), 0, Path(), "", mode)
    demo.step("something", {"TlsTxSw": 2}, work)
    return [line.good for line in demo.lines]


def test_good_only_if_the_kernel_counted(show: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_step(show, monkeypatch, [{"TlsTxSw": 1}, {"TlsTxSw": 3}]) == [True, True]
    assert run_step(show, monkeypatch, [{"TlsTxSw": 1}, {"TlsTxSw": 2}]) == [True, False]
    assert run_step(show, monkeypatch, [{}, {}]) == [True, False]


def test_decrypt_errors_are_bad(show: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    after = {"TlsTxSw": 2, "TlsDecryptError": 1}
    assert run_step(show, monkeypatch, [{}, after]) == [True, False]


def test_a_failed_step_is_bad(show: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("the SHA-256 differs")
    assert run_step(show, monkeypatch, [{}, {"TlsTxSw": 2}], error=error) == [False, True]


def test_user_space_marks_the_kernel_as_not_run(
    show: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "tls_stat", dict)
    demo = show.Demo(Path(), 0, Path(), "", "userspace")
    demo.step("something", {"TlsTxSw": 2}, lambda: "done")
    assert "not run" in demo.lines[1].evidence
