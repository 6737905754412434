"""What goes out: order, copies, flow control, records; and writes where none are possible any more."""

from __future__ import annotations

import array
import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.suites import MAX_FRAGMENT

from ..sockets.helpers import Case, Net, pattern, read_all
from .helpers import (
    CLOSE_NOTIFY,
    Keeper,
    Loop,
    Scripted,
    connect,
    result,
    scripted,
    turns,
    until,
)

if TYPE_CHECKING:
    from ktls.testing import RecordPeer

SMALL = 4096


def slowly(peer: RecordPeer, size: int) -> bytes:
    """Receive ``size`` bytes of data, with a rest after each record: the sender's buffer is full most of the time."""
    data = bytearray()
    while len(data) < size:
        data += peer.read_data(1)
        time.sleep(0.0005)
    return bytes(data)


def fill(link: Scripted, size: int = 2_000_000) -> bytes:
    """Write more than TCP takes; return it."""
    data = pattern(size, 7)
    link.transport.write(data)
    assert link.transport.get_write_buffer_size() > 0
    return data


def test_order_with_a_slow_reader(net: Net, one_of_each: Loop) -> None:
    """Writes of all kinds and sizes, before, while and after TCP is full."""

    async def main() -> None:
        link = scripted(net, buffers=SMALL)
        expected = bytearray()
        transport = link.transport
        for turn in range(30):
            piece = pattern(turn * turn * 97 + 1, turn)
            match turn % 5:
                case 0:
                    transport.write(piece)
                case 1:
                    transport.write(bytearray(piece))
                case 2:
                    transport.write(memoryview(piece)[1:])
                    piece = piece[1:]
                case 3:
                    transport.writelines([piece[:7], bytearray(piece[7:100]), b"", piece[100:]])
                case _:
                    half = len(piece) // 2
                    transport.writelines(memoryview(piece)[at : at + half] for at in (0, half))
                    piece = piece[: 2 * half]
            expected += piece
            if turn % 10 == 9:
                await turns(2)
        assert transport.get_write_buffer_size() > 0
        reading = net.spawn(slowly, link.peer, len(expected))
        assert await result(reading) == expected
        await until(lambda: transport.get_write_buffer_size() == 0)
        assert link.transport._queue is None
        transport.close()
        assert await link.hear_data() == b""

    one_of_each.run(main)


