"""What comes in: deliveries, pauses, records of every kind, and KeyUpdates that ``poll`` does not show."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from ..sockets.helpers import Case, Net, pattern, read_exactly
from .deliveries import DATA, finish, keepers
from .helpers import (
    TLS12_SUITE,
    BufferedKeeper,
    Keeper,
    Loop,
    connect,
    result,
    scripted,
    turns,
    until,
)

if TYPE_CHECKING:
    pass

# --- with real peers -------------------------------------------------------------------------------------------------


def test_both_ways(net: Net, loop: Loop, case: Case) -> None:
    async def main() -> None:
        link = await connect(net, loop, case)
        assert (link.ktls.offload.tx, link.ktls.offload.rx) == (case.tx_layer, case.rx_layer)
        link.transport.write(b"question")
        assert await asyncio.to_thread(link.theirs.recv, 100) == b"question"
        link.theirs.sendall(b"answer")
        await until(lambda: len(link.diary.data) >= 6)
        assert link.diary.data == b"answer"
        link.transport.close()
        assert await asyncio.to_thread(link.theirs.recv, 1) == b""
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "data", "lost"]
        assert link.diary.error is None

    loop.run(main)


def test_much_data_both_ways_at_once(net: Net, one_of_each: Loop, layer: Case) -> None:
    data, answer = pattern(2_000_000, 1), pattern(1_500_000, 2)
    # The ssl module can't read and write at once.
    case = Case(version=layer.version, peer="ktls", offload=layer.offload)

    async def main() -> None:
        link = await connect(net, one_of_each, case, buffers=65536)
        receiving = net.spawn(read_exactly, link.theirs, len(data))
        sending = net.spawn(link.theirs.sendall, answer)
        link.transport.write(data)
        assert await result(receiving) == data
        await result(sending)
        await until(lambda: len(link.diary.data) == len(answer))
        assert link.diary.data == answer
        link.transport.close()
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


# --- deliveries ------------------------------------------------------------------------------------------------------


@keepers
@pytest.mark.parametrize("suite", [None, TLS12_SUITE], ids=["1.3", "1.2"])
def test_records_of_all_sizes(net: Net, one_of_each: Loop, keeper: Any, suite: Any) -> None:
    options = {} if suite is None else {"suite": suite}

    async def main() -> None:
        link = scripted(net, keeper(), **options)
        expected = b""
        for size in (1, 2, 100, 4096, 4097, 3000, 1, 1, 1):
            piece = pattern(size, size)
            link.peer.send_record(DATA, piece, *(() if suite else (size % 3,)))  # padding in 1.3
            expected += piece
        await until(lambda: len(link.diary.data) >= len(expected))
        assert link.diary.data == expected
        await finish(link)
        assert link.diary.events == ["made", "data", "eof", "lost"]

    one_of_each.run(main)


def test_many_small_records_are_few_deliveries(net: Net, one_of_each: Loop) -> None:
    """What is there is delivered together, not record by record."""

    async def main() -> None:
        link = scripted(net)
        link.peer.send_raw(b"".join(link.peer.seal(DATA, b"%03d" % i) for i in range(500)))
        await until(lambda: len(link.diary.data) == 1500)
        assert link.diary.data == b"".join(b"%03d" % i for i in range(500))
        assert link.diary.deliveries < 20
        await finish(link)

    one_of_each.run(main)


def test_others_get_their_turn(net: Net, one_of_each: Loop) -> None:
    """A connection with small buffers and much data is not read to its end in one event."""

    async def main() -> None:
        longest = 0
        since = 0

        def turn() -> None:
            nonlocal since
            since = 0
            if not done:
                asyncio.get_running_loop().call_soon(turn)

        def count(_: Any) -> None:
            nonlocal since, longest
            since += 1
            longest = max(longest, since)

        done = False
        link = scripted(net, BufferedKeeper(1, on_data=count))
        turn()
        link.peer.send_data(bytes(1000))
        await until(lambda: len(link.diary.data) == 1000)
        done = True
        assert longest <= 32  # sixteen reads of the event, and as many of a second look
        await finish(link)

    one_of_each.run(main)


def test_switch_of_protocols_takes_effect_at_once(net: Net, one_of_each: Loop) -> None:
    """Also between what one event brings, and between the two kinds of protocol."""

    async def main() -> None:
        third = BufferedKeeper(1)
        second = Keeper(on_data=lambda transport: transport.set_protocol(third))
        first = BufferedKeeper(3, on_data=lambda transport: transport.set_protocol(second))
        second.transport = third.transport = None
        link = scripted(net, first)
        second.transport = third.transport = link.transport
        link.peer.send_raw(link.peer.seal(DATA, b"abcdef"))
        await until(lambda: len(second.diary.data) == 3)
        link.peer.send_data(b"ghi")
        await until(lambda: len(third.diary.data) == 3)
        assert first.diary.data == b"abc"
        assert second.diary.data == b"def"
        assert third.diary.data == b"ghi"
        assert link.transport.get_protocol() is third
        link.peer.send_alert()
        await until(lambda: third.diary.lost)
        assert third.diary.events == ["data", "eof", "lost"]
        assert not first.diary.lost

    one_of_each.run(main)


@pytest.mark.parametrize("name", ["get_buffer", "buffer_updated", "data_received", "eof_received"])
def test_protocol_that_raises(net: Net, one_of_each: Loop, name: str) -> None:
    """As in asyncio: the exception handler is told, and the connection is cut with that error."""
    error = RuntimeError("no")

    def fail(*_: Any) -> Any:
        raise error

    async def main() -> None:
        protocol: Any = Keeper() if name == "data_received" else BufferedKeeper()
        setattr(protocol, name, fail)
        link = scripted(net, protocol)
        if name == "eof_received":
            link.peer.send_alert()
        else:
            link.peer.send_data(b"x")
        await until(lambda: link.diary.lost)
        assert link.diary.error is error
        problem = one_of_each.problems.pop()
        assert problem["exception"] is error
        assert problem["message"] == f"Fatal error: protocol.{name}() call failed."
        assert problem["transport"] is link.transport

    one_of_each.run(main)


class Compacting(BufferedKeeper):
    """Cuts what it has dealt with off its buffer, which then has no room left."""

    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer += bytes(100 - len(self.buffer))
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        super().buffer_updated(nbytes)
        del self.buffer[:]


def test_buffer_that_is_resized_by_its_protocol(net: Net, one_of_each: Loop) -> None:
    """Nobody holds it after the read; and that it was not filled is known all the same, so a KeyUpdate behind the data is found."""

    async def main() -> None:
        link = scripted(net, Compacting(100))
        for turn in range(1, 4):
            link.peer.send_raw(link.peer.seal(DATA, b"data, ") + link.peer.seal_key_update())
            await until(lambda turn=turn: len(link.diary.data) == 24 * turn - 18)  # type: ignore[misc]  # mypy infers no lambda with a default
            link.peer.send_data(b"under the next key")
            await until(lambda turn=turn: len(link.diary.data) == 24 * turn)  # type: ignore[misc]  # mypy does not infer a lambda with a default
        await finish(link)

    one_of_each.run(main)


def test_buffer_without_room(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, BufferedKeeper(0))
        link.peer.send_data(b"x")
        await until(lambda: link.diary.lost)
        assert "empty buffer" in str(link.diary.error)
        one_of_each.problems.pop()

    one_of_each.run(main)


# --- pauses ----------------------------------------------------------------------------------------------------------


@keepers
def test_paused_in_every_delivery(net: Net, one_of_each: Loop, keeper: Any) -> None:
    async def main() -> None:
        link = scripted(net, keeper(on_data=lambda transport: transport.pause_reading()))
        data = pattern(20)
        link.peer.send_raw(link.peer.seal(DATA, data[:10]) + link.peer.seal(DATA, data[10:]))
        link.peer.send_alert()
        steps = 0
        while "eof" not in link.diary.events:
            await turns()
            before = link.diary.deliveries
            assert not link.transport.is_reading() or link.diary.lost
            await turns()
            assert link.diary.deliveries == before
            link.transport.resume_reading()
            await turns()
            assert link.diary.deliveries <= before + 1
            steps += 1
        assert link.diary.data == data
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


def test_paused_when_made(net: Net, loop: Loop, layer: Case) -> None:
    """Nothing is delivered, not even what came with the handshake's last flight."""

    async def main() -> None:
        link = await connect(
            net, loop, layer, protocol=Keeper(on_made=lambda transport: transport.pause_reading())
        )
        link.theirs.sendall(b"early")
        await turns()
        assert link.diary.events == ["made"]
        link.transport.pause_reading()  # again: harmless
        link.transport.resume_reading()
        link.transport.resume_reading()
        await until(lambda: link.diary.data == b"early")
        link.transport.close()
        await until(lambda: link.diary.lost)

    loop.run(main)


