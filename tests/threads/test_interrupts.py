"""A signal handler that raises, at every place where one can run: the connection goes on, or has clearly failed.

Never is a KeyUpdate sent twice, a record lost or repeated, or a lock held for ever.
"""

from __future__ import annotations

import collections
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import pytest

from ktls.protocol.enums import AlertDescription, ContentType, Direction
from ktls.protocol.messages import build_alert
from ktls.record.interface import Lock
from ktls.testing.peers import is_key_update, pattern, wait_readable

from ..record.rig import Layer, Rig, rig
from .interrupts import Interrupted, interrupted_at

if TYPE_CHECKING:
    from pathlib import Path

LAYERS: Final = [
    pytest.param("userspace", "userspace", id="userspace"),
    pytest.param("kernel", "userspace", id="kernel-tx", marks=pytest.mark.rekey),
    pytest.param("kernel", "kernel", id="kernel", marks=pytest.mark.rekey),
]
CLOSE_NOTIFY: Final = build_alert(AlertDescription.CLOSE_NOTIFY)
#: The most places that an operation may have: a bound for the loop.
_PLACES: Final = 1000

Operation = Callable[[Rig, "Path"], Callable[[], object]]


def send(r: Rig, _: Path) -> Callable[[], object]:
    return lambda: r.driver.send(pattern(20_000))


def send_vector(r: Rig, _: Path) -> Callable[[], object]:
    return lambda: r.driver.send_vector([pattern(100), pattern(20_000)])


def sendfile(r: Rig, directory: Path) -> Callable[[], object]:
    path = directory / "file"
    path.write_bytes(pattern(20_000))

    def work() -> None:
        with path.open("rb") as file:
            r.driver.sendfile(file.fileno(), 0, 20_000)

    return work


def refresh(r: Rig, _: Path) -> Callable[[], object]:
    return r.driver.refresh_traffic_keys


def ask(r: Rig, _: Path) -> Callable[[], object]:
    return lambda: r.driver.refresh_traffic_keys(request_peer=True)


def receive(r: Rig, _: Path) -> Callable[[], object]:
    r.peer.send_raw(r.peer.seal_key_update(True) + r.peer.seal_data(b"hello"))
    return lambda: r.driver.recv_into(bytearray(5))


def settle(r: Rig, _: Path) -> Callable[[], object]:
    r.peer.send_raw(r.peer.seal_key_update(True))
    assert wait_readable(r.sock)
    return lambda: r.driver.settle(read_ahead=True)


def close(r: Rig, _: Path) -> Callable[[], object]:
    return r.driver.close_notify


SENDING: Final[list[Operation]] = [send, send_vector, sendfile, refresh, ask, close]
RECEIVING: Final[list[Operation]] = [receive, settle]


def locks(r: Rig) -> list[Lock]:
    sending, receiving = r.driver.sending, r.driver.receiving
    return [receiving._lock, sending._lock, sending._state_lock]


def go_on(r: Rig, closes: bool) -> bool:
    """Use the connection to its end; return whether it could be."""
    try:
        if not closes:
            r.driver.send(b"after")
            r.driver.refresh_traffic_keys()
            r.driver.send(b"the end")
        r.driver.close_notify()
    except ConnectionAbortedError:
        with pytest.raises(ConnectionAbortedError):
            r.driver.send(b"never")
        return False
    finally:
        r.sock.shutdown(socket.SHUT_WR)
    return True


def check(r: Rig, hit: str, closes: bool) -> str:
    """Look at both ends after an interruption; return what became of it."""
    for lock in locks(r):
        assert lock.acquire(blocking=False), f"{hit}: a lock is held"
        lock.release()
    went_on = go_on(r, closes)
    messages, whole = r.peer.read_all()  # raises if any record can't be opened, or came twice
    assert whole, hit
    records = [(message.content_type, message.fragment) for message in messages]
    assert ((ContentType.ALERT, CLOSE_NOTIFY) in records) is went_on, hit
    if not went_on:
        return "failed"
    data = b"".join(text for kind, text in records if kind == ContentType.APPLICATION_DATA)
    sent = data.removesuffix(b"afterthe end") if not closes else data
    assert sent in (b"", pattern(20_000), pattern(100) + pattern(20_000)), hit
    updates = sum(map(is_key_update, messages))
    assert updates == r.connection.installed_generation(Direction.TX), hit
    assert records.count((ContentType.ALERT, CLOSE_NOTIFY)) == 1, hit
    return f"went on, {updates} KeyUpdates, {len(sent)} bytes"


