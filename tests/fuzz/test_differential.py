"""Kernel and user space on the same bytes, in short; and that what is allowed to differ does. The long form: ``lab/fuzz``."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, Final

import pytest

from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.suites import CipherSuite

from ..record.layers import SUITES
from .differences import DIFFERENCES, check, compare
from .differential import CORPUS, Judge, inputs
from .observing import Observation, observe
from .scenario import Action, Scenario, Wire

if TYPE_CHECKING:
    from pathlib import Path

SEED: Final = 2026
FILES: Final = sorted(CORPUS.glob("*"))
NAMED: Final = {f"difference-{known.name.replace(' ', '-')}": known.name for known in DIFFERENCES}


def run(count: int) -> Judge:
    """Run the first inputs of a seed."""
    judge = Judge()
    for data in itertools.islice(inputs(SEED), count):
        findings = judge.findings(data)
        assert not findings, f"{findings} {data.hex()}\n{judge.account}"
    return judge


@pytest.mark.kernel
@pytest.mark.slow
def test_layers_agree() -> None:
    judge = run(120)
    assert judge.executions == 360
    assert judge.known[""] > 120
    assert len(judge.ends) > 6


def test_our_own_layer_is_consistent() -> None:
    assert len(run(40).ends) > 4


@pytest.mark.kernel
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_corpus(path: Path) -> None:
    judge = Judge()
    findings = judge.findings(path.read_bytes())
    assert not findings, f"{findings}\n{judge.account}"


@pytest.mark.rekey
@pytest.mark.parametrize("file", sorted(NAMED))
def test_each_known_difference_is_one(file: str) -> None:
    """None is excused that does not exist (any more)."""
    judge = Judge()
    assert not judge.findings((CORPUS / file).read_bytes()), judge.account
    assert judge.known[NAMED[file]] > 0, judge.account


def test_scenarios_reach_everything() -> None:
    scenarios = [
        Scenario.from_bytes(data, key_updates=True) for data in itertools.islice(inputs(SEED), 600)
    ]
    steps = [step for scenario in scenarios for step in scenario.steps]
    assert {scenario.suite for scenario in scenarios} == set(SUITES)
    assert {scenario.reading for scenario in scenarios} == {"recv", "loop", "splice"}
    assert {scenario.ending for scenario in scenarios} == {"fin", "reset"}
    faults = {fault for scenario in scenarios for fault in scenario.faults}
    assert faults >= {fault for known in DIFFERENCES for fault in known.faults}
    actions = {step.name for step in steps if isinstance(step, Action)}
    assert actions == {"send", "vector", "sendfile", "refresh", "request", "close"}
    whole = [what for step in steps if isinstance(step, Wire) for what in step.what.split(", ")]
    for record in (
        "data 0",
        "data 16384",
        "handshake 1800000101 5",
        "alert 0100 2",
        "handshake 18 1",
    ):
        assert record in whole, record


def test_nobody_changes_keys_where_nobody_can() -> None:
    for data in itertools.islice(inputs(SEED), 300):
        scenario = Scenario.from_bytes(data, key_updates=False)
        names = {step.name for step in scenario.steps if isinstance(step, Action)}
        assert not names & {"refresh", "request"}
        assert scenario.limits.records is None


# --- what the judge sees ------------------------------------------------------------------------------------------


SCENARIO: Final = Scenario.from_bytes(b"", key_updates=True)


@pytest.fixture(scope="module")
def plain() -> Observation:
    """Nothing comes, and TCP ends."""
    seen = observe(SCENARIO, "userspace")
    assert seen.end == seen.again == "TruncatedError"
    assert not [*check(SCENARIO, seen)]
    return seen


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", b"\0"),
        ("end", "closed"),
        ("tickets", (b"x",)),
        ("outcomes", ()),
        ("sent", ()),
        ("ended_in", 7),
        ("states", ("open", "failed")),
        ("generations", (0, 1)),
        ("opened", 1),
    ],
)
def test_layers_that_differ_are_seen(plain: Observation, field: str, value: Any) -> None:
    other = dataclasses.replace(plain, **{field: value})
    assert compare(SCENARIO, plain, plain) == ("", "")
    assert compare(SCENARIO, other, plain) == ("", "the layers differ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", b"\1"),
        ("again", "more"),
        ("pending", 1),
        ("end", "alert BAD_RECORD_MAC"),
    ],
)
def test_observation_that_can_not_be_is_seen(plain: Observation, field: str, value: Any) -> None:
    assert [*check(SCENARIO, dataclasses.replace(plain, **{field: value}))]


def test_difference_excuses_no_other_data(plain: Observation) -> None:
    known = DIFFERENCES[0]
    assert known.kernel is not None
    assert known.userspace is not None
    scenario = dataclasses.replace(SCENARIO, faults=known.faults)
    kernel = dataclasses.replace(plain, end=min(known.kernel), data=b"\0\1")
    ours = dataclasses.replace(plain, end=max(known.userspace), data=b"\0\1\2")
    assert compare(scenario, kernel, ours) == (known.name, "")
    ours = dataclasses.replace(ours, data=b"\0\2")
    assert compare(scenario, kernel, ours)[1].startswith("different data")
    tls12 = next(suite for suite in CipherSuite if suite.version is ProtocolVersion.TLSv1_2)
    only13 = next(known for known in DIFFERENCES if known.version == "TLSv1_3")
    assert not only13.covers(dataclasses.replace(scenario, suite=tls12), kernel, ours)
