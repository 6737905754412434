"""Files: by ``os.sendfile`` into the kernel or by copies, in order with everything else, and what may happen on the way."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.enums import ContentType

from ..sockets.helpers import Case, Net, pattern, read_all, read_exactly
from .helpers import (
    CLOSE_NOTIFY,
    Keeper,
    Loop,
    connect,
    result,
    scripted,
    turns,
    until,
)
from .test_keys import CHANGING, LAYER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = pattern(300_001)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Any]:
    """A regular file with ``DATA`` in it."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with path.open("r+b") as opened:
        yield opened


@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, None), (5, None), (5, 70_000), (0, 1), (300_000, 50), (300_001, 5), (400_000, None)],
)
def test_parts(
    net: Net, one_of_each: Loop, layer: Case, file: Any, offset: int, count: int | None
) -> None:
    """The number of bytes sent is returned, and the file's position is behind the last."""
    expected = DATA[offset:] if count is None else DATA[offset : offset + count]

    async def main() -> None:
        link = await connect(net, one_of_each, layer)
        reading = net.spawn(read_all, link.theirs)
        link.transport.write(b"before|")
        assert await one_of_each.sendfile(link.transport, file, offset, count) == len(expected)
        if expected:
            assert file.tell() == offset + len(expected)
        link.transport.write(b"|after")
        link.transport.close()
        assert await result(reading) == b"before|" + expected + b"|after"
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


@pytest.mark.kernel
def test_kernel_takes_it(net: Net, loop: Loop, file: Any, monkeypatch: Any) -> None:
    """All of it by ``os.sendfile``."""

    async def main() -> None:
        moved = 0
        sendfile = os.sendfile

        def counted(*arguments: Any) -> int:
            nonlocal moved
            sent = sendfile(*arguments)
            moved += sent
            return sent

        monkeypatch.setattr(os, "sendfile", counted)
        link = await connect(net, loop)
        reading = net.spawn(read_exactly, link.theirs, len(DATA))
        assert await loop.sendfile(link.transport, file) == len(DATA)
        assert await result(reading) == DATA
        assert moved == len(DATA)
        link.transport.close()
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_order(net: Net, one_of_each: Loop, file: Any) -> None:
    """Writes and files, several of them queued at once, while TCP has no room."""

    async def main() -> None:
        link = scripted(net, buffers=4096)
        first = pattern(200_000, 3)
        link.transport.write(first)
        tasks = []
        expected = first
        for number in range(3):
            tasks.append(
                asyncio.ensure_future(
                    one_of_each.sendfile(link.transport, file, number * 1000, 100_000)
                )
            )
            await turns(2)
            link.transport.write(b"between %d" % number)
            link.transport.writelines([b"and", b"more"])
            expected += DATA[number * 1000 : number * 1000 + 100_000]
            expected += b"between %dandmore" % number
        assert not any(task.done() for task in tasks)
        assert await result(net.spawn(link.peer.read_data, len(expected))) == expected
        assert await asyncio.gather(*tasks) == [100_000] * 3
        link.transport.close()
        assert await link.hear() == [(21, CLOSE_NOTIFY)]
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


def test_flow_control_does_not_count_files(net: Net, one_of_each: Loop, file: Any) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096)
        link.transport.set_write_buffer_limits(high=1000)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, file))
        await turns()
        assert link.transport.get_write_buffer_size() == 0
        assert link.diary.events == ["made"]
        link.transport.write(bytes(1001))
        assert link.diary.events == ["made", "pause"]
        assert await result(net.spawn(link.peer.read_data, len(DATA) + 1001)) == DATA + bytes(1001)
        await task
        await until(lambda: link.diary.events == ["made", "pause", "resume"])
        link.transport.abort()

    one_of_each.run(main)


def test_small_buffers(net: Net, loop: Loop, file: Any) -> None:
    """Records of 16 KiB have to get through buffers of 4."""

    async def main() -> None:
        link = await connect(net, loop, buffers=4096)
        link.transport.set_write_buffer_limits(high=4096)
        reading = net.spawn(read_exactly, link.theirs, len(DATA))
        assert await loop.sendfile(link.transport, file) == len(DATA)
        assert await result(reading) == DATA
        link.transport.close()
        await until(lambda: link.diary.lost)

    loop.run(main)


# --- what is no regular file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "count"), [(0, None), (5, None), (5, 70_000), (0, 400_000)])
def test_file_in_memory(net: Net, loop: Loop, offset: int, count: int | None) -> None:
    expected = DATA[offset:] if count is None else DATA[offset : offset + count]

    async def main() -> None:
        link = await connect(net, loop)
        reading = net.spawn(read_all, link.theirs)
        file = io.BytesIO(DATA)
        file.seek(77)  # of no account, as in asyncio
        link.transport.write(b"before|")
        assert await loop.sendfile(link.transport, file, offset, count) == len(expected)
        assert file.tell() == offset + len(expected)
        link.transport.write(b"|after")
        link.transport.close()
        assert await result(reading) == b"before|" + expected + b"|after"

    loop.run(main)


