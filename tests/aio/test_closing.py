"""How we end connections: in order and whole, in time; once, and without leaving anything."""

from __future__ import annotations

import errno
import fcntl
import gc
import socket
import sys
import termios
import warnings
from typing import Any

import pytest

from ktls.protocol.enums import ContentType

from ..sockets.helpers import Net, pattern
from .helpers import (
    CLOSE_NOTIFY,
    TLS12_SUITE,
    Keeper,
    Loop,
    Scripted,
    connect,
    ended,
    result,
    scripted,
    slow_reader,
    timed,
    turns,
    until,
)

DATA = ContentType.APPLICATION_DATA


# --- in order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["1.3", "1.2"])
def test_close_loses_nothing(net: Net, one_of_each: Loop, suite: str) -> None:
    """Small buffers, and a record half in TCP: where a plain ``close`` of a kernel TLS socket loses data. Many trials."""
    options: Any = {} if suite == "1.3" else {"suite": TLS12_SUITE}

    async def trial(size: int) -> None:
        link = scripted(net, buffers=4096, **options)
        data = pattern(size, size)
        link.transport.write(data)
        link.transport.close()
        await turns(size % 7)
        assert await result(net.spawn(slow_reader, link.peer)) == data
        await until(lambda: link.diary.lost)
        assert link.diary.events[-1] == "lost"
        assert link.diary.error is None
        link.peer.sock.close()

    async def main() -> None:
        for size in range(1, 60_000, 1499):
            await trial(size)

    one_of_each.run(main)


def test_close_waits_until_all_is_acknowledged(net: Net, one_of_each: Loop) -> None:
    """What ``send`` has accepted, the kernel may still hold above TCP, where ``close`` destroys it: only SIOCOUTQ tells. The chance of a loss is one in 400, so we look at the cause."""

    async def main() -> None:
        link = scripted(net, buffers=4096)
        sock = link.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)  # room for the goodbye
        total = 0
        while unacknowledged(sock) < 600:
            link.transport.write(bytes(200))
            total += 200
        link.transport.close()
        await turns(100)
        assert not link.diary.lost
        assert await result(net.spawn(slow_reader, link.peer)) == bytes(total)
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

    one_of_each.run(main)


def unacknowledged(sock: Any) -> int:
    """How many bytes TCP has sent, or will, that the peer's has not confirmed."""
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def test_close_is_no_callback(net: Net, one_of_each: Loop) -> None:
    """``connection_lost`` never comes from inside ``close`` or ``abort``; and once, however often those are called."""

    async def main() -> None:
        for end in ("close", "abort"):
            link = scripted(net)
            getattr(link.transport, end)()
            getattr(link.transport, end)()
            assert not link.diary.lost
            assert link.transport.is_closing()
            link.peer.sock.close()
            await until(lambda link=link: link.diary.lost)  # type: ignore[misc]  # mypy infers no lambda with a default
            link.transport.close()
            link.transport.abort()
            await turns()
            assert link.diary.events == ["made", "lost"]
            assert link.diary.error is None

    one_of_each.run(main)


def test_peer_answers_in_every_way(net: Net, one_of_each: Loop) -> None:
    """Goodbye to our goodbye may be close_notify and FIN, FIN alone, RST, or nothing."""

    async def main() -> None:
        for answer in ("close_notify", "fin", "reset", "nothing"):
            link = scripted(net)
            link.transport.write(b"bye")
            link.transport.close()
            assert await link.hear(2) == [(23, b"bye"), (21, CLOSE_NOTIFY)]
            if answer == "close_notify":
                link.peer.send_alert()
            if answer in ("close_notify", "fin"):
                link.peer.end()
            if answer == "reset":
                link.peer.reset()
            await until(lambda link=link: link.diary.lost)  # type: ignore[misc]  # mypy infers no lambda with a default
            assert link.diary.error is None
            assert link.diary.events == ["made", "lost"]

    one_of_each.run(main)


async def close_unread(net: Net, link: Scripted, unread: int) -> None:
    """Write and close; the peer sends ``unread`` bytes before it reads, and gets everything all the same."""
    data = pattern(300_000)

    def write_then_read() -> bytes:
        link.peer.send_data(bytes(unread))
        return slow_reader(link.peer)

    link.transport.write(data)
    link.transport.close()
    assert await result(net.spawn(write_then_read)) == data
    await until(lambda: link.diary.lost)
    assert link.diary.error is None


def test_what_comes_while_we_close_is_dropped(net: Net, one_of_each: Loop) -> None:
    """A peer that writes before it reads would never take our data; and what is unread would make TCP reset the connection."""

    async def main() -> None:
        link = scripted(net, buffers=8192)
        await close_unread(net, link, 500_000)
        assert link.diary.events == ["made", "lost"]

    one_of_each.run(main)


