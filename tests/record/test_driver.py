"""The driver's order: commands are never lost, repeated or moved, in whatever thread; what it owes, and odd ways in."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.errors import LocalProtocolError, RemoteProtocolError
from ktls.protocol.states import HalfState
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.interface import ControlRecord
from ktls.testing import eventually, is_key_update, pattern

from .rig import (
    ALERT,
    DATA,
    HANDSHAKE,
    TICKET,
    Layer,
    Rig,
    Worker,
    again,
    anywhere,
    both,
    fill,
    next_is_data,
    next_is_key_update,
    next_message,
    pipe,
    rig,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO


def sending_now(r: Rig) -> bool:
    """Whether a thread is inside of the sending half."""
    lock = r.driver.sending._lock
    assert isinstance(lock, type(threading.Lock()))
    return lock.locked()


# --- what is owed ----------------------------------------------------------------------------------------------------


@both
def test_owed_answer_goes_out_before_the_next_data(layer: Layer) -> None:
    with rig(layer) as r:
        r.sender.refuse("send_record", again(), 1)
        r.peer.send_raw(r.peer.seal_key_update(True) + r.peer.seal_data(b"new"))
        assert r.read(3) == b"new"
        assert r.driver.send(b"data") == 4
        next_is_key_update(r)
        next_is_data(r, b"data")


@both
def test_requests_do_not_pile_up_while_an_answer_is_owed(layer: Layer) -> None:
    with rig(layer) as r:
        r.sender.refuse("send_record", again(), 20)
        for _ in range(20):
            r.peer.send_key_update(True)
        r.peer.send_data(b"new")
        assert r.read(3) == b"new"
        r.driver.run_owed()
        assert r.driver.send(b"data") == 4
        next_is_key_update(r)
        next_is_data(r, b"data")
        assert r.peer.rx_generation == 1


@both
def test_reader_never_waits_for_a_blocked_sender(layer: Layer) -> None:
    with rig(layer, small=True) as r:
        total = fill(r)
        size = 10 * MAX_FRAGMENT  # more than the buffers take

        def send() -> None:
            data = memoryview(pattern(size))
            while data:
                data = data[r.driver.send(data) :]

        sender = Worker(send)
        # It blocks: the way to the peer is full.
        eventually(lambda: sending_now(r), "the sender did not begin")
        r.peer.send_raw(
            r.peer.seal_data(b"one") + r.peer.seal_key_update(True) + r.peer.seal_data(b"two")
        )
        assert r.read(6) == b"onetwo"
        assert sender.is_alive()
        assert r.driver.owes
        assert r.peer.read_data(total + size) == bytes(total) + pattern(size)
        sender.result()
        # It ran what was owed, unless its own last bytes had filled TCP's buffer: then that is left to whoever comes next.
        r.driver.run_owed()
        assert not r.driver.owes
        r.driver.send(b"x")
        assert r.peer.read_data(1) == b"x"
        assert r.peer.rx_generation == 1


@both
def test_refresh_while_another_thread_sends(layer: Layer) -> None:
    """The rest of a blocked send must not go out under the new key."""
    with rig(layer, small=True) as r:
        size = 2**20

        def send() -> None:
            data = memoryview(pattern(size))
            while data:
                data = data[r.driver.send(data) :]

        sender = Worker(send)
        eventually(lambda: sending_now(r), "the sender did not begin")

        def refresh() -> None:
            for _ in range(5):
                r.driver.refresh_traffic_keys()

        refresher = Worker(refresh)
        reader = Worker(lambda: r.peer.read_data(size))
        assert reader.result() == pattern(size)
        sender.result()
        refresher.result()
        r.driver.send(b"x")
        # Changes that came behind the data.
        while (message := next_message(r)).content_type != DATA:
            assert is_key_update(message)
        assert r.peer.rx_generation == 5


@pytest.mark.parametrize("call", ["flush", "sendfile", "send"])
def test_holder_of_the_lock_runs_what_was_owed_meanwhile(call: str, file: IO[bytes]) -> None:
    """A reader finds the lock taken and goes on; whoever holds it must not leave the answer lying, also when its own call fails."""
    with rig() as r:
        inside, go_on = threading.Event(), threading.Event()

        def stop() -> None:
            inside.set()
            assert go_on.wait(20)
            if call != "flush":
                raise OSError(errno.EINVAL, "no such thing")

        r.sender.before(call, stop)
        works: dict[str, Callable[[], object]] = {
            "flush": r.driver.flush,
            "sendfile": lambda: r.driver.sendfile(file.fileno(), 0, 10),
            "send": lambda: r.driver.send(b"x"),
        }
        holder = Worker(works[call])
        assert inside.wait(20)
        r.peer.send_raw(r.peer.seal_key_update(True) + r.peer.seal_data(b"new"))
        assert r.read(3) == b"new"
        assert r.driver.owes
        go_on.set()
        if call == "flush":
            holder.result()
        else:
            with pytest.raises(OSError, match="no such thing"):
                holder.result()
        assert not r.driver.owes
        next_is_key_update(r)


# --- many changes ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.slow
def test_thousand_key_updates_from_the_peer(layer: Layer) -> None:
    with rig(layer) as r:
        for number in range(1000):
            r.peer.send_raw(r.peer.seal_key_update() + r.peer.seal_data(b"%04d" % number))
            if number % 50 == 49:
                expected = b"".join(b"%04d" % n for n in range(number - 49, number + 1))
                assert r.read(200) == expected
        assert r.connection.rx_generation == 1000
        assert r.driver.key_usage().rx.records == 1


@both
@pytest.mark.slow
def test_thousand_key_updates_from_us(layer: Layer) -> None:
    with rig(layer) as r:
        for number in range(1000):
            r.driver.refresh_traffic_keys()
            r.driver.send(b"%04d" % number)
            if number % 50 == 49:
                expected = b"".join(b"%04d" % n for n in range(number - 49, number + 1))
                assert r.peer.read_data(200) == expected
        assert r.peer.rx_generation == 1000
        assert r.driver.key_usage().tx.records == 1


@both
@pytest.mark.slow
def test_thousand_crossing_key_updates(layer: Layer) -> None:
    """Each of ours meets one of the peer's that asks for an answer."""
    with rig(layer) as r:
        ours, theirs = bytearray(), bytearray()
        for number in range(500):
            r.peer.send_raw(r.peer.seal_key_update(True) + r.peer.seal_data(b"%04d" % number))
            r.driver.refresh_traffic_keys(request_peer=True)
            r.driver.send(b"%04d" % number)
            theirs += r.read(4)
            ours += r.peer.read_data(4)
        expected = b"".join(b"%04d" % n for n in range(500))
        assert bytes(ours) == bytes(theirs) == expected
        r.driver.send(b"end")
        assert r.peer.read_data(3) == b"end"
        assert r.peer.rx_generation == r.connection.tx_generation == 1000
        assert r.connection.rx_generation == 500