def sweep(
    operation: Operation,
    tx: Layer,
    rx: Layer,
    directory: Path,
    error: type[BaseException] = Interrupted,
) -> collections.Counter[str]:
    """Interrupt ``operation`` at each of its places, each time on a new connection."""
    outcomes: collections.Counter[str] = collections.Counter()
    for place in range(_PLACES):
        with rig(tx, rx) as r:
            hit = interrupted_at(place, operation(r, directory), error)
            if hit is None:
                return outcomes
            outcomes[check(r, hit, operation is close)] += 1
    raise AssertionError("there is no end of places")


@pytest.mark.parametrize(("tx", "rx"), LAYERS)
@pytest.mark.parametrize("operation", SENDING)
def test_while_sending(operation: Operation, tx: Layer, rx: Layer, tmp_path: Path) -> None:
    outcomes = sweep(operation, tx, rx, tmp_path)
    changes = operation in (refresh, ask)
    assert any("went on" in outcome for outcome in outcomes)
    if changes:
        # Before it began, amid the secrets, and after they had moved on.
        assert set(outcomes) == {
            "went on, 1 KeyUpdates, 0 bytes",
            "went on, 2 KeyUpdates, 0 bytes",
            "failed",
        }
    elif operation is not close:
        assert {outcome.rpartition(", ")[2] for outcome in outcomes} > {"0 bytes"}


@pytest.mark.parametrize(("tx", "rx"), LAYERS)
@pytest.mark.parametrize("operation", RECEIVING)
def test_while_receiving(operation: Operation, tx: Layer, rx: Layer, tmp_path: Path) -> None:
    outcomes = sweep(operation, tx, rx, tmp_path)
    # The answer to the peer's KeyUpdate was sent, or was not due yet.
    assert set(outcomes) == {
        "went on, 1 KeyUpdates, 0 bytes",
        "went on, 2 KeyUpdates, 0 bytes",
        "failed",
    }


@pytest.mark.parametrize(("tx", "rx"), LAYERS)
@pytest.mark.parametrize("operation", [send, ask, receive, settle, close])
def test_alarm_is_no_error_of_the_network(
    operation: Operation, tx: Layer, rx: Layer, tmp_path: Path
) -> None:
    """``TimeoutError()`` is an ``OSError``, and yet no system call's: it gets through, and the connection is none the worse for it."""
    assert any("went on" in outcome for outcome in sweep(operation, tx, rx, tmp_path, TimeoutError))


@pytest.mark.parametrize(("tx", "rx"), LAYERS)
def test_what_was_not_read_yet_is_there_afterwards(tx: Layer, rx: Layer) -> None:
    """Up to the record that was next: what a read has taken when it is interrupted is lost, as on every socket of Python."""
    failed = 0
    for place in range(_PLACES):
        with rig(tx, rx) as r:
            r.peer.send_raw(
                r.peer.seal_data(b"first") + r.peer.seal_key_update() + r.peer.seal_data(b"second")
            )
            hit = interrupted_at(place, lambda r=r: r.driver.recv_into(bytearray(5)))  # type: ignore[misc]  # mypy does not infer a lambda with a default
            if hit is None:
                break
            got = bytearray()
            buffer = bytearray(5)
            try:
                while not got.endswith(b"second"):
                    got += buffer[: r.driver.recv_into(buffer)]
            except ConnectionAbortedError:
                failed += 1
                with pytest.raises(ConnectionAbortedError):
                    r.driver.recv_into(buffer)
            else:
                assert bytes(got) in (b"firstsecond", b"second"), hit
    else:
        raise AssertionError("there is no end of places")
    assert place > failed


@pytest.mark.parametrize(("tx", "rx"), LAYERS)
def test_interrupted_again_and_again(tx: Layer, rx: Layer) -> None:
    """The same key change is taken up until it is through, whatever comes in between; it goes out once."""
    with rig(tx, rx) as r:
        r.driver.refresh_traffic_keys()
        for place in range(4, 40):
            sending = r.driver.sending
            with sending._state_lock:
                sending.follow(lambda: r.connection.refresh_traffic_keys(now=0.0))
            interrupted_at(place, r.driver.run_owed)
            interrupted_at(place // 2, r.driver.run_owed)
            r.driver.run_owed()
        r.driver.send(b"the end")
        assert r.peer.read_data(7) == b"the end"
        assert r.peer.rx_generation == 37
        assert r.connection.installed_generation(Direction.TX) == 37
