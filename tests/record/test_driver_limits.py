"""Records, octets and age of a key: counted as the peer counts them, and what the driver does at their ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ktls.protocol.errors import KeyLimitError, LocalProtocolError
from ktls.protocol.limits import KeyLimits
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.testing import is_key_update, pattern

from .layers import TLS12, TLS13
from .rig import (
    CLOSE_NOTIFY,
    DATA,
    Layer,
    Worker,
    again,
    anywhere,
    both,
    next_is_data,
    next_message,
    rig,
)

if TYPE_CHECKING:
    from typing import IO

    from ktls.protocol.suites import CipherSuite


# --- metering --------------------------------------------------------------------------------------------------------


@anywhere
def test_counts_are_those_of_the_peer(layer: Layer, file: IO[bytes]) -> None:
    with rig(layer) as r:
        total = 0
        for size in (1, MAX_FRAGMENT, MAX_FRAGMENT + 1, 40_000):
            assert r.driver.send(pattern(size)) == size
            assert r.driver.sendfile(file.fileno(), 0, size) == size
            total += 2 * size
            r.peer.read_data(2 * size)
            r.peer.send_data(pattern(size))
            assert r.read(size) == pattern(size)
        usage = r.driver.key_usage()
        assert usage.tx.records == r.peer.rx.sequence_number == 2 * (1 + 1 + 2 + 3)
        assert usage.rx.records == r.peer.tx.sequence_number == 1 + 1 + 2 + 3
        assert (usage.tx.generation, usage.rx.generation) == (0, 0)


@both
@pytest.mark.slow
def test_sendfile_refreshes_in_time(layer: Layer, file: IO[bytes]) -> None:
    with rig(layer, limits=KeyLimits(records=100)) as r:
        size = 400 * MAX_FRAGMENT

        def send() -> None:
            offset = 0
            while offset < size:
                offset += r.driver.sendfile(file.fileno(), offset, size - offset)

        sender = Worker(send)
        data = bytearray()
        counts = [0]
        while len(data) < size:
            message = next_message(r)
            counts[-1] += 1
            if is_key_update(message):
                counts.append(0)
            else:
                data += message.fragment
        sender.result()
        assert bytes(data) == pattern(size)
        assert r.peer.rx_generation >= 3
        # The KeyUpdate itself is the last record of its key.
        assert max(counts) <= 101, counts


@both
def test_octets_limit(layer: Layer) -> None:
    with rig(layer, limits=KeyLimits(octets=1000)) as r:
        for _ in range(30):
            r.driver.send(bytes(100))
        assert r.driver.send(bytes(5000)) == 1000
        r.peer.read_data(4000)
        assert r.peer.rx_generation == 3


@both
def test_age_limit(layer: Layer) -> None:
    now = [1000.0]
    with rig(layer, limits=KeyLimits(age=60), clock=lambda: now[0]) as r:
        for _ in range(10):
            r.driver.send(b"x")
            now[0] += 20
        r.peer.read_data(10)
        assert r.peer.rx_generation == 3


@both
@pytest.mark.parametrize("limits", [KeyLimits(records=50), KeyLimits(octets=500)])
def test_receiving_limit_asks_the_peer_once(layer: Layer, limits: KeyLimits) -> None:
    with rig(layer, limits=limits) as r:
        for _ in range(40):
            r.peer.send_data(pattern(30_000))
            assert r.read(30_000) == pattern(30_000)
        message = next_message(r)
        assert message.fragment == b"\x18\x00\x00\x01\x01"
        r.driver.send(b"end")
        next_is_data(r, b"end")
        assert r.driver.key_usage().rx.records == r.peer.tx.sequence_number
        # The peer follows; when the new key is used up it is asked again.
        r.peer.send_key_update()
        for _ in range(40):
            r.peer.send_data(pattern(30_000))
            assert r.read(30_000) == pattern(30_000)
        assert next_message(r).fragment == b"\x18\x00\x00\x01\x01"


# --- keys that end ---------------------------------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("suite", [TLS12, TLS13], ids=lambda suite: suite.name)
def test_exhausted_key_closes_cleanly(layer: Layer, suite: CipherSuite) -> None:
    with rig(layer, suite=suite, limits=KeyLimits(records=5), key_changes=False) as r:
        for _ in range(5):
            assert r.driver.send(b"x") == 1
        for _ in range(3):
            with pytest.raises(KeyLimitError):
                r.driver.send(b"y")
        assert [next_message(r) for _ in range(6)] == [
            *[InboundPlainMessage(DATA, b"x")] * 5,
            CLOSE_NOTIFY,
        ]
        # What the peer still sends can be read.
        r.peer.send_data(b"more")
        assert r.read(4) == b"more"
        with pytest.raises(LocalProtocolError):
            r.driver.refresh_traffic_keys()


@anywhere
def test_exhausted_key_when_close_notify_blocks(layer: Layer) -> None:
    with rig(layer, limits=KeyLimits(records=1), key_changes=False) as r:
        r.driver.send(b"x")
        r.sender.refuse("send_record", again())
        with pytest.raises(BlockingIOError):
            r.driver.send(b"y")
        with pytest.raises(KeyLimitError):
            r.driver.send(b"y")
        next_is_data(r, b"x")
        assert next_message(r) == CLOSE_NOTIFY


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param("userspace", id="userspace"),
        pytest.param("kernel", id="kernel", marks=[pytest.mark.kernel, pytest.mark.norekey]),
    ],
)
def test_demanded_key_update_where_the_key_cannot_change(layer: Layer) -> None:
    """The lab's kernel without rekey sends, user space receives."""
    with rig(layer, "userspace", key_changes=False) as r:
        r.peer.send_raw(r.peer.seal_key_update(True) + r.peer.seal_data(b"new"))
        assert r.read(3) == b"new"
        for _ in range(2):
            with pytest.raises(KeyLimitError):
                r.driver.send(b"x")
        assert next_message(r) == CLOSE_NOTIFY
        r.peer.send_data(b"more")
        assert r.read(4) == b"more"
