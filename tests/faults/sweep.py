"""Runs a scenario once as it is, and then once for each call and each fault, and compares."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ktls.protocol.errors import (
    KeyLimitError,
    KTLSError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from ktls.record.interface import DEAD_ERRNOS
from ktls.testing import pattern

from .layers import Layers
from .outcomes import ERRNOS, GONE, NO_KEY, REFUSED, WHOLE, allowed, asks, caused_by
from .scenarios import Scenario
from .seam import Call, Error, Fault, Seam, Short, Stale
from .world import PIECE, Died, Seen, World, make_world

__all__ = ("Result", "faults_for", "run", "verify")

#: Calls that may do a part of their work, and how much of it.
_SHORT: Final = {
    name: (Short(1), Short(16384), Short(16385))
    for name in ("send", "sendmsg", "sendfile", "recv", "recv_into", "splice", "pread")
}


def faults_for(call: Call) -> list[Fault]:
    """Everything that may go wrong with ``call``."""
    faults: list[Fault] = [Error(number) for number in ERRNOS]
    faults += _SHORT.get(call.name, ())
    if call.name == "fstat":
        faults.append(Stale(7))
    return faults


@dataclass
class Result:
    """One run."""

    outcome: str
    seen: Seen
    got: bytes
    offered: int
    accepted: int
    from_peer: int
    calls: list[Call]
    hits: list[tuple[Call, Fault]]
    world: World


def run(scenario: Scenario, layers: Layers, plan: dict[int, Fault] | None = None) -> Result:
    """Run ``scenario`` with the faults of ``plan``; whatever the end, nothing of the connection is left."""
    seam = Seam()
    seam.plan = plan or {}
    with seam.opened(), make_world(layers, scenario.options, seam) as world:
        try:
            scenario.run(world)
            outcome = WHOLE
        except Died as died:
            outcome = _kind(died.error)
            seam.armed = False
            if not (seam.hits and asks(seam.hits[0][0])):
                _stays_dead(world, died)
            world.give_up()
    return Result(
        outcome,
        world.seen,
        bytes(world.got),
        world.offered,
        world.accepted,
        world.from_peer,
        seam.calls,
        seam.hits,
        world,
    )


def _kind(error: OSError) -> str:
    if isinstance(error, KeyLimitError):
        return NO_KEY
    if isinstance(error, RemoteProtocolError):
        return f"{REFUSED} {error.alert.name}"
    if isinstance(error, KTLSError):
        return type(error).__name__
    if isinstance(error, ssl.SSLError):
        return f"{REFUSED} by the engine"
    if error.errno in DEAD_ERRNOS:
        return GONE
    return f"stuck: {error!r}"


def _stays_dead(world: World, died: Died) -> None:
    """Whoever has failed once never pretends again."""
    driver = world._driver
    assert driver is not None
    first = died.error
    for _ in range(2):
        if died.reading:
            _same(first, _error_of(lambda: driver.recv_into(bytearray(1))))
        elif not isinstance(first, ssl.SSLError):
            _same(first, _error_of(lambda: driver.send(b"x")))
        error = _error_of(lambda: driver.send(pattern(1, world.offered)))
        if error is None:
            assert isinstance(first, TruncatedError), f"sends after {first!r}"
            world.accepted += 1
            world.offered += 1
        assert not isinstance(error, BlockingIOError), "waits for a dead connection"


def _error_of(call: Callable[[], object]) -> OSError | None:
    try:
        call()
    except OSError as error:
        return error
    return None


def _same(first: OSError, now: OSError | None) -> None:
    if isinstance(now, LocalProtocolError):
        return  # we had closed before
    assert now is not None, f"goes on after {first!r}"
    assert (type(now), now.errno) == (type(first), first.errno), f"{now!r} after {first!r}"


def verify(scenario: Scenario, clean: Result, spoilt: Result) -> None:
    """The invariants."""
    seen, whole = spoilt.seen, clean.seen
    call, fault = spoilt.hits[0]
    expected = allowed(call, fault, clean.outcome)
    assert (
        spoilt.outcome in expected or (clean.outcome[:7], spoilt.outcome[:7]) == (REFUSED,) * 2
    ), (spoilt.outcome, expected, spoilt.world.raised)
    # Nothing twice, nothing out of order, nothing from nowhere.
    assert bytes(seen.data) == pattern(len(seen.data)), "the peer has other data"
    assert spoilt.got == pattern(len(spoilt.got)), "the application has other data"
    # Of the piece whose sending has broken off a part may have gone.
    broken_off = spoilt.outcome == GONE or spoilt.outcome.startswith(REFUSED)
    assert len(seen.data) <= spoilt.accepted + (PIECE if broken_off else 0)
    same = spoilt.outcome == clean.outcome
    if same:
        # Nothing lost.
        assert len(seen.data) == spoilt.accepted, f"{len(seen.data)} of {spoilt.accepted} came"
        assert clean.outcome != WHOLE or spoilt.accepted == spoilt.offered
        dead = isinstance(fault, Error) and fault.number in DEAD_ERRNOS
        if clean.outcome == WHOLE or spoilt.outcome not in caused_by(call, fault):
            assert spoilt.got == clean.got
        if clean.outcome != WHOLE and dead:  # the last word may be missing, an alert
            assert whole.words[: len(seen.words)] == seen.words
        elif scenario.options.limits is None:
            assert _comparable(seen, scenario) == _comparable(whole, scenario)
        assert seen.end == whole.end
    else:
        _is_prefix(scenario, seen, whole, spoilt)
    if spoilt.outcome == WHOLE:
        assert (seen.words[-1], seen.end) == ("ALERT 0100", "fin")
    alerts = [word for word in seen.words if word.startswith("ALERT") and word[6:8] == "02"]
    assert len(alerts) <= 1, "more than one fatal alert"


def _comparable(seen: Seen, scenario: Scenario) -> object:
    # How much fits into full buffers is TCP's business.
    return (
        seen.words
        if scenario.options.small or scenario.loose or not scenario.whole
        else seen.control
    )


def _is_prefix(scenario: Scenario, seen: Seen, whole: Seen, spoilt: Result) -> None:
    """What came is the beginning of what would have come, but for the alert that says why."""
    words = list(seen.words)
    if words and words[-1].startswith("ALERT"):
        words.pop()
    if scenario.options.limits is None:
        assert words == whole.words[: len(words)], (words, whole.words)
