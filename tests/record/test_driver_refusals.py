"""Every step of a key change can be refused by the record layers, for now or for good, and is then taken later, once."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.enums import AlertDescription, Direction, KeyChangeCause
from ktls.protocol.errors import KeyLimitError, RemoteProtocolError
from ktls.record.kernel import KernelReceiver
from ktls.testing import turns

from .rig import (
    CLOSE_NOTIFY,
    NO_WAIT,
    Layer,
    Worker,
    again,
    both,
    fill,
    next_is_data,
    next_is_key_update,
    next_message,
    rig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.protocol.key_schedule import TrafficKeys


def no_memory() -> OSError:
    return OSError(errno.ENOMEM, "no memory")


# --- every step of a key change can be refused -----------------------------------------------------------------------


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
