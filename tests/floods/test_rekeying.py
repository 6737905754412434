"""Honest peers that change their keys for weeks, quietly or under load: never cut off. Time is an argument, so weeks pass at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import ContentType, Direction, Role
from ktls.protocol.limits import FloodBudget, KeyLimits
from ktls.protocol.states import (
    ConnectionState,
    HalfState,
    InboundPlainMessage,
    SendMessage,
    UpdateRxKey,
    UpdateTxKey,
)
from ktls.testing import loopback_pair, made_up_secret

from .attacks import TLS13, Attacker, Ear
from .victims import driver_on, layers_for

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .victims import Layers

_KEY_UPDATE: Final = bytes.fromhex("1800000100")
_REQUEST: Final = bytes.fromhex("1800000101")
_HOUR: Final = 3600.0
_DAY: Final = 24 * _HOUR


def connection(role: Role = Role.SERVER, limits: KeyLimits | None = None) -> KernelConnection:
    names = ("client", "server") if role is Role.CLIENT else ("server", "client")
    tx, rx = (made_up_secret(TLS13, name) for name in names)
    return KernelConnection(role, TLS13, tx_secret=tx, rx_secret=rx, limits=limits)


def install(conn: KernelConnection, items: Iterable[ConnectionState]) -> list[bytes]:
    """Run the commands at once; return the handshake messages that were sent."""
    sent = []
    for item in items:
        match item:
            case UpdateTxKey():
                conn.tx_key_installed(item.generation)
            case UpdateRxKey():
                conn.rx_key_installed(item.generation)
            case SendMessage():
                sent.append(item.fragment)
    return sent


def hear(conn: KernelConnection, message: bytes, now: float) -> list[bytes]:
    record = InboundPlainMessage(ContentType.HANDSHAKE, message)
    return install(conn, conn.process_message(record, now=now))


@dataclass(frozen=True)
class Honest:
    """A peer: seconds between two of its KeyUpdates, bytes of data in between, how many. At 10 GB/s no time passes worth mentioning."""

    name: str
    seconds: float
    octets: int
    updates: int


#: The short form goes on for as long as shows that what is spent comes back: the budget bears 2048 at once.
_LONG: Final = bool(os.environ.get("KTLS_TRUST"))
_ENOUGH: Final = 20_000 if _LONG else 2500
HONEST: Final = (
    Honest("Java, each 2^37 bytes at 10 GB/s", 2**37 / 1e10, 2**37, _ENOUGH),
    Honest("each hour, hardly any data", _HOUR, 10, 24 * 365 if _LONG else _ENOUGH),
    Honest("each minute, no data at all", 60.0, 0, _ENOUGH),
    Honest("each 100 full records, in no time", 0.0, 100 * 2**14, _ENOUGH),
    Honest("each full record, in no time", 0.0, 2**14, _ENOUGH),
    Honest("sixteen times a second, no data at all", 1 / FloodBudget.PER_SECOND, 0, _ENOUGH),
)


@pytest.mark.parametrize("peer", HONEST, ids=lambda peer: peer.name)
@pytest.mark.parametrize("message", [_KEY_UPDATE, _REQUEST], ids=["told", "requested"])
def test_nobody_is_cut_off(peer: Honest, message: bytes) -> None:
    conn = connection()
    for number in range(1, peer.updates + 1):
        answers = hear(conn, message, now=peer.seconds * number)
        assert answers == ([_KEY_UPDATE] if message is _REQUEST else [])
        conn.received_data(peer.octets)
    assert conn.rx_generation == peer.updates
    assert conn.rx_state is conn.tx_state is HalfState.OPEN


@settings(deadline=None, max_examples=50 if _LONG else 15)
@given(
    st.lists(
        st.tuples(st.floats(0, 7 * 24 * _HOUR), st.integers(0, 2**40), st.booleans()),
        max_size=40,
    ),
    st.integers(1, 200),
)
def test_a_pace_that_refills_what_it_spends_is_never_cut_off(
    steps: list[tuple[float, int, bool]], burst: int
) -> None:
    """Bursts of up to 200 updates, each paid for by time or by data before or after it: in whatever order, for however long."""
    conn, now, updates = connection(), 0.0, 0
    for seconds, octets, requested in steps:
        missing = burst - seconds * FloodBudget.PER_SECOND
        for _ in range(burst):
            hear(conn, _REQUEST if requested else _KEY_UPDATE, now)
        updates += burst
        now += seconds
        conn.received_data(max(octets, int(max(0.0, missing) + 1) * FloodBudget.OCTETS_PER_TOKEN))
    assert conn.rx_generation == updates
    assert conn.rx_state is HalfState.OPEN


def test_both_sides_by_age_for_months() -> None:
    """Each changes its own key each hour, and asks the other when it finds that one's too old: no storm, and nobody is cut off."""
    limits = KeyLimits(age=_HOUR)
    ends = connection(Role.CLIENT, limits), connection(Role.SERVER, limits)
    now, end = 0.0, (365 if _LONG else 60) * _DAY
    while now < end:
        now += _HOUR / 4
        for conn, other in (ends, ends[::-1]):
            for direction in Direction:
                waiting = install(conn, conn.record_usage(direction, 1, octets=1, now=now))
                sender, receiver = conn, other
                while waiting:
                    answers = [hear(receiver, message, now) for message in waiting]
                    waiting = [message for answer in answers for message in answer]
                    sender, receiver = receiver, sender
    hours = int(end / _HOUR)
    for conn, other in (ends, ends[::-1]):
        assert conn.tx_generation == other.rx_generation
        assert conn.rx_state is conn.tx_state is HalfState.OPEN
        assert hours / 2 <= conn.tx_generation <= 2 * hours


@pytest.mark.parametrize("layers", layers_for(TLS13))
def test_weeks_of_updates_on_a_real_connection(layers: Layers) -> None:
    """With a clock of our own: an update each quarter of an hour without any data, then some data each way."""
    now = 0.0
    rounds = 2880 if _LONG else 2100
    with loopback_pair() as (ours, theirs):
        driver, attacker, ear = (
            driver_on(ours, TLS13, layers, clock=lambda: now),
            Attacker(TLS13),
            Ear(TLS13),
        )
        changes = driver.sender.can_change_key
        buffer = bytearray(16)
        for _ in range(rounds):
            now += _HOUR / 4
            theirs.sendall(attacker.key_update(changes))
            driver.settle(read_ahead=True)
        theirs.sendall(attacker.data(b"still here"))
        assert driver.recv_into(buffer) == 10
        assert driver.connection.rx_generation == rounds > FloodBudget.CAPACITY
        driver.send(b"here too")
        heard: list[tuple[int, bytes]] = []
        while (23, b"here too") not in heard:
            heard += ear.open(theirs.recv(65536))
        assert changes == any(kind == 22 for kind, _ in heard)
