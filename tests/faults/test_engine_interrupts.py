"""The driver whose records stay with the handshake engine: a signal handler raises at every place, and a reader that owes something finds the lock taken."""

from __future__ import annotations

import ssl
import tempfile
import threading
from typing import TYPE_CHECKING, Final, cast

import pytest

from ktls.record.engine import EngineDriver
from ktls.testing import pattern, turns

from ..threads.interrupts import interrupted_at
from .engines import Engines
from .layers import Options
from .seam import Seam
from .world import Died, World, make_world

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ..support import Authority

SIZE: Final = 20_000
#: The most places that an operation may have: a bound for the loop.
_PLACES: Final = 500
KEY_UPDATE: Final = "HANDSHAKE 1800000100"


@pytest.fixture(scope="module")
def engines(authority: Authority) -> Engines:
    return Engines(authority)


def driver_of(w: World) -> EngineDriver:
    return cast(EngineDriver, w.driver)


def send(w: World) -> Callable[[], object]:
    return lambda: w.driver.sending.send(pattern(SIZE))


def send_vector(w: World) -> Callable[[], object]:
    return lambda: w.driver.send_vector([pattern(100), pattern(SIZE - 100, 100)])


def sendfile(w: World) -> Callable[[], object]:
    def work() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(pattern(SIZE))
            file.flush()
            w.driver.sendfile(file.fileno(), 0, SIZE)

    return work


def flush(w: World) -> Callable[[], object]:
    _hold_back(w)
    return w.driver.flush


def run_owed(w: World) -> Callable[[], object]:
    _hold_back(w)
    return w.driver.run_owed


def answer(w: World) -> Callable[[], object]:
    """A read that makes the engine say something: its part of the data is read up to the end."""
    w.peer.send_key_update(request=True)
    w.peer.send_data(b"hello")
    buffer = bytearray(5)
    return lambda: w.retry(lambda: w.driver.recv_into(buffer), reading=True)


def _hold_back(w: World) -> None:
    """Have the engine seal what nobody has sent yet."""
    driver = driver_of(w)
    driver._engine.write(pattern(SIZE))
    assert driver.owes


OPERATIONS: Final = (send, send_vector, sendfile, flush, run_owed, answer)


def locks_are_free(w: World) -> bool:
    driver = driver_of(w)
    locks = (driver._rx_lock, driver._tx_lock, driver._engine_lock)
    taken = [lock.acquire(blocking=False) for lock in locks]
    for lock in locks:
        lock.release()
    return all(taken)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_sent_has_no_hole(
    engines: Engines, operation: Callable[[World], Callable[[], object]]
) -> None:
    """The data of the operation has gone wholly or not at all, and whatever follows is opened by the peer."""
    outcomes = set()
    for place in range(_PLACES):
        with make_world(engines.layers, Options(), Seam()) as w:
            w.set_up()
            hit = interrupted_at(place, operation(w))
            assert locks_are_free(w), hit
            w.retry(lambda w=w: w.driver.send(b"after"))  # type: ignore[misc]  # mypy does not infer a lambda with a default
            w.close()
            data = bytes(w.seen.data)
            assert data in (b"after", pattern(SIZE) + b"after"), hit
            assert w.seen.words[-1] == "ALERT 0100", hit
            outcomes.add((len(data) > SIZE, KEY_UPDATE in w.seen.words))
        if hit is None:
            break
    else:
        raise AssertionError("there is no end of places")
    assert place > 5
    if operation is answer:
        assert outcomes == {(False, False), (False, True)}
    elif operation in (flush, run_owed):
        assert outcomes == {(True, False)}
    else:
        assert outcomes == {(True, False), (False, False)}


def test_what_comes_has_no_hole(engines: Engines) -> None:
    """But for what a read has taken when it is interrupted: that is lost, as on every socket of Python."""
    begins = set()
    for place in range(_PLACES):
        with make_world(engines.layers, Options(), Seam()) as w:
            w.set_up()
            w.peer.send_data(pattern(SIZE))
            w.peer.send_alert()
            buffer = bytearray(SIZE)
            hit = interrupted_at(
                place,
                lambda w=w, buffer=buffer: w.retry(lambda: w.driver.recv_into(buffer)),  # type: ignore[misc]  # mypy does not infer a lambda with a default
            )
            assert locks_are_free(w), hit
            if hit is None:
                break
            got = bytearray()
            while count := w.retry(lambda w=w, buffer=buffer: w.driver.recv_into(buffer)):  # type: ignore[misc]  # mypy does not infer a lambda with a default
                got += buffer[:count]
            begin = SIZE - len(got)
            assert begin in (0, 16384), hit
            assert got == pattern(len(got), begin), hit
            begins.add(begin)
            w.close()
    else:
        raise AssertionError("there is no end of places")
    assert begins == {0, 16384}


def test_close_notify_is_said_once(engines: Engines) -> None:
    for place in range(_PLACES):
        with make_world(engines.layers, Options(), Seam()) as w:
            w.set_up()
            w.send(10)
            w.peer.send_data(pattern(100))
            w.receive(10)
            hit = interrupted_at(place, w.driver.close_notify)
            assert locks_are_free(w), hit
            w.close()
            assert w.seen.data == pattern(10), hit
            assert (w.seen.words, w.seen.end) == (["ALERT 0100"], "fin"), hit
        if hit is None:
            return
    raise AssertionError("there is no end of places")


class LateLock:
    """A lock, and something that happens right before it is released for the first time."""

    def __init__(self, before_release: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._before_release: list[Callable[[], object]] = [before_release]
        self.acquire = self._lock.acquire

    def release(self) -> None:
        while self._before_release:
            self._before_release.pop()()
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@pytest.mark.parametrize("operation", [send, send_vector, sendfile, flush, run_owed])
def test_a_reader_that_finds_the_lock_taken_is_answered_for(
    engines: Engines, operation: Callable[[World], Callable[[], object]]
) -> None:
    """At the last moment, when the sender has looked for the last time."""
    with make_world(engines.layers, Options(), Seam()) as w:
        w.set_up()
        driver = driver_of(w)
        errors: list[OSError] = []

        def read() -> None:
            w.peer.send_raw(b"\x17\x03\x03\x00\x20" + bytes(32))  # forged: an alert is due
            try:
                w.retry(lambda: w.driver.recv_into(bytearray(5)), reading=True, idle=True)
            except Died as died:
                errors.append(died.error)

        def read_in_another_thread() -> None:
            reader = threading.Thread(target=read)
            reader.start()
            reader.join()
            assert driver.owes  # the reader had to leave it

        work = operation(w)
        driver._tx_lock = cast(threading.Lock, LateLock(read_in_another_thread))
        work()
        assert isinstance(errors[0], ssl.SSLError)
        assert not driver.owes
        for _ in turns("the alert comes"):
            w.pump()
            if w.seen.words:
                break
        assert w.seen.words == ["ALERT 0214"]
        assert w.seen.data == pattern(SIZE)