def test_close_while_paused_with_a_hidden_key_update(net: Net, one_of_each: Loop) -> None:
    """``poll`` does not show that there is something to drop."""

    async def main() -> None:
        link = scripted(
            net, Keeper(on_data=lambda transport: transport.pause_reading()), buffers=8192
        )
        link.peer.send_raw(link.peer.seal(DATA, b"x") + link.peer.seal_key_update())
        await until(lambda: link.diary.data == b"x")
        await close_unread(net, link, 300_000)

    one_of_each.run(main)


def test_close_in_data_received(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        def reply(transport: Any) -> None:
            transport.write(b"answer")
            transport.close()

        link = scripted(net, Keeper(on_data=reply))
        link.peer.send_raw(link.peer.seal(DATA, b"question") + link.peer.seal(DATA, b"more"))
        assert await link.hear_data() == b"answer"
        await until(lambda: link.diary.lost)
        assert link.diary.deliveries == 1

    one_of_each.run(main)


@pytest.mark.parametrize("how", ["close", "abort"])
def test_end_in_connection_made(net: Net, loop: Loop, how: str) -> None:
    """Nothing of the connection stays with the loop; the next one gets the same descriptor, and must work."""

    async def main() -> None:
        keepers = []
        for _ in range(3):
            link = await connect(
                net, loop, protocol=Keeper(on_made=lambda transport: getattr(transport, how)())
            )
            keepers.append(link.protocol)
            link.theirs.close()
            await until(lambda link=link: link.diary.lost)  # type: ignore[misc]  # mypy infers no lambda with a default
            assert link.diary.events == ["made", "lost"]
        link = await connect(net, loop)
        link.theirs.sendall(b"works")
        await until(lambda: link.diary.data == b"works")
        link.transport.abort()
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_abort_drops_what_waits(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096)
        link.transport.write(bytes(1_000_000))
        assert link.transport.get_write_buffer_size() > 0
        link.transport.abort()
        assert link.transport.get_write_buffer_size() == 0
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

    one_of_each.run(main)


def test_close_then_abort(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096)
        link.transport.write(bytes(1_000_000))
        link.transport.close()
        await turns()
        assert not link.diary.lost
        link.transport.abort()
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

    one_of_each.run(main)


@pytest.mark.parametrize("waiting", [1_000_000, 30_000], ids=["in-queue", "in-layer"])
def test_close_in_time(net: Net, one_of_each: Loop, waiting: int) -> None:
    """A peer that takes nothing does not hold us longer than ``ssl_shutdown_timeout``."""

    async def main() -> None:
        link = scripted(net, buffers=4096, shutdown_timeout=0.2)
        link.transport.write(bytes(waiting))
        elapsed = timed()
        link.transport.close()
        await until(lambda: link.diary.lost)
        assert 0.1 < elapsed() < 5
        assert isinstance(link.diary.error, TimeoutError)
        assert "SSL shutdown timed out" in str(link.diary.error)

    one_of_each.run(main)


def test_shutdown_timeout_of_a_real_connection(net: Net, loop: Loop) -> None:
    async def main() -> None:
        link = await connect(net, loop, buffers=4096, ssl_shutdown_timeout=0.2)
        link.transport.write(bytes(1_000_000))
        link.transport.close()
        await until(lambda: link.diary.lost)
        assert isinstance(link.diary.error, TimeoutError)

    loop.run(main)


# --- nothing is left -------------------------------------------------------------------------------------------------


def test_unclosed_transport_warns(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        protocol = Keeper()
        scripted(net, protocol).peer.sock.close()
        protocol.transport.pause_reading()

        def forget() -> None:
            protocol.transport = None
            gc.collect()

        await turns()
        with pytest.warns(ResourceWarning, match="unclosed transport"):
            forget()

    with warnings.catch_warnings():
        one_of_each.run(main)


def test_loop_that_ends_before_its_connections(net: Net, loop: Loop) -> None:
    """A program that calls ``close`` and ends: no exception, no task."""

    async def main() -> None:
        link = await connect(net, loop, buffers=4096)
        link.transport.write(bytes(1_000_000))
        link.transport.close()

    loop.run(main)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_many_connections_at_once(net: Net, one_of_each: Loop) -> None:
    """None of them is told what is another's."""

    async def main() -> None:
        links = [scripted(net) for _ in range(40)]
        for number, link in enumerate(links):
            link.transport.write(b"%d" % number)
            match number % 4:
                case 0:
                    link.transport.close()
                case 1:
                    link.peer.send_alert()
                case 2:
                    link.peer.reset()
                case _:
                    link.peer.end()
        await ended(link.protocol for link in links)
        for number, link in enumerate(links):
            if number % 4 == 2:
                assert isinstance(link.diary.error, OSError)
                assert link.diary.error.errno in (errno.ECONNRESET, errno.EPIPE)
            else:
                assert link.diary.error is None
                assert (await link.hear_all())[0] == (23, b"%d" % number)

    one_of_each.run(main)
