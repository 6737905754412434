"""A flood takes time from the other connections of a loop, but never their turn: counted in turns of the loop and records, not in seconds."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Final

import pytest

from ktls.record.driver import Driver
from ktls.record.receiving import _RECORDS_AT_ONCE

from ..aio.helpers import Echo, Keeper, Loop, until
from .attacks import REFUSED, TLS13, Attacker, Ear
from .victims import layers_for, transport_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.aio import KTLSTransport

    from ..sockets.helpers import Net
    from .victims import Layers

#: Well within the budget, and so small that TCP takes all of it at once.
_MESSAGES: Final = 1000
#: What one turn takes at most: an event and a look that was asked for; each so many, and the one that a read on the fast path met.
_AT_ONCE: Final = 2 * (_RECORDS_AT_ONCE + 1)


class Progress:
    """How far a flood got in each turn of the loop."""

    def __init__(self, transport: KTLSTransport) -> None:
        driver = transport.running_driver()
        assert isinstance(driver, Driver)
        self._connection = driver.connection
        self.steps: list[int] = []

    async def watch(self, done: Callable[[], bool]) -> None:
        """Note each turn until ``done``."""
        before = self.records
        while not done():
            await asyncio.sleep(0)
            self.steps.append(self.records - before)
            before = self.records

    @property
    def records(self) -> int:
        """How many KeyUpdates were taken."""
        return self._connection.rx_generation


def updates(name: str, attacker: Attacker) -> bytes:
    attack = next(attack for attack in REFUSED if attack.name == name)
    return b"".join(itertools.islice(attack.messages(attacker), _MESSAGES))


@pytest.mark.parametrize("layers", layers_for(TLS13))
@pytest.mark.parametrize("name", ["KeyUpdate", "KeyUpdate, requested"])
def test_another_connection_is_served_meanwhile(
    net: Net, loop: Loop, layers: Layers, name: str
) -> None:
    async def main() -> None:
        running = asyncio.get_running_loop()
        context, keeper = net.context("ktls", "server"), Keeper()
        (ours, theirs), (other, client) = net.tcp(), net.tcp()
        transport = transport_on(running, ours, context, TLS13, layers, keeper)
        echo = transport_on(running, other, context, TLS13, layers, Echo())
        await asyncio.sleep(0)
        attacker, ear = Attacker(TLS13), Ear(TLS13)
        progress = Progress(transport)
        theirs.sendall(updates(name, attacker) + attacker.data(b"after"))
        client.sendall(Attacker(TLS13).data(b"ping"))
        heard: list[tuple[int, bytes]] = []
        client.setblocking(False)

        def answered() -> bool:
            try:
                heard.extend(ear.open(client.recv(1024)))
            except BlockingIOError:
                return False
            return heard == [(23, b"ping")]

        await progress.watch(answered)
        assert progress.records < _MESSAGES
        await progress.watch(lambda: keeper.diary.data == b"after")
        assert progress.records == _MESSAGES
        assert 1 < max(progress.steps) <= _AT_ONCE
        transport.abort()
        echo.abort()
        await until(lambda: keeper.diary.lost)

    loop.run(main)


@pytest.mark.parametrize("layers", layers_for(TLS13))
def test_a_connection_that_is_closing(net: Net, loop: Loop, layers: Layers) -> None:
    """It reads and drops until the peer has taken everything: no faster."""

    async def main() -> None:
        running = asyncio.get_running_loop()
        context, keeper = net.context("ktls", "server"), Keeper()
        ours, theirs = net.tcp(buffers=64 * 1024)
        transport = transport_on(running, ours, context, TLS13, layers, keeper)
        progress, attacker = Progress(transport), Attacker(TLS13)
        await asyncio.sleep(0)
        while not transport.get_write_buffer_size():
            transport.write(bytes(50_000))
        transport.close()
        theirs.sendall(updates("KeyUpdate", attacker))
        await progress.watch(lambda: progress.records == _MESSAGES)
        assert 1 < max(progress.steps) <= _AT_ONCE
        assert not keeper.diary.lost
        transport.abort()
        await until(lambda: keeper.diary.lost)

    loop.run(main)
