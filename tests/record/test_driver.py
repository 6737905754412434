"""The driver's order: commands are never lost, repeated or moved, whatever the layers refuse, in whatever thread."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import AlertDescription, ContentType, Direction, KeyChangeCause
from ktls.protocol.errors import (
    AlertReceived,
    KeyLimitError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from ktls.protocol.limits import KeyLimits
from ktls.protocol.messages import build_alert
from ktls.protocol.states import HalfState, InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.interface import ControlRecord
from ktls.record.kernel import KernelReceiver
from ktls.testing import eventually, fill_up, is_key_update, pattern, turns

from .layers import TLS12, TLS13
from .rig import Layer, Rig, Worker, rig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from ktls.protocol.key_schedule import TrafficKeys
    from ktls.protocol.suites import CipherSuite

DATA, ALERT, HANDSHAKE = (
    ContentType.APPLICATION_DATA,
    ContentType.ALERT,
    ContentType.HANDSHAKE,
)
NO_WAIT = socket.MSG_DONTWAIT
CLOSE_NOTIFY = InboundPlainMessage(ALERT, b"\x01\x00")
#: Where both directions can change keys.
KINDS = [
    pytest.param("userspace", id="userspace"),
    pytest.param("kernel", id="kernel", marks=[pytest.mark.kernel, pytest.mark.rekey]),
]
both = pytest.mark.parametrize("layer", KINDS)
#: Where keys need not change.
ANY = [
    pytest.param("userspace", id="userspace"),
    pytest.param("kernel", id="kernel", marks=pytest.mark.kernel),
]
anywhere = pytest.mark.parametrize("layer", ANY)


def again() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, "no room")


def no_memory() -> OSError:
    return OSError(errno.ENOMEM, "no memory")


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(pattern(400 * MAX_FRAGMENT))
        file.flush()
        yield file


def next_message(r: Rig) -> InboundPlainMessage:
    message = r.peer.read_message()
    assert message is not None
    return message


def next_is_data(r: Rig, data: bytes) -> None:
    assert next_message(r) == InboundPlainMessage(DATA, data)


def next_is_key_update(r: Rig) -> None:
    message = next_message(r)
    assert is_key_update(message), message


def fill(r: Rig) -> int:
    """Fill the way to the peer; return the number of bytes."""
    return fill_up(lambda: r.driver.send(bytes(MAX_FRAGMENT), NO_WAIT), r.sock)


# --- every step of a key change can be refused --------------------------------------------------------------------


@both
@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("step", ["send_record", "install"])
@pytest.mark.parametrize("error", [again, no_memory])
def test_refused_step_of_a_refresh_is_taken_later(
    layer: Layer, step: str, error: Callable[[], OSError], times: int
) -> None:
    with rig(layer) as r:
        r.driver.send(b"before")
        r.sender.refuse(step, error(), times)
        with pytest.raises(OSError):
            r.driver.refresh_traffic_keys()
        sent = 0
        while not sent:
            with contextlib.suppress(type(error())):
                sent = r.driver.send(b"after")
        assert sent == 5
        next_is_data(r, b"before")
        next_is_key_update(r)
        next_is_data(r, b"after")
        assert r.sender.calls.count("send_record") == r.sender.calls.count("install") == 1
        assert r.connection.tx_generation == 1 == r.peer.rx_generation
        assert r.driver.key_usage().tx.records == 1


@both
def test_refresh_that_blocks_twice_is_two_changes(layer: Layer) -> None:
    with rig(layer) as r:
        r.sender.refuse("send_record", again(), 4)
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                r.driver.refresh_traffic_keys()
        assert r.driver.owes
        r.driver.run_owed()
        assert not r.driver.owes
        r.driver.send(b"after")
        next_is_key_update(r)
        next_is_key_update(r)
        next_is_data(r, b"after")


@both
def test_real_buffer_full(layer: Layer) -> None:
    """The same with a full buffer of TCP, and close_notify behind it."""
    with rig(layer, small=True) as r:
        total = changes = 0
        for _ in turns("the KeyUpdate blocks"):
            total += fill(r)
            changes += 1
            try:
                r.driver.refresh_traffic_keys(flags=NO_WAIT)
            except BlockingIOError:
                break
        reader = Worker(lambda: r.peer.read_data(total + 1))
        assert r.driver.send(b"x") == 1
        assert len(reader.result()) == total + 1
        r.driver.close_notify()
        assert next_message(r) == CLOSE_NOTIFY
        assert r.peer.rx_generation == changes == r.connection.tx_generation


@both
def test_refused_receiving_key_is_installed_before_anything_is_read(layer: Layer) -> None:
    with rig(layer, faulty_receiver=True) as r:
        assert r.receiver is not None
        r.peer.send_raw(
            r.peer.seal_data(b"old") + r.peer.seal_key_update(True) + r.peer.seal_data(b"new")
        )
        r.receiver.refuse("install", no_memory(), 3)
        assert r.read(3) == b"old"
        for _ in range(3):
            with pytest.raises(OSError, match="no memory"):
                r.look()
        # The answer did not have to wait for it.
        next_is_key_update(r)
        assert r.look() == b"new"
        assert r.receiver.calls.count("install") == 1


@pytest.mark.kernel
@pytest.mark.rekey
def test_settle_tries_a_refused_receiving_key_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the old key instead would make the kernel go on with it, and fail."""
    refused = [no_memory()]
    install = KernelReceiver.install

    def refuse(self: KernelReceiver, keys: TrafficKeys) -> None:
        if refused:
            raise refused.pop()
        install(self, keys)

    monkeypatch.setattr(KernelReceiver, "install", refuse)
    with rig("kernel") as r:
        r.peer.send_raw(r.peer.seal_key_update() + r.peer.seal_data(b"new"))
        with pytest.raises(OSError, match="no memory"):
            r.read(3)
        r.driver.settle()
        assert r.read(3) == b"new"
        assert not r.driver.receiver.record_waits()  # no error was met, and kept