@pytest.mark.parametrize("with_notify", [True, False], ids=["close_notify", "fin"])
def test_end_while_paused(net: Net, one_of_each: Loop, with_notify: bool) -> None:
    """Data in front of the end is delivered first, however long it had to wait."""

    async def main() -> None:
        link = scripted(net)
        link.transport.pause_reading()
        link.peer.send_data(b"last words")
        if with_notify:
            link.peer.send_alert()
        link.peer.end()
        await turns(30)
        assert link.diary.events == ["made"]
        link.transport.resume_reading()
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "data", "eof", "lost"]
        assert link.diary.data == b"last words"
        assert link.diary.error is None
        assert link.transport.get_extra_info("ktls").truncated is not with_notify

    one_of_each.run(main)


def test_pause_holds_the_peer_back(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, buffers=8192)
        link.transport.pause_reading()
        data = pattern(1_000_000)
        sending = net.spawn(link.peer.send_data, data)
        await turns(100)
        assert not sending.done()
        link.transport.resume_reading()
        await result(sending)
        await until(lambda: len(link.diary.data) == len(data))
        assert link.diary.data == data
        await finish(link)

    one_of_each.run(main)


def test_idle_connection_holds_no_buffer(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link, other = scripted(net), scripted(net)
        assert link.transport._shared is other.transport._shared
        assert link.transport._queue is None
        assert not hasattr(link.transport, "__dict__")
        link.transport.write(b"x")
        link.peer.send_data(b"y")
        await until(lambda: bool(link.diary.data))
        assert link.transport._queue is None
        await finish(link)
        await finish(other)

    one_of_each.run(main)
