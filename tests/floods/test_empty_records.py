"""Data records without data in front of something else. Kernels drop them, and a plain ``recv`` then says 0 where it stops at a control record: as at the end of TCP."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ktls.testing import loopback_pair, wait_readable

from .attacks import TLS12, TLS13, Attacker
from .victims import driver_on, layers_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktls.protocol.suites import CipherSuite
    from ktls.record.driver import Driver

    from .victims import Layers

_COUNTS = (1, 2, 3)
every_layer = pytest.mark.parametrize("layers", layers_for(TLS13))
_NO_WAIT = 0x40  # MSG_DONTWAIT


@pytest.fixture(params=_COUNTS, ids="{} empty".format)
def count(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


def read_until_end(driver: Driver) -> bytes:
    data, buffer = bytearray(), bytearray(64)
    while taken := driver.recv_into(buffer):
        data += buffer[:taken]
    return bytes(data)


def several(attacker: Attacker, count: int) -> bytes:
    return b"".join(attacker.data(b"") for _ in range(count))


@every_layer
def test_a_key_update_behind_them_is_followed(layers: Layers, count: int) -> None:
    with loopback_pair() as (ours, theirs):
        driver, attacker = driver_on(ours, TLS13, layers), Attacker(TLS13)
        theirs.sendall(
            several(attacker, count)
            + attacker.key_update(False)
            + several(attacker, count)
            + attacker.data(b"under the next key")
            + several(attacker, count)
            + attacker.close_notify()
        )
        assert read_until_end(driver) == b"under the next key"
        assert driver.peer_closed


@pytest.mark.parametrize(
    ("suite", "layers"), [(suite, layer) for suite in (TLS13, TLS12) for layer in layers_for(suite)]
)
def test_close_notify_behind_them_is_an_orderly_end(
    suite: CipherSuite, layers: Layers, count: int
) -> None:
    with loopback_pair() as (ours, theirs):
        driver, attacker = driver_on(ours, suite, layers), Attacker(suite)
        theirs.sendall(several(attacker, count) + attacker.close_notify())
        assert read_until_end(driver) == b""
        assert driver.peer_closed


@every_layer
def test_whoever_polls_is_not_kept_from_a_key_update(layers: Layers, count: int) -> None:
    """The kernel that has seen a KeyUpdate is silent until it gets the key: a look must find it."""
    with loopback_pair() as (ours, theirs):
        driver, attacker = driver_on(ours, TLS13, layers), Attacker(TLS13)
        theirs.sendall(attacker.data(b"first") + several(attacker, count))
        theirs.sendall(attacker.key_update(False) + attacker.data(b"second"))
        buffer = bytearray(64)
        assert wait_readable(ours)
        assert driver.recv_into(buffer, 0, _NO_WAIT) == 5
        driver.settle(read_ahead=True)
        assert driver.connection.rx_generation == 1
        assert driver.pending() or wait_readable(ours)
        assert driver.recv_into(buffer, 0, _NO_WAIT) == 6


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.rekey
def test_splicing_goes_on_behind_them(pipe: tuple[int, int], count: int) -> None:
    with loopback_pair() as (ours, theirs):
        driver, attacker = driver_on(ours, TLS13, "kernel"), Attacker(TLS13)
        theirs.sendall(
            several(attacker, count) + attacker.key_update(False) + several(attacker, count)
        )
        theirs.sendall(attacker.data(b"spliced") + several(attacker, count))
        theirs.sendall(attacker.close_notify())
        assert driver.splice(pipe[1], 64) == 7
        assert os.read(pipe[0], 64) == b"spliced"
        assert driver.splice(pipe[1], 64) == 0
        assert driver.peer_closed