@both
def test_receiving_key_that_is_refused_for_good(layer: Layer) -> None:
    with rig(layer, faulty_receiver=True) as r:
        assert r.receiver is not None
        r.receiver.refuse("install", OSError(errno.EBUSY, "no rekey"))
        r.peer.send_raw(r.peer.seal_data(b"old") + r.peer.seal_key_update())
        assert r.read(3) == b"old"
        for _ in range(3):
            with pytest.raises(KeyLimitError):
                r.read(1)
            with pytest.raises(KeyLimitError):
                r.driver.send(b"x")
        assert next_message(r) == CLOSE_NOTIFY


@both
def test_raising_callback_does_not_repeat_the_change(layer: Layer) -> None:
    errors = [RemoteProtocolError("bad ticket", AlertDescription.DECODE_ERROR)]

    def callback(direction: Direction, cause: KeyChangeCause) -> None:
        if errors:
            raise errors.pop()

    with rig(layer, on_key_change=callback) as r:
        with pytest.raises(RemoteProtocolError):
            r.driver.refresh_traffic_keys()
        r.driver.send(b"after")
        next_is_key_update(r)
        next_is_data(r, b"after")
        assert r.sender.calls.count("install") == 1


def sending_now(r: Rig) -> bool:
    """Whether a thread is inside of the sending half."""
    lock = r.driver.sending._lock
    assert isinstance(lock, type(threading.Lock()))
    return lock.locked()


# --- what is owed -------------------------------------------------------------------------------------------------


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


# --- many changes -------------------------------------------------------------------------------------------------


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


# --- keys that end ------------------------------------------------------------------------------------------------


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


# --- closing and failing ------------------------------------------------------------------------------------------


@anywhere
def test_tls12_close_is_answered_at_once(layer: Layer) -> None:
    with rig(layer, suite=TLS12) as r:
        r.peer.send_raw(r.peer.seal_data(b"last") + r.peer.seal(ALERT, b"\x01\x00"))
        assert r.read(4) == b"last"
        assert r.driver.recv_into(bytearray(9)) == 0
        assert r.driver.recv_into(bytearray(9)) == 0
        assert r.driver.peer_closed
        assert next_message(r) == CLOSE_NOTIFY
        with pytest.raises(LocalProtocolError):
            r.driver.send(b"x")


