"""Closing without loss (rule 1 of kernel TLS), and the loss that it prevents."""

from __future__ import annotations

import contextlib
import functools
import socket
from typing import TYPE_CHECKING

import pytest

from ktls.closing import close_in_background, finish, try_finish
from ktls.testing import eventually, fill_up, pattern, turns

from .layers import TLS12, TLS13
from .rig import CLOSE_NOTIFY, Layer, Rig, Worker, anywhere, rig

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.protocol.suites import CipherSuite

TRIALS = 30
PATIENCE = 20.0


def fill(r: Rig) -> int:
    """Send until there is no room; return how much was accepted. What was accepted last is half with TCP, half above it."""
    return fill_up(lambda: r.driver.send(pattern(5000), socket.MSG_DONTWAIT), r.sock)


def half_fill(r: Rig) -> int:
    """Send until there is no room at this moment; return how much was accepted."""
    accepted = 0
    chunk = pattern(5000)
    with contextlib.suppress(BlockingIOError):
        while True:
            accepted += r.driver.send(chunk, socket.MSG_DONTWAIT)
    return accepted


def arrives_whole(r: Rig, accepted: int) -> None:
    """All data, close_notify, FIN; nothing cut."""
    messages, whole = r.peer.read_all()
    assert whole, "TCP ended inside a record"
    assert messages, "nothing came"
    assert messages[-1] == CLOSE_NOTIFY
    assert sum(len(message.fragment) for message in messages[:-1]) == accepted


def finished(r: Rig) -> None:
    finish(r.sock, r.driver, PATIENCE)


def finished_by_trying(r: Rig) -> None:
    r.sock.setblocking(False)
    for _ in turns("finished"):
        if try_finish(r.sock, r.driver):
            return


def finished_in_background(r: Rig) -> None:
    close_in_background(r.sock, r.driver, PATIENCE)


def finished_in_background_after_trying(r: Rig) -> None:
    """What a non-blocking ``close`` does."""
    r.sock.setblocking(False)
    if not try_finish(r.sock, r.driver):
        close_in_background(r.sock, r.driver, PATIENCE)


@anywhere
@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        finished,
        finished_by_trying,
        finished_in_background,
        finished_in_background_after_trying,
    ],
)
def test_nothing_is_lost(layer: Layer, end: Callable[[Rig], None]) -> None:
    for _ in range(TRIALS):
        with rig(layer, small=True) as r:
            accepted = half_fill(r)
            reader = Worker(functools.partial(arrives_whole, r, accepted))
            end(r)
            reader.result()


@anywhere
@pytest.mark.parametrize("suite", [TLS12, TLS13], ids=lambda suite: suite.name)
def test_close_notify_that_was_accepted_before_is_waited_for(
    layer: Layer, suite: CipherSuite
) -> None:
    """``finish`` may be called when close_notify was accepted already, and sits above TCP with the data in front of it."""
    with rig(layer, suite=suite, small=True) as r:
        accepted = fill(r)
        for _ in turns("close_notify accepted"):
            if try_finish(r.sock, r.driver) or not r.driver.owes:
                break
            accepted -= len(take(r))
        finisher = Worker(lambda: finish(r.sock, r.driver, PATIENCE))
        messages, whole = r.peer.read_all()
        finisher.result()
        assert whole, "TCP ended inside a record"
        assert messages[-1] == CLOSE_NOTIFY
        assert sum(len(message.fragment) for message in messages[:-1]) == accepted


def take(r: Rig) -> bytes:
    """Read one record at the other end."""
    message = r.peer.read_message()
    assert message is not None
    return message.fragment


@anywhere
def test_finish_gives_up_in_time(layer: Layer) -> None:
    with rig(layer, small=True) as r:
        fill(r)
        with pytest.raises(TimeoutError, match="did not take all data"):
            finish(r.sock, r.driver, 0.2)


@anywhere
def test_dead_connection_is_finished_at_once(layer: Layer) -> None:
    with rig(layer) as r:
        r.peer.reset()
        r.sock.setblocking(False)

        def over() -> bool:
            try:
                return try_finish(r.sock, r.driver)
            except ConnectionError:
                return True

        eventually(over, "it does not end")