# --- odd ways in -----------------------------------------------------------------------------------------------------


@anywhere
def test_data_met_by_the_slow_path_is_delivered_first(layer: Layer) -> None:
    with rig(layer, faulty_receiver=True) as r:
        assert r.receiver is not None
        r.receiver.refuse("recv_into", ControlRecord())
        r.peer.send_data(b"early")
        assert r.read(2) == b"ea"
        assert r.driver.pending() == 3
        r.peer.send_data(b"later")
        assert r.read(8) == b"rlylater"
        assert r.driver.pending() == 0


@anywhere
def test_tickets_are_given_away(layer: Layer) -> None:
    ticket = bytes.fromhex("04 00000e 00001c20 01020304 00 0001 78 0000")
    with rig(layer) as r:
        r.peer.send_raw(
            r.peer.seal(HANDSHAKE, ticket[:7])
            + r.peer.seal(HANDSHAKE, ticket[7:] + ticket)
            + r.peer.seal_data(b"data")
        )
        assert r.read(4) == b"data"
        assert r.tickets == [ticket, ticket]


@anywhere
def test_data_inside_a_handshake_message_is_refused(layer: Layer) -> None:
    with rig(layer) as r:
        r.peer.send_raw(r.peer.seal(HANDSHAKE, b"\x04\x00") + r.peer.seal_data(b"data"))
        with pytest.raises(RemoteProtocolError):
            r.read(4)


@pytest.mark.kernel
def test_splice() -> None:
    with rig("kernel") as r, pipe() as (reads, writes):
        r.peer.send_raw(
            r.peer.seal_data(b"one")
            + r.peer.seal(HANDSHAKE, TICKET)
            + r.peer.seal(DATA, b"")
            + r.peer.seal_data(b"two")
            + r.peer.seal(ALERT, b"\x01\x00")
        )
        moved = bytearray()
        while count := r.driver.splice(writes, 100):
            moved += os.read(reads, count)
        assert bytes(moved) == b"onetwo"
        assert len(r.tickets) == 1
        assert r.driver.splice(writes, 100) == 0


@pytest.mark.kernel
@pytest.mark.rekey
def test_splice_follows_key_updates() -> None:
    with rig("kernel") as r, pipe() as (reads, writes):
        for number in range(20):
            r.peer.send_raw(r.peer.seal_key_update(True) + r.peer.seal_data(b"%02d" % number))
        for number in range(20):
            assert r.driver.splice(writes, 100) == 2
            assert os.read(reads, 100) == b"%02d" % number
        assert r.peer.read_data(0) == b""
        next_is_key_update(r)


def test_only_the_kernel_splices() -> None:
    with rig() as r, pytest.raises(LocalProtocolError):
        r.driver.splice(1, 1)


@anywhere
def test_no_data_is_no_call(layer: Layer) -> None:
    with rig(layer) as r:
        assert r.driver.send(b"") == 0
        assert r.sender.calls == []
        assert (r.driver.tx_layer, r.driver.rx_layer) == (layer, layer)
        assert r.connection.tx_state is HalfState.OPEN