@anywhere
def test_tls13_close_is_of_one_direction(layer: Layer) -> None:
    with rig(layer) as r:
        r.peer.send_alert()
        assert r.driver.recv_into(bytearray(9)) == 0
        r.driver.send(b"more")
        next_is_data(r, b"more")
        for _ in range(3):
            r.driver.close_notify()
        assert next_message(r) == CLOSE_NOTIFY
        assert r.sender.calls.count("send_record") == 1
        with pytest.raises(LocalProtocolError):
            r.driver.send(b"x")


@anywhere
@pytest.mark.parametrize(
    ("record", "alert"),
    [
        ((HANDSHAKE, b"\x05\x00\x00\x00"), AlertDescription.UNEXPECTED_MESSAGE),
        ((HANDSHAKE, b"\x18\x00\x00\x01\x02"), AlertDescription.ILLEGAL_PARAMETER),
        ((HANDSHAKE, b"\x18\x00\x00\x01\x00\x04"), AlertDescription.UNEXPECTED_MESSAGE),
        ((HANDSHAKE, b"\x04\x00\x00\x01x"), AlertDescription.DECODE_ERROR),
        ((99, b"what?"), AlertDescription.UNEXPECTED_MESSAGE),
        ((ALERT, b"\x02"), AlertDescription.DECODE_ERROR),
    ],
)
def test_broken_rules_are_answered_with_an_alert(
    layer: Layer, record: tuple[int, bytes], alert: AlertDescription
) -> None:
    with rig(layer) as r:
        r.peer.send_raw(
            r.peer.seal_data(b"good") + r.peer.seal(*record) + r.peer.seal_data(b"never")
        )
        assert r.read(4) == b"good"
        for _ in range(3):
            with pytest.raises(RemoteProtocolError) as caught:
                r.read(1)
            assert caught.value.alert is alert
            with pytest.raises(RemoteProtocolError):
                r.driver.send(b"x")
        assert next_message(r) == InboundPlainMessage(ALERT, build_alert(alert))
        assert r.sender.calls.count("send_record") == 1


@anywhere
def test_bad_record_is_answered_with_an_alert(layer: Layer) -> None:
    with rig(layer) as r:
        good = r.peer.seal_data(b"good")
        bad = bytearray(r.peer.seal_data(b"evil"))
        bad[-1] ^= 1
        r.peer.send_raw(good + bytes(bad))
        assert r.read(4) == b"good"
        for _ in range(3):
            with pytest.raises(RemoteProtocolError) as caught:
                r.read(1)
            assert caught.value.alert is AlertDescription.BAD_RECORD_MAC
        expected = build_alert(AlertDescription.BAD_RECORD_MAC)
        assert next_message(r) == InboundPlainMessage(ALERT, expected)


@anywhere
def test_alert_that_blocks_goes_out_later(layer: Layer) -> None:
    with rig(layer) as r:
        r.sender.refuse("send_record", again(), 1)
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        r.driver.close_notify()
        alert = build_alert(AlertDescription.UNEXPECTED_MESSAGE)
        assert next_message(r) == InboundPlainMessage(ALERT, alert)
        r.peer.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            r.peer.read_record()


