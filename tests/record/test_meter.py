"""The meter: it looks seldom, and never too late."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ktls.protocol.limits import KeyLimits
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.meter import MAX_PIECE, Meter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_looks_at_once() -> None:
    assert Meter(KeyLimits(), Clock()).due()


@given(limit=st.integers(1, 2**20), pieces=st.lists(st.integers(1, 2**22), max_size=200))
def test_limit_is_never_passed(limit: int, pieces: list[int]) -> None:
    meter = Meter(KeyLimits(), Clock())
    used = 0
    for piece in pieces:
        if meter.due():
            if used >= limit:
                return
            meter.looked(used, limit)
        sent = min(piece, meter.allowance(MAX_FRAGMENT))
        assert sent > 0
        records = -(-sent // MAX_FRAGMENT)
        used += records
        meter.used(records, sent)
        assert used <= limit


def test_looks_are_few() -> None:
    meter = Meter(KeyLimits(), Clock())
    looks = used = 0
    limit = 2**23
    while used < limit:
        if meter.due():
            looks += 1
            meter.looked(used, limit)
        step = min(64, limit - used)
        used += step
        meter.used(step, 0)
    assert looks < 30


def test_no_limit_is_looked_at_once() -> None:
    meter = Meter(KeyLimits(), Clock())
    meter.looked(0, None)
    meter.used(2**40, 2**50)
    assert not meter.due()
    assert meter.allowance(MAX_FRAGMENT) == MAX_PIECE


def test_step_passes_between_two_looks() -> None:
    meter = Meter(KeyLimits(), Clock(), step=1000)
    meter.looked(99, 100)
    meter.used(999, 999)
    assert not meter.due()
    meter.used(1, 1)
    assert meter.due()


def test_octets() -> None:
    meter = Meter(KeyLimits(octets=1000), Clock())
    meter.looked(0, None)
    assert meter.allowance(MAX_FRAGMENT) == 1000
    meter.used(1, 990)
    assert not meter.due()
    assert meter.allowance(MAX_FRAGMENT) == 10
    meter.used(1, 10)
    assert meter.due()
    assert meter.octets == 1000
    meter.key_changed()
    assert meter.octets == 0


def test_age() -> None:
    clock = Clock()
    meter = Meter(KeyLimits(age=60), clock)
    meter.looked(0, None)
    clock.now = 59.9
    assert not meter.due()
    clock.now = 60.0
    assert meter.due()
    meter.key_changed()
    meter.looked(0, None)
    assert not meter.due()
    clock.now = 120.0
    assert meter.due()
