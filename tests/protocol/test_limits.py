"""Key limits and the flood budget by themselves; how a connection uses them is in ``test_connection_limits``."""

from __future__ import annotations

from typing import Any

import pytest

from ktls.protocol.limits import DirectionUsage, FloodBudget, KeyLimits, KeyUsage
from ktls.protocol.suites import AEAD

GCM_LIMIT = 23726566


@pytest.mark.parametrize("name", ["records", "octets", "age"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_that_would_refresh_for_ever_is_refused(name: str, value: int) -> None:
    limits: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"KeyLimits.{name} must be positive"):
        KeyLimits(**limits)


@pytest.mark.parametrize(
    ("records", "aead", "refresh_at", "end_at"),
    [
        (None, AEAD.AES_128_GCM, 2**23, GCM_LIMIT),
        (None, AEAD.AES_256_GCM, 2**23, GCM_LIMIT),
        (None, AEAD.AES_128_CCM, 2**22, 2**23),
        (None, AEAD.CHACHA20_POLY1305, None, None),
        (1, AEAD.AES_128_GCM, 1, 1),
        (1000, AEAD.CHACHA20_POLY1305, 1000, 1000),
        (2**40, AEAD.CHACHA20_POLY1305, 2**40, 2**40),
        (2**40, AEAD.AES_128_GCM, GCM_LIMIT, GCM_LIMIT),
        (2**40, AEAD.AES_128_CCM, 2**23, 2**23),
    ],
)
def test_record_limits(
    records: int | None, aead: AEAD, refresh_at: int | None, end_at: int | None
) -> None:
    limits = KeyLimits(records=records)
    assert limits.refresh_at(aead) == refresh_at
    assert limits.end_at(aead) == end_at


def test_usage_is_plain_data() -> None:
    usage = DirectionUsage(generation=1, records=2, limit=None)
    assert KeyUsage(tx=usage, rx=usage) == KeyUsage(tx=usage, rx=usage)
    assert repr(usage) == "DirectionUsage(generation=1, records=2, limit=None)"


def test_a_burst_of_the_whole_capacity_is_fine_and_then_no_more() -> None:
    budget = FloodBudget(0.0)
    assert [budget.spend(0.0) for _ in range(2049)] == [True] * 2048 + [False]


def spent(now: float = 0.0) -> FloodBudget:
    budget = FloodBudget(now)
    while budget.spend(now):
        pass
    return budget


def test_time_refills() -> None:
    budget = spent(100.0)
    assert [budget.spend(101.0) for _ in range(17)] == [True] * 16 + [False]


def test_time_that_does_not_pass_refills_nothing() -> None:
    budget = spent(100.0)
    assert not budget.spend(99.0)
    assert not budget.spend(100.0)


def test_a_clock_that_goes_back_and_forth_gives_nothing_away() -> None:
    budget = spent(100.0)
    for _ in range(10):
        assert not budget.spend(0.0)
        assert not budget.spend(100.0)


def test_application_data_refills() -> None:
    budget = spent()
    budget.earn(4095)
    assert not budget.spend(0.0)
    budget.earn(1)
    assert budget.spend(0.0)
    assert not budget.spend(0.0)


@pytest.mark.parametrize("way", ["time", "data"])
def test_the_budget_is_never_larger_than_its_capacity(way: str) -> None:
    budget = spent()
    now = 1e9 if way == "time" else 0.0
    if way == "data":
        budget.earn(2**50)
    assert [budget.spend(now) for _ in range(2049)] == [True] * 2048 + [False]