def test_pipe(net: Net, loop: Loop) -> None:
    def feed(fd: int) -> None:
        with open(fd, "wb") as sink:
            sink.write(DATA)

    async def main() -> None:
        link = await connect(net, loop)
        reading = net.spawn(read_all, link.theirs)
        source, sink = os.pipe()
        net.spawn(feed, sink)
        with open(source, "rb") as file:
            assert await loop.sendfile(link.transport, file) == len(DATA)
        link.transport.close()
        assert await result(reading) == DATA
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_fallback_that_is_forbidden(net: Net, loop: Loop) -> None:
    async def main() -> None:
        link = await connect(net, loop)
        with pytest.raises(asyncio.SendfileNotAvailableError):
            await loop.sendfile(link.transport, io.BytesIO(DATA), fallback=False)
        link.transport.close()
        assert await asyncio.to_thread(read_all, link.theirs) == b""
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_wrong_arguments(net: Net, loop: Loop, file: Any, tmp_path: Path) -> None:
    async def main() -> None:
        link = await connect(net, loop)
        with (tmp_path / "file").open() as text, pytest.raises(ValueError, match="binary mode"):
            await loop.sendfile(link.transport, text)
        for count in (0, -1):
            with pytest.raises(ValueError, match="positive"):
                await loop.sendfile(link.transport, file, 0, count)
        link.transport.close()
        with pytest.raises(RuntimeError, match="closing"):
            await loop.sendfile(link.transport, file)
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_stream_writer(net: Net, file: Any) -> None:
    """Our function takes a ``StreamWriter``, too."""
    import ktls
    from ktls.aio import open_connection

    loop = Loop("functions")

    async def main() -> None:
        mine, theirs = net.tcp()
        serving = net.spawn(
            lambda: net.keep(net.context("stdlib", "server").wrap_socket(theirs, server_side=True))
        )
        _, writer = await open_connection(
            sock=mine, ssl=net.context("ktls", "client"), server_hostname="localhost"
        )
        writer.write(b"head")
        reading = net.spawn(read_all, await result(serving))
        assert await ktls.aio.sendfile(writer, file) == len(DATA)
        writer.close()
        await writer.wait_closed()
        assert await result(reading) == b"head" + DATA

    loop.run(main)


def test_transport_that_is_not_ours(net: Net, file: Any) -> None:
    """The loop's own sendfile does it."""
    import ktls

    async def main() -> None:
        mine, theirs = net.tcp()
        transport, _ = await asyncio.get_running_loop().create_connection(Keeper, sock=mine)
        reading = net.spawn(read_all, theirs)
        assert await ktls.aio.sendfile(transport, file) == len(DATA)
        transport.close()
        assert await result(reading) == DATA

    for name in ("functions", "asyncio"):
        Loop(name).run(main)


# --- on the way ------------------------------------------------------------------------------------------------------


def test_cancelled(net: Net, one_of_each: Loop, file: Any) -> None:
    """What went out went out; what is written next follows it, and the position tells how much it was."""

    async def main() -> None:
        link = scripted(net, buffers=4096)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, file))
        await turns(20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        sent = file.tell()
        link.transport.write(b"the end")
        link.transport.close()
        received = await link.hear_data()
        assert received == DATA[:sent] + b"the end"
        assert sent < len(DATA)

    one_of_each.run(main)


def test_cancelled_in_the_queue(net: Net, one_of_each: Loop, file: Any) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096)
        first = pattern(100_000)
        link.transport.write(first)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, file))
        await turns()
        link.transport.write(b"|")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        link.transport.close()
        assert await link.hear_data() == first + b"|"

    one_of_each.run(main)


@pytest.mark.parametrize("kind", ["regular", "memory"])
@pytest.mark.parametrize("how", ["reset", "abort"])
def test_connection_lost(net: Net, one_of_each: Loop, file: Any, how: str, kind: str) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096)
        source = file if kind == "regular" else io.BytesIO(DATA)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, source))
        await turns(20)
        if how == "reset":
            link.peer.reset()
        else:
            link.transport.abort()
        with pytest.raises(ConnectionError):
            await task
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


def test_close_waits_for_the_file(net: Net, one_of_each: Loop, file: Any) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, file))
        await turns(5)
        link.transport.close()
        assert await link.hear_data() == DATA
        assert await task == len(DATA)
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

    one_of_each.run(main)


def test_file_that_shrinks(net: Net, one_of_each: Loop, file: Any) -> None:
    """Fewer bytes than asked for, and never padding."""

    async def main() -> None:
        link = scripted(net, buffers=4096)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, file, 0, len(DATA)))
        await turns(5)
        file.truncate(250_000)
        reading = asyncio.ensure_future(link.hear_data())
        assert await task == 250_000
        link.transport.close()
        assert await reading == DATA[:250_000]

    one_of_each.run(main)