def test_twenty_mebibytes_at_once(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        case = Case(peer="stdlib")
        link = await connect(net, one_of_each, case)
        data = pattern(20 * 2**20)
        reading = net.spawn(read_all, link.theirs)
        link.transport.write(data)
        link.transport.close()
        received = await result(reading)
        assert len(received) == len(data)
        assert received == data
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

    one_of_each.run(main)


def test_buffers_may_be_changed_after_write(net: Net, one_of_each: Loop) -> None:
    """Whoever writes from one bytearray again and again need not wait until it has gone."""

    async def main() -> None:
        link = scripted(net, buffers=SMALL)
        before = fill(link)
        scratch = bytearray(b"one")
        link.transport.write(scratch)
        scratch[:] = b"two"
        link.transport.write(memoryview(scratch))
        scratch[:] = b"six"
        link.transport.writelines([scratch, memoryview(scratch)[:1]])
        scratch[:] = b"bad"
        large = bytearray(pattern(500_000))
        copy = bytes(large)
        link.transport.write(large)
        large[:] = bytes(len(large))
        del scratch[:]  # no view holds it
        expected = before + b"onetwosixs" + copy
        reading = net.spawn(link.peer.read_data, len(expected))
        assert await result(reading) == expected
        link.transport.abort()

    one_of_each.run(main)


def test_views_of_other_items(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        numbers = array.array("I", range(10))
        link.transport.write(memoryview(numbers))
        link.transport.write(memoryview(bytes(12)).cast("B", (3, 4)))
        link.transport.writelines([memoryview(numbers), memoryview(b"")])
        expected = numbers.tobytes() + bytes(12) + numbers.tobytes()
        assert link.peer.read_data(len(expected)) == expected
        link.transport.abort()

    one_of_each.run(main)


def test_large_views_of_other_items(net: Net, one_of_each: Loop) -> None:
    """The size is in bytes also where a part has to wait."""

    async def main() -> None:
        link = scripted(net, buffers=SMALL)
        numbers = array.array("Q", range(100_000))
        reading = net.spawn(link.peer.read_data, 2 * len(numbers) * 8)
        link.transport.write(memoryview(numbers))
        link.transport.writelines([memoryview(numbers)])
        assert await result(reading) == 2 * numbers.tobytes()
        await until(lambda: link.transport.get_write_buffer_size() == 0)
        link.transport.abort()

    one_of_each.run(main)


def test_pieces_share_records(net: Net, one_of_each: Loop) -> None:
    """``writelines`` of hundreds of pieces: one system call in the kernel for every 256, one record for each."""

    async def main() -> None:
        link = scripted(net)
        pieces = [b"%03d" % number for number in range(200)]
        link.transport.writelines(pieces)
        assert await link.hear() == [(23, b"".join(pieces))]
        assert link.transport.get_extra_info("ktls").key_usage.tx.records == 1
        pieces = [b"%04d" % number for number in range(1000)]
        link.transport.writelines(iter(pieces))
        records = await link.hear(4)
        assert b"".join(content for _, content in records) == b"".join(pieces)
        link.transport.write(bytes(2 * MAX_FRAGMENT + 1))
        assert [len(content) for _, content in await link.hear(3)] == [
            MAX_FRAGMENT,
            MAX_FRAGMENT,
            1,
        ]
        link.transport.abort()

    one_of_each.run(main)


def test_nothing_is_no_record(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.transport.write(b"")
        link.transport.write(bytearray())
        link.transport.writelines([])
        link.transport.writelines([b"", b""])
        link.transport.close()
        assert await link.hear_all() == [(21, CLOSE_NOTIFY)]

    one_of_each.run(main)


@pytest.mark.parametrize(
    "wrong", ["text", 5, None, [b"x"], object()], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_data(net: Net, one_of_each: Loop, wrong: Any) -> None:
    async def main() -> None:
        link = scripted(net)
        with pytest.raises(TypeError, match="bytes-like"):
            link.transport.write(wrong)
        with pytest.raises(TypeError):
            link.transport.writelines([b"good", wrong])
        link.transport.close()
        assert await link.hear_all() == [(21, CLOSE_NOTIFY)]

    if type(wrong) is object:
        wrong = object
    one_of_each.run(main)


# --- flow control ----------------------------------------------------------------------------------------------------


def test_flow_control(net: Net, one_of_each: Loop) -> None:
    """``pause_writing`` once above the high mark, ``resume_writing`` once at the low one."""

    async def main() -> None:
        link = scripted(net, buffers=SMALL)
        transport = link.transport
        assert transport.get_write_buffer_limits() == (128 * 1024, 512 * 1024)  # asyncio's of TLS
        transport.set_write_buffer_limits(high=100_000, low=20_000)
        assert transport.get_write_buffer_limits() == (20_000, 100_000)
        total = 0
        while "pause" not in link.diary.events:
            assert transport.get_write_buffer_size() <= 100_000
            transport.write(bytes(5000))
            total += 5000
        assert transport.get_write_buffer_size() > 100_000
        transport.write(bytes(5000))
        transport.writelines([bytes(5000)])
        total += 10_000
        assert link.diary.events == ["made", "pause"]
        while transport.get_write_buffer_size() > 20_000:
            assert link.diary.events == ["made", "pause"]
            link.peer.pull()
            await turns(1)
        await turns()
        assert link.diary.events == ["made", "pause", "resume"]
        assert transport.get_write_buffer_size() <= 20_000
        reading = net.spawn(link.peer.read_data, total)
        assert await result(reading) == bytes(total)
        assert link.diary.events == ["made", "pause", "resume"]
        transport.abort()

    one_of_each.run(main)


def test_high_mark_of_zero(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, buffers=SMALL)
        transport = link.transport
        transport.set_write_buffer_limits(0)
        transport.write(b"x")
        assert link.diary.events == ["made"]
        data = fill(link)
        assert link.diary.events == ["made", "pause"]
        reading = net.spawn(link.peer.read_data, len(data) + 1)
        assert await result(reading) == b"x" + data
        await until(lambda: link.diary.events == ["made", "pause", "resume"])
        assert transport.get_write_buffer_size() == 0
        transport.abort()

    one_of_each.run(main)


def test_limits_that_make_no_sense(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        with pytest.raises(ValueError, match="must be >= low"):
            link.transport.set_write_buffer_limits(high=1, low=2)
        link.transport.abort()

    one_of_each.run(main)


def test_lowered_limit_takes_effect_at_once(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, buffers=SMALL)
        fill(link, 400_000)
        assert link.diary.events == ["made"]
        link.transport.set_write_buffer_limits(high=10)
        assert link.diary.events == ["made", "pause"]
        link.transport.abort()

    one_of_each.run(main)


def test_write_from_flow_control_callbacks(net: Net, one_of_each: Loop) -> None:
    """What the callbacks write goes behind everything that was written before."""

    async def main() -> None:
        class Writer(Keeper):
            def pause_writing(self) -> None:
                self.transport.write(b"PAUSED")

            def resume_writing(self) -> None:
                self.transport.write(b"RESUMED")

        link = scripted(net, Writer(), buffers=SMALL)
        link.transport.set_write_buffer_limits(high=200_000, low=0)
        pieces = [pattern(100_000, number) for number in range(20)]
        link.transport.writelines(pieces)
        expected = b"".join(pieces) + b"PAUSEDRESUMED"
        reading = net.spawn(link.peer.read_data, len(expected))
        assert await result(reading) == expected
        link.transport.abort()

    one_of_each.run(main)


@pytest.mark.parametrize("how", ["abort", "close"])
def test_end_inside_pause_writing(net: Net, one_of_each: Loop, how: str) -> None:
    async def main() -> None:
        class Quitter(Keeper):
            def pause_writing(self) -> None:
                getattr(self.transport, how)()

        link = scripted(net, Quitter(), buffers=SMALL)
        link.transport.set_write_buffer_limits(high=1000)
        pieces = [pattern(100_000, number) for number in range(20)]
        link.transport.writelines(pieces)
        if how == "close":
            assert await link.hear_data() == b"".join(pieces)
        await until(lambda: link.diary.lost)
        assert link.transport.get_write_buffer_size() == 0
        assert link.diary.error is None

    one_of_each.run(main)


def test_drain_with_many_tasks(net: Net, one_of_each: Loop) -> None:
    """``StreamWriter.drain`` rests on this flow control."""

    async def main() -> None:
        link = scripted(net, asyncio_protocol(), buffers=SMALL)
        writer = asyncio.StreamWriter(
            link.transport, link.protocol, None, asyncio.get_running_loop()
        )
        link.transport.set_write_buffer_limits(high=10_000)

        async def produce(number: int) -> None:
            for _ in range(20):
                writer.write(bytes((number,)) * 3000)
                await writer.drain()

        reading = net.spawn(link.peer.read_data, 10 * 20 * 3000)
        await asyncio.gather(*(produce(number) for number in range(10)))
        data = await result(reading)
        assert all(data.count(number) == 60_000 for number in range(10))
        link.transport.abort()
        await link.protocol.gone

    one_of_each.run(main)


def asyncio_protocol() -> Any:
    """A protocol with the ``drain`` of asyncio's streams."""

    class Draining(asyncio.streams.FlowControlMixin):
        def __init__(self) -> None:
            super().__init__()
            self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def connection_made(self, transport: Any) -> None:
            pass

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.gone.set_result(None)

    return Draining()


# --- too late --------------------------------------------------------------------------------------------------------


def test_write_after_close(net: Net, one_of_each: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """Ignored, and worth a warning if it goes on after the connection is lost. As in asyncio."""

    async def main() -> None:
        link = scripted(net)
        link.transport.write(b"x")
        link.transport.close()
        assert link.transport.is_closing()
        link.transport.write(b"late")
        link.transport.writelines([b"late"])
        assert await link.hear_data() == b"x"
        await until(lambda: link.diary.lost)
        with caplog.at_level(logging.WARNING):
            link.transport.write(b"later")
            assert not caplog.records
            for _ in range(5):
                link.transport.write(b"later")
        assert {record.name for record in caplog.records} == {"ktls.aio"}
        assert link.transport.get_write_buffer_size() == 0

    one_of_each.run(main)


def test_write_after_write_eof(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.transport.write_eof()
        for late in (link.transport.write, lambda data: link.transport.writelines([data])):
            with pytest.raises(RuntimeError, match="after write_eof"):
                late(b"x")
        link.transport.write_eof()  # again: harmless
        link.transport.close()
        assert await link.hear_data() == b""

    one_of_each.run(main)


def test_everything_on_a_lost_connection(net: Net, one_of_each: Loop) -> None:
    """Cleaning up after a loss must not fail, in whatever order a program does it."""

    async def main() -> None:
        link = scripted(net)
        transport, info = link.transport, link.transport.get_extra_info("ktls")
        offload = info.offload
        transport.abort()
        await until(lambda: link.diary.lost)
        transport.close()
        transport.abort()
        transport.pause_reading()
        transport.resume_reading()
        assert transport.is_closing()
        assert not transport.is_reading()
        transport.set_write_buffer_limits(5)
        if transport.can_write_eof():
            transport.write_eof()
        transport.write(b"x")
        assert transport.get_extra_info("ktls").offload == info.offload == offload
        assert transport.get_extra_info("sslcontext") is None
        assert transport.get_extra_info("peername")[0] == "127.0.0.1"
        assert transport.get_extra_info("socket").fileno() == -1
        assert transport.get_extra_info("peercert") is None
        for touch in (lambda: info.key_usage, info.refresh_traffic_keys):
            with pytest.raises(ValueError, match="ended"):
                touch()
        assert "lost" in repr(transport)
        assert transport.get_write_buffer_size() == 0
        await turns()
        assert link.diary.events == ["made", "lost"]

    one_of_each.run(main)
