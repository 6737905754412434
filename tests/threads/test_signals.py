"""Signals at a high rate, by a handler that returns, and by one that raises, into every call of a connection."""

from __future__ import annotations

import gc
import random
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls

from ..sockets.helpers import Case, Net
from ..support import HOST, has_kernel_tls
from .crew import FRAME, PATIENCE, Crew, frame
from .interrupts import Interrupted
from .test_threads import LONG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CASES: Final = [
    Case(peer="ktls"),
    *([Case(peer="ktls", offload="userspace")] if has_kernel_tls() else []),
]
SIZE: Final = 8 << 20 if LONG else 1 << 20
ROUNDS: Final = 2000 if LONG else 200
#: Seconds between two signals, at most.
PERIOD: Final = 0.0003


class Pest:
    """Sends SIGUSR1 to the main thread until it is stopped. ``armed``: the handler raises, once, and disarms."""

    def __init__(self) -> None:
        self.signals = 0
        self.armed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pest")

    def _run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        chance = random.Random(1)
        while not self._stop.wait(chance.random() * PERIOD):
            signal.pthread_kill(main, signal.SIGUSR1)

    def _handle(self, *_: object) -> None:
        self.signals += 1
        if self.armed:
            self.armed = False
            raise Interrupted

    @contextmanager
    def at_work(self) -> Iterator[Pest]:
        """Be a pest inside of the block."""
        before = signal.signal(signal.SIGUSR1, self._handle)
        # What an earlier test has left is not to be finalized here: an exception in a finalizer goes nowhere.
        gc.collect()
        gc.disable()
        self._thread.start()
        try:
            yield self
        finally:
            self.armed = False
            self._stop.set()
            self._thread.join()
            gc.enable()
            signal.signal(signal.SIGUSR1, before)

    def bother(self, call: Callable[[], object]) -> bool:
        """Run ``call`` and let the handler raise into it; return whether it got through."""
        try:
            self.armed = True
            call()
        except Interrupted:
            return False
        finally:
            self.armed = False
        return True


def serve(sock: socket.socket, context: Any, data: bytes) -> int:
    """Shake hands, take as much as there is in ``data``, change keys, send it back, and wait for the end; return our generation."""
    with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
        received = bytearray()
        while len(received) < 2 * len(data):
            received += tls.recv(65536)
        assert bytes(received) == data + data
        for turn in range(2):
            tls.sendall(data)
            if context.offload == "userspace" or tls.offload.rx == "kernel":
                tls.refresh_traffic_keys(request_peer=turn == 0)
        assert tls.recv(1) == b""
        return int(tls.key_usage.rx.generation)


@pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "timeout"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_handlers_that_return_are_invisible(
    net: Net, case: Case, timeout: float | None, tmp_path: Path
) -> None:
    """PEP 475, for the handshake, ``sendall``, ``sendfile``, ``recv``, ``recvfile``, key changes and the end."""
    client, server = net.context("ktls", "client"), net.context("ktls", "server")
    client.offload = server.offload = case.offload
    data = random.Random(2).randbytes(SIZE)
    (tmp_path / "data").write_bytes(data)
    crew, pest = Crew(), Pest()
    mine, their = net.tcp(buffers=16 * 1024)
    mine.settimeout(timeout)
    their.settimeout(PATIENCE)
    generations: list[int] = []
    crew.spawn(lambda: generations.append(serve(their, server, data)))
    with pest.at_work():
        tls = client.wrap_socket(mine, server_hostname=HOST)
        tls.sendall(data)
        if case.may_refresh:
            tls.refresh_traffic_keys()
        with (tmp_path / "data").open("rb") as file:
            assert tls.sendfile(file) == SIZE
        received = bytearray()
        while len(received) < SIZE:
            received += tls.recv(min(65536, SIZE - len(received)))
        with (tmp_path / "copy").open("wb") as file:
            assert tls.recvfile(file, SIZE) == SIZE
        tls.shutdown(socket.SHUT_WR)
        assert tls.recv(1) == b""
        usage = tls.key_usage
        tls.close()
    crew.finish()
    assert bytes(received) == data == (tmp_path / "copy").read_bytes()
    assert generations == [usage.tx.generation]
    assert pest.signals > 0


def read_frames(peer: Any, came: bytearray, ends: list[str]) -> None:
    try:
        while data := peer.recv(FRAME):
            came += data
        ends.append("in order")
    except ktls.TruncatedError:
        ends.append("cut")


def abuse(tls: ktls.KTLSSocket, pest: Pest, seed: int, *, may_refresh: bool) -> list[int] | None:
    """Send frames and change keys, interrupted all the time; return the frames that got through, None if the connection has failed."""
    through, chance = [], random.Random(seed)
    try:
        for number in range(ROUNDS):
            if pest.bother(lambda number=number: tls.sendall(frame(1, number))):  # type: ignore[misc]  # mypy does not infer a lambda with a default
                through.append(number)
            if may_refresh and chance.random() < 0.2:
                pest.bother(tls.refresh_traffic_keys)
        # What was begun and interrupted is brought to its end.
        if may_refresh:
            tls.refresh_traffic_keys()
        tls.sendall(frame(1, ROUNDS))
    except ConnectionAbortedError:
        with pytest.raises(ConnectionAbortedError):
            tls.send(b"never")
        return None
    return [*through, ROUNDS]


@pytest.mark.parametrize("seed", range(20 if LONG else 2))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_handlers_that_raise(net: Net, case: Case, seed: int) -> None:
    """What was sent arrives once, what was interrupted once or not at all, and the keys agree; or the connection has failed, and the peer knows."""
    link = net.link(case, timeout=None)
    crew, pest = Crew(), Pest()
    came, ends = bytearray(), list[str]()
    crew.spawn(read_frames, link.theirs, came, ends)
    with pest.at_work():
        through = abuse(link.ours, pest, seed, may_refresh=case.may_refresh)
        generation = link.ours.key_usage.tx.generation
        link.ours.close()
    crew.finish()
    assert pest.signals > 0
    numbers = [int.from_bytes(came[at + 2 : at + 6], "big") for at in range(0, len(came), FRAME)]
    assert bytes(came) == b"".join(frame(1, number) for number in numbers)
    assert numbers == sorted(set(numbers))
    if through is None:
        assert ends == ["cut"]
    else:
        assert ends == ["in order"]
        assert set(through) <= set(numbers)
        assert link.theirs.key_usage.rx.generation == generation