def test_file_error(net: Net, one_of_each: Loop, tmp_path: Path) -> None:
    """The file's error is the caller's; the connection goes on."""

    async def main() -> None:
        link = scripted(net)
        with (tmp_path / "sink").open("wb") as unreadable:
            unreadable.write(b"x")
            unreadable.flush()
            with pytest.raises(OSError, match="Bad file descriptor"):
                await one_of_each.sendfile(link.transport, unreadable)
        link.transport.write(b"goes on")
        assert await link.hear() == [(23, b"goes on")]
        link.transport.abort()

    one_of_each.run(main)


def test_reader_of_a_file_that_fails(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        class Failing(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def read(self, size: int = -1) -> bytes:
                raise ZeroDivisionError

        link = scripted(net)
        with pytest.raises(ZeroDivisionError):
            await one_of_each.sendfile(link.transport, Failing())
        link.transport.write(b"goes on")
        assert await link.hear() == [(23, b"goes on")]
        link.transport.abort()

    one_of_each.run(main)


@pytest.mark.parametrize("paused", [False, True])
def test_key_updates_meanwhile(net: Net, loop: Loop, tmp_path: Path, paused: bool) -> None:
    """The peer asks for new keys while a long file goes out; also when nobody reads: it must not have to wait for its end."""

    async def main() -> None:
        case = Case(peer="ktls", offload=CHANGING)
        link = await connect(net, loop, case, changing_peer=True, buffers=65536)
        if paused:
            link.transport.pause_reading()
        data = DATA * 15
        (tmp_path / "long").write_bytes(data)
        half, asked = threading.Event(), threading.Event()

        def receive() -> bytes:
            received = read_exactly(link.theirs, len(data) // 3)
            half.set()
            asked.wait(20)
            return received + read_exactly(link.theirs, len(data) - len(received))

        def ask() -> None:
            half.wait(20)
            for _ in range(3):
                link.theirs.refresh_traffic_keys(request_peer=True)
                link.theirs.sendall(b"x")
            asked.set()

        receiving, asking = net.spawn(receive), net.spawn(ask)
        with (tmp_path / "long").open("rb") as file:
            assert await loop.sendfile(link.transport, file) == len(data)
        assert await result(receiving) == data
        await result(asking)
        if paused:
            # Answered in the middle of the file; unless it is user space that receives, which reads nothing for nobody.
            if link.ktls.offload.rx == "kernel":
                assert link.ktls.key_usage.tx.generation >= 1
            link.transport.resume_reading()
        await until(lambda: link.diary.data == b"xxx")
        assert link.ktls.key_usage.rx.generation == 3
        link.transport.close()
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_our_key_updates_meanwhile(net: Net, one_of_each: Loop, file: Any) -> None:
    async def main() -> None:
        link = scripted(net, buffers=8192, **LAYER)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, file))
        for _ in range(3):
            await turns(3)
            link.transport.get_extra_info("ktls").refresh_traffic_keys()
        reading = net.spawn(link.peer.read_data, len(DATA))
        for _ in range(20):  # each takes room from the file, so not for as long as that takes
            link.transport.get_extra_info("ktls").refresh_traffic_keys()
            await turns(3)
        assert await task == len(DATA)
        assert await result(reading) == DATA
        assert link.peer.rx_generation >= 3
        link.transport.abort()

    one_of_each.run(main)


def test_file_of_a_half_closed_connection(net: Net, one_of_each: Loop, file: Any) -> None:
    async def main() -> None:
        link = scripted(net, Keeper(keep_open=True))
        link.peer.send_alert()
        await until(lambda: "eof" in link.diary.events)
        task = asyncio.ensure_future(one_of_each.sendfile(link.transport, file))
        reading = net.spawn(link.peer.read_data, len(DATA))
        assert await task == len(DATA)
        assert await result(reading) == DATA
        link.transport.write_eof()
        assert await link.hear() == [(21, CLOSE_NOTIFY)]
        with pytest.raises(RuntimeError):
            await one_of_each.sendfile(link.transport, file)
        with suppress(RuntimeError):
            link.transport.write(b"x")
        link.transport.close()
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


def test_records_of_a_file(net: Net, one_of_each: Loop, file: Any) -> None:
    """Full records, and one for the rest."""

    async def main() -> None:
        link = scripted(net)
        reading = net.spawn(link.peer.read_data, len(DATA))
        await one_of_each.sendfile(link.transport, file)
        assert await result(reading) == DATA
        records = link.transport.get_extra_info("ktls").key_usage.tx.records
        assert records <= len(DATA) // 2**14 + 8
        link.peer.send_record(ContentType.APPLICATION_DATA, b"x")
        await until(lambda: link.diary.data == b"x")
        link.transport.abort()

    one_of_each.run(main)