@anywhere
def test_sender_is_told_the_reason_at_any_moment(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of the failing: "the sending side is closed" would be a lie, and say that the connection goes on."""
    senders: list[Worker[int]] = []
    fail = KernelConnection.fail

    with rig(layer) as r:

        def fail_and_send(self: KernelConnection) -> None:
            fail(self)
            if not senders:
                senders.append(Worker(lambda: r.driver.send(b"x")))
                senders[0].join(0.2)

        monkeypatch.setattr(KernelConnection, "fail", fail_and_send)
        r.driver.send(b"first")
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        with pytest.raises(RemoteProtocolError):
            senders[0].result()


@both
def test_alert_stands_behind_an_owed_key_update(layer: Layer) -> None:
    """The queue keeps its order also when the connection fails."""
    with rig(layer) as r:
        r.sender.refuse("send_record", again(), 2)
        with pytest.raises(BlockingIOError):
            r.driver.refresh_traffic_keys()
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        r.driver.run_owed()
        next_is_key_update(r)
        alert = build_alert(AlertDescription.UNEXPECTED_MESSAGE)
        assert next_message(r) == InboundPlainMessage(ALERT, alert)


@anywhere
def test_no_alert_after_our_close_notify(layer: Layer) -> None:
    with rig(layer) as r:
        r.driver.close_notify()
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        assert next_message(r) == CLOSE_NOTIFY
        assert r.sender.calls.count("send_record") == 1


@anywhere
def test_received_alert_is_not_answered(layer: Layer) -> None:
    with rig(layer) as r:
        r.peer.send_alert(AlertDescription.INTERNAL_ERROR)
        for _ in range(2):
            with pytest.raises(AlertReceived) as caught:
                r.read(1)
            assert caught.value.description is AlertDescription.INTERNAL_ERROR
            with pytest.raises(AlertReceived):
                r.driver.send(b"x")
        assert "send_record" not in r.sender.calls


@anywhere
@pytest.mark.parametrize("cut", [0, 3, 30])
def test_truncated(layer: Layer, cut: int) -> None:
    with rig(layer) as r:
        r.peer.send_raw(r.peer.seal_data(b"data") + r.peer.seal_data(bytes(100))[:cut])
        r.peer.end()
        assert r.read(4) == b"data"
        for _ in range(3):
            with pytest.raises(TruncatedError):
                r.read(1)
        assert r.driver.send(b"more") == 4
        next_is_data(r, b"more")


@anywhere
def test_network_error_found_by_the_reader_ends_sending(layer: Layer) -> None:
    """Without this the kernel would take the records, and drop them."""
    with rig(layer, key_changes=True) as r:
        r.peer.reset()
        for _ in range(2):
            with pytest.raises(ConnectionError):
                r.read(1)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                r.driver.send(b"x")
            with pytest.raises(ConnectionError):
                r.driver.refresh_traffic_keys()
        with pytest.raises(ConnectionError):
            r.driver.close_notify()
        assert "send_record" not in r.sender.calls
        assert not r.driver.owes


@anywhere
def test_failed_send_leaves_nothing_owed(layer: Layer) -> None:
    """A waiting reader would spin on it."""
    with rig(layer, key_changes=True) as r:
        r.sender.refuse("send_record", BrokenPipeError(errno.EPIPE, "gone"))
        with pytest.raises(BrokenPipeError):
            r.driver.refresh_traffic_keys()
        assert not r.driver.owes
        with pytest.raises(BrokenPipeError):
            r.driver.send(b"x")


# --- metering -----------------------------------------------------------------------------------------------------


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


# --- odd ways in --------------------------------------------------------------------------------------------------


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
    reads, writes = os.pipe()
    try:
        with rig("kernel") as r:
            r.peer.send_raw(
                r.peer.seal_data(b"one")
                + r.peer.seal(
                    HANDSHAKE, bytes.fromhex("04 00000e 00001c20 01020304 00 0001 78 0000")
                )
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
    finally:
        os.close(reads)
        os.close(writes)


@pytest.mark.kernel
@pytest.mark.rekey
def test_splice_follows_key_updates() -> None:
    reads, writes = os.pipe()
    try:
        with rig("kernel") as r:
            for number in range(20):
                r.peer.send_raw(r.peer.seal_key_update(True) + r.peer.seal_data(b"%02d" % number))
            for number in range(20):
                assert r.driver.splice(writes, 100) == 2
                assert os.read(reads, 100) == b"%02d" % number
            assert r.peer.read_data(0) == b""
            next_is_key_update(r)
    finally:
        os.close(reads)
        os.close(writes)


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


# --- a key that is refused for good ----------------------------------------------------------------------------------


def test_refused_sending_key_ends_everything() -> None:
    """Our KeyUpdate is out, and the kernel does not take the key: under the old one not even close_notify may follow."""
    with rig() as r:
        r.sender.refuse("install", OSError(errno.EBUSY, "busy"))
        with pytest.raises(KeyLimitError, match="refused the new sending key"):
            r.driver.refresh_traffic_keys()
        for _ in range(2):
            with pytest.raises(KeyLimitError, match="refused the new sending key"):
                r.driver.send(b"x")
        r.driver.close_notify()
        assert not r.driver.owes
        next_is_key_update(r)
        r.sock.shutdown(socket.SHUT_WR)
        assert r.peer.read_record() is None  # nothing came after the KeyUpdate
