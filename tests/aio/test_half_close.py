"""Each direction of a connection ends by itself, where TLS knows that."""

from __future__ import annotations

import asyncio
import socket

import pytest

from ..sockets.helpers import Case, Net, matrix, pattern, read_all
from ..support import TLS12, TLS13
from .helpers import (
    CLOSE_NOTIFY,
    Keeper,
    Loop,
    connect,
    result,
    scripted,
    slow_reader,
    turns,
    until,
)


@pytest.mark.parametrize("half", matrix(versions=(TLS13,)), ids=str)
def test_we_close_our_half(net: Net, loop: Loop, half: Case) -> None:
    async def main() -> None:
        link = await connect(net, loop, half, buffers=8192)
        assert link.transport.can_write_eof()
        data = pattern(150_000)
        link.transport.write(data)
        link.transport.write_eof()
        assert await result(net.spawn(read_all, link.theirs)) == data
        for part in (b"still", b"listening"):
            link.theirs.sendall(part)
            await until(lambda part=part: link.diary.data.endswith(part))  # type: ignore[misc]  # mypy infers no lambda with a default
        assert not link.transport.is_closing()
        if half.peer == "ktls":
            link.theirs.shutdown(socket.SHUT_WR)
        else:
            await asyncio.to_thread(link.theirs.unwrap)
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "data", "eof", "lost"]
        assert link.diary.error is None

    loop.run(main)


def test_half_close_ends_with_fin(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.transport.write(b"x")
        link.transport.write_eof()
        assert await link.hear_all() == [(23, b"x"), (21, CLOSE_NOTIFY)]
        link.peer.send_data(b"y")
        await until(lambda: link.diary.data == b"y")
        link.transport.close()
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


def test_half_close_with_a_full_buffer(net: Net, one_of_each: Loop) -> None:
    """Every amount of data in front of close_notify arrives with it, also where only a part of it fits."""

    async def main() -> None:
        for size in range(8000, 16_000, 1100):
            link = scripted(net, buffers=4096)
            data = pattern(size)
            link.transport.write(data)
            link.transport.write_eof()
            await turns(5)
            assert await result(net.spawn(slow_reader, link.peer)) == data
            assert not link.diary.lost
            link.transport.abort()
            link.peer.sock.close()

    one_of_each.run(main)


def test_peer_closes_its_half(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, Keeper(keep_open=True))
        link.peer.send_data(b"x")
        link.peer.send_alert()
        link.peer.end()
        await until(lambda: "eof" in link.diary.events)
        await turns(30)
        assert not link.transport.is_closing()
        link.transport.write(b"later")
        link.transport.close()
        assert await link.hear_data() == b"later"
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


def test_no_half_close_in_tls12(net: Net, loop: Loop) -> None:
    async def main() -> None:
        link = await connect(net, loop, Case(version=TLS12), protocol=Keeper(keep_open=True))
        assert not link.transport.can_write_eof()
        with pytest.raises(NotImplementedError):
            link.transport.write_eof()
        link.transport.write(b"goes on")
        assert await asyncio.to_thread(link.theirs.recv, 100) == b"goes on"
        await asyncio.to_thread(link.theirs.unwrap)
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

    loop.run(main)
