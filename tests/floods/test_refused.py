"""Floods that bring no data: they end, after exactly as many messages as the budget has tokens, with the right error and alert; what they take is bounded."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from ktls.protocol.enums import AlertDescription
from ktls.protocol.errors import RemoteProtocolError, TruncatedError
from ktls.protocol.limits import FloodBudget
from ktls.record.probe import rekey_supported
from ktls.testing import loopback_pair

from ..aio.helpers import Keeper, Loop, result, until
from .attacks import REFUSED, Attack, Attacker, Ear
from .victims import blocking, driver_on, layers_for, transport_on

if TYPE_CHECKING:
    from ..sockets.helpers import Net
    from .victims import Layers

_ALERT: Final = (21, b"\x02" + bytes((AlertDescription.UNEXPECTED_MESSAGE,)))
_TOO_MANY: Final = "too many messages that bring no data"
#: Bytes of this process that one connection may take while it is flooded, whatever the flood: two buffers for what TCP has, a message of 2^16 bytes and its copies.
_MEMORY: Final = 384 * 1024
#: Messages after which it has shown what it takes.
_ENOUGH: Final = 100

#: The long form: every flood on every record layer. The short one takes the layers that the front ends would choose here, and all of them for what makes us send.
_LONG: Final = bool(os.environ.get("KTLS_TRUST"))
_seen: Final = [
    (attack, layers)
    for attack in REFUSED
    for position, layers in enumerate(layers_for(attack.suite))
    if not (attack.unseen and layers == "kernel")
    and (_LONG or not position or attack.unseen or attack.name == "KeyUpdate, requested")
]
every_seen = pytest.mark.parametrize(("attack", "layers"), _seen, ids=str)


def no_time() -> float:
    """A clock that gives nothing back."""
    return 0.0


def whole_budget(attack: Attack, attacker: Attacker) -> tuple[bytes, bytes]:
    """What the budget just bears, then a byte of data where that is allowed; and one message more."""
    messages = attack.messages(attacker)
    count = int(FloodBudget.CAPACITY) // attack.cost
    bearable = b"".join(itertools.islice(messages, count))
    return bearable + (b"" if attack.endless_message else attacker.data(b"x")), next(messages)


def listen(sock: socket.socket, attack: Attack) -> list[tuple[int, bytes]]:
    """Everything that the victim says, to the end of TCP."""
    ear, heard = Ear(attack.suite), []
    while data := sock.recv(65536):
        heard += ear.open(data)
    return heard


def expected_answers(attack: Attack, layers: Layers) -> range:
    """How many records may come before the alert."""
    if attack.name == "KeyUpdate, requested" and (layers == "userspace" or rekey_supported()):
        return range(1, int(FloodBudget.CAPACITY) + 1)  # one may answer several
    return range(16, 17) if attack.name.startswith("HelloRequest") else range(1)


@every_seen
def test_a_blocking_socket(net: Net, attack: Attack, layers: Layers) -> None:
    ours, theirs = net.tcp()
    context = net.context("ktls", "server")
    tls = net.keep(blocking(ours, context, attack.suite, layers, attack.victim, clock=no_time))
    bearable, one_more = whole_budget(attack, Attacker(attack.suite))
    heard = net.spawn(listen, theirs, attack)
    sent = net.spawn(theirs.sendall, bearable)
    if attack.endless_message:
        sent.result()
    else:
        assert tls.recv(9) == b"x"
    theirs.sendall(one_more)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=_TOO_MANY) as caught:
            tls.recv(9)
        assert caught.value.alert is AlertDescription.UNEXPECTED_MESSAGE
    tls.close()
    *answers, last = heard.result()
    assert last == _ALERT
    assert len(answers) in expected_answers(attack, layers)


@every_seen
def test_a_transport(net: Net, loop: Loop, attack: Attack, layers: Layers) -> None:
    async def main() -> None:
        ours, theirs = net.tcp()
        context, keeper = net.context("ktls", "server"), Keeper()
        running = asyncio.get_running_loop()
        transport = transport_on(
            running, ours, context, attack.suite, layers, keeper, attack.victim, clock=no_time
        )
        bearable, one_more = whole_budget(attack, Attacker(attack.suite))
        heard = net.spawn(listen, theirs, attack)
        await result(net.spawn(theirs.sendall, bearable))
        if not attack.endless_message:
            await until(lambda: keeper.diary.data == b"x")
        assert not transport.is_closing()
        await result(net.spawn(theirs.sendall, one_more))
        await until(lambda: keeper.diary.lost)
        assert isinstance(keeper.diary.error, RemoteProtocolError)
        assert _TOO_MANY in str(keeper.diary.error)
        *answers, last = await result(heard)
        assert last == _ALERT
        assert len(answers) in expected_answers(attack, layers)

    loop.run(main)


@pytest.mark.parametrize(
    ("attack", "layers"),
    [(attack, layers) for attack, layers in _seen if _LONG or attack.costly],
    ids=str,
)
def test_memory(attack: Attack, layers: Layers) -> None:
    """What this process holds for a connection at any moment of a flood."""
    with loopback_pair() as (ours, theirs), ThreadPoolExecutor(1) as attackers:
        driver = driver_on(ours, attack.suite, layers, attack.victim, clock=no_time)
        messages = attack.messages(Attacker(attack.suite))
        flood = b"".join(itertools.islice(messages, _ENOUGH // attack.cost))
        buffer = bytearray(16)

        def send() -> None:
            theirs.sendall(flood)
            theirs.shutdown(socket.SHUT_WR)

        tracemalloc.start()
        try:
            sent = attackers.submit(send)
            with pytest.raises(TruncatedError):
                driver.recv_into(buffer)
            sent.result()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < _MEMORY
