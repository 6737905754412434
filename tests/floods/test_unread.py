"""A peer that never reads: what we owe it is merged or bounded, and goes out once it reads."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Final

import pytest

from ktls.protocol.enums import Role
from ktls.record.driver import Driver
from ktls.record.probe import rekey_supported
from ktls.testing import fill_up, loopback_pair, wait_readable

from ..aio.helpers import Keeper, Loop, until
from .attacks import REFUSED, TLS12, TLS13, Attacker, Ear
from .victims import driver_on, layers_for, transport_on

if TYPE_CHECKING:
    import socket

    from ..sockets.helpers import Net
    from .victims import Layers

_NO_WAIT: Final = 0x40  # MSG_DONTWAIT
_SMALL: Final = 16 * 1024
_REQUESTS: Final = next(attack for attack in REFUSED if attack.name == "KeyUpdate, requested")
_HELLOS: Final = next(attack for attack in REFUSED if attack.name.startswith("HelloRequest"))
#: Changes of our key that may wait (``ktls.protocol.connection``), and one for a request of the peer's.
_CHANGES: Final = 16 + 1
#: Those that can change our key. Elsewhere a request ends our sending side, and nothing is owed.
changing_layers = pytest.mark.parametrize(
    "layers",
    [layers for layers in layers_for(TLS13) if layers == "userspace" or rekey_supported()],
)


def clog(driver: Driver, sock: socket.socket) -> int:
    """Send until nothing more goes out."""
    return fill_up(lambda: driver.send(bytes(_SMALL), _NO_WAIT), sock)


def waiting(driver: Driver) -> int:
    """How many commands wait for room."""
    return len(driver.sending._owed or ())


def take(driver: Driver, sock: socket.socket, flood: bytes, theirs: socket.socket) -> int:
    """Receive all of ``flood``, whose last record is data of one byte; return the most commands that ever waited."""
    most, buffer = 0, bytearray(1)
    theirs.sendall(flood)
    while True:
        assert wait_readable(sock) or driver.pending()
        try:
            if driver.recv_into(buffer, 0, _NO_WAIT):
                return max(most, waiting(driver))
        except BlockingIOError:
            most = max(most, waiting(driver))


def hear(
    theirs: socket.socket,
    driver: Driver,
    ear: Ear,
    octets: int,
    others: int,
    *,
    kind_counted: int = 22,
) -> list[tuple[int, bytes]]:
    """Read ``octets`` of data and ``others`` records of another kind, and let go out what waits."""
    heard: list[tuple[int, bytes]] = []
    data = count = 0
    while data < octets or count < others:
        records = ear.open(theirs.recv(65536))
        driver.run_owed()
        data += sum(len(content) for kind, content in records if kind == 23)
        count += sum(kind == kind_counted for kind, _ in records)
        heard += records
    assert (data, count) == (octets, others)
    return heard


@pytest.mark.parametrize("layers", layers_for(TLS13))
def test_requested_updates_get_one_answer(layers: Layers) -> None:
    with loopback_pair(sndbuf=_SMALL, rcvbuf=_SMALL) as (ours, theirs):
        driver, attacker = driver_on(ours, TLS13, layers), Attacker(TLS13)
        octets = clog(driver, ours)
        changes = driver.sender.can_change_key
        for _ in range(10):
            flood = b"".join(itertools.islice(_REQUESTS.messages(attacker), 30))
            assert take(driver, ours, flood + attacker.data(b"x"), theirs) <= 2 * changes
        assert driver.connection.rx_generation == 300
        heard = hear(theirs, driver, Ear(TLS13), octets, driver.connection.tx_generation)
        answers = [content for kind, content in heard if kind == 22]
        assert set(answers) <= {b"\x18\0\0\x01\0"}
        # TCP may make a little room all the same; without merging it would be 300.
        assert changes <= len(answers) <= 30 * changes


@pytest.mark.parametrize("layers", layers_for(TLS12))
def test_hello_requests_get_a_few_answers(layers: Layers) -> None:
    with loopback_pair(sndbuf=_SMALL, rcvbuf=_SMALL) as (ours, theirs):
        driver, attacker = driver_on(ours, TLS12, layers, Role.CLIENT), Attacker(TLS12)
        octets = clog(driver, ours)
        flood = b"".join(itertools.islice(_HELLOS.messages(attacker), 200))
        assert take(driver, ours, flood + attacker.data(b"x"), theirs) <= 16
        heard = hear(theirs, driver, Ear(TLS12), octets, 16, kind_counted=21)
        assert [content for kind, content in heard if kind == 21] == [b"\x01\x64"] * 16


@changing_layers
def test_our_own_updates_do_not_pile_up(layers: Layers) -> None:
    """An application that changes its key every minute does not know that the peer has stopped reading."""
    with loopback_pair(sndbuf=_SMALL, rcvbuf=_SMALL) as (ours, theirs):
        driver, attacker = driver_on(ours, TLS13, layers), Attacker(TLS13)
        octets = clog(driver, ours)
        for turn in range(1000):
            with pytest.raises(BlockingIOError):
                driver.refresh_traffic_keys(request_peer=turn % 2 == 0, flags=_NO_WAIT)
        assert waiting(driver) <= 2 * _CHANGES
        take(driver, ours, attacker.key_update(True) + attacker.data(b"x"), theirs)
        assert waiting(driver) <= 2 * (_CHANGES + 1)
        # TCP may make a little room all the same.
        assert 16 <= driver.connection.tx_generation < 100
        ear = Ear(TLS13)
        heard = hear(theirs, driver, ear, octets, driver.connection.tx_generation)
        assert [content[-1] for kind, content in heard if kind == 22].count(1) == 1
        assert driver.send(b"after") == 5
        assert hear(theirs, driver, ear, 5, 0) == [(23, b"after")]


@changing_layers
def test_a_transport_that_writes_to_it(net: Net, loop: Loop, layers: Layers) -> None:
    """The flood comes in while the queue of writes is full; then the peer reads, and everything is there."""

    async def main() -> None:
        ours, theirs = net.tcp(buffers=_SMALL)
        context, keeper = net.context("ktls", "server"), Keeper()
        running = asyncio.get_running_loop()
        transport = transport_on(running, ours, context, TLS13, layers, keeper)
        attacker, ear, driver = Attacker(TLS13), Ear(TLS13), transport.running_driver()
        assert isinstance(driver, Driver)
        octets = 0
        while "pause" not in keeper.diary.events:
            transport.write(bytes(50_000))
            octets += 50_000
        for turn in range(1, 11):
            flood = b"".join(itertools.islice(_REQUESTS.messages(attacker), 30))
            theirs.sendall(flood + attacker.data(b"x"))
            await until(lambda: keeper.diary.data == b"x" * turn)  # noqa: B023  # it is awaited in the same turn
            assert waiting(driver) <= 2
        heard: list[tuple[int, bytes]] = []
        theirs.setblocking(False)
        while sum(len(content) for kind, content in heard if kind == 23) < octets:
            try:
                heard += ear.open(theirs.recv(65536))
            except BlockingIOError:
                await asyncio.sleep(0.001)
        assert 1 <= sum(kind == 22 for kind, _ in heard) < 300
        transport.abort()
        await until(lambda: keeper.diary.lost)

    loop.run(main)
