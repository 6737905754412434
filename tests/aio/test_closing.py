"""How connections end: in order and whole, in time, or with the right error; once, and without leaving anything."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import socket
import ssl
import sys
import termios
import warnings
from typing import Any

import pytest

from ktls.aio import KTLSTransport
from ktls.protocol.enums import AlertDescription, ContentType
from ktls.protocol.errors import AlertReceived, RemoteProtocolError, TruncatedError
from ktls.testing import RecordPeer

from ..sockets.helpers import Case, Net, matrix, pattern, read_all
from ..support import TLS12, TLS13
from .helpers import (
    CLOSE_NOTIFY,
    TLS12_SUITE,
    Keeper,
    Loop,
    connect,
    ended,
    result,
    scripted,
    timed,
    turns,
    until,
)

DATA = ContentType.APPLICATION_DATA


def slow_reader(peer: RecordPeer) -> bytes:
    """Receive data to the end, which must be close_notify."""
    data = bytearray()
    while (message := peer.read_message()) is not None:
        if message.content_type == ContentType.ALERT:
            assert message.fragment == CLOSE_NOTIFY
            return bytes(data)
        data += message.fragment
    raise AssertionError("TCP ended without close_notify")


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


def test_what_comes_while_we_close_is_dropped(net: Net, one_of_each: Loop) -> None:
    """A peer that writes before it reads would never take our data; and what is unread would make TCP reset the connection."""

    async def main() -> None:
        link = scripted(net, buffers=8192)
        data = pattern(300_000)

        def write_then_read() -> bytes:
            link.peer.send_data(bytes(500_000))
            return slow_reader(link.peer)

        link.transport.write(data)
        link.transport.close()
        assert await result(net.spawn(write_then_read)) == data
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "lost"]
        assert link.diary.error is None

    one_of_each.run(main)


def test_close_while_paused_with_a_hidden_key_update(net: Net, one_of_each: Loop) -> None:
    """``poll`` does not show that there is something to drop."""

    async def main() -> None:
        link = scripted(
            net, Keeper(on_data=lambda transport: transport.pause_reading()), buffers=8192
        )
        link.peer.send_raw(link.peer.seal(DATA, b"x") + link.peer.seal_key_update())
        await until(lambda: link.diary.data == b"x")
        data = pattern(300_000)

        def write_then_read() -> bytes:
            link.peer.send_data(bytes(300_000))
            return slow_reader(link.peer)

        link.transport.write(data)
        link.transport.close()
        assert await result(net.spawn(write_then_read)) == data
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

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


# --- the peer ends it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_notify", [True, False], ids=["close_notify", "fin"])
@pytest.mark.parametrize("half", matrix(versions=(TLS13,), peers=("ktls",)), ids=str)
def test_peer_ends(net: Net, loop: Loop, half: Case, with_notify: bool) -> None:
    """What is queued is still sent. Our goodbye goes only to a peer that has said one."""
    data = pattern(200_000)

    async def main() -> None:
        link = await connect(net, loop, half, buffers=8192)
        link.transport.write(data)
        if with_notify:
            link.theirs.shutdown(socket.SHUT_WR)
        else:
            socket.socket.shutdown(link.theirs, socket.SHUT_WR)
        received = await result(net.spawn(read_to_the_end, link.theirs))
        assert received == (data, with_notify)
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "eof", "lost"]
        assert link.diary.error is None

    loop.run(main)


def read_to_the_end(sock: Any) -> tuple[bytes, bool]:
    """Receive until the end; return the data, and whether the end was in order."""
    data = bytearray()
    try:
        while chunk := sock.recv(65536):
            data += chunk
    except ssl.SSLEOFError:
        return bytes(data), False
    return bytes(data), True


@pytest.mark.parametrize("waiting", [True, False])
def test_peer_ends_in_tls12(net: Net, one_of_each: Loop, waiting: bool) -> None:
    """close_notify ends both directions there: we answer with ours at once, and what waits is not sent, which the protocol is told."""

    async def main() -> None:
        link = scripted(net, Keeper(keep_open=True), suite=TLS12_SUITE, buffers=4096)
        link.transport.write(bytes(1_000_000) if waiting else b"x")
        link.peer.send_alert()
        records = await link.hear_all()
        assert records[-1] == (21, CLOSE_NOTIFY)
        await until(lambda: link.diary.lost)
        if waiting:
            assert isinstance(link.diary.error, ConnectionResetError)
        else:
            assert link.diary.error is None

    one_of_each.run(main)


def test_answer_in_eof_received(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        class Answering(Keeper):
            def eof_received(self) -> bool:
                self.transport.write(b"answer")
                return super().eof_received()

        link = scripted(net, Answering())
        link.peer.send_alert()
        assert await link.hear_data() == b"answer"
        await until(lambda: link.diary.lost)
        assert link.diary.error is None
        link = scripted(net, Answering(), suite=TLS12_SUITE)
        link.peer.send_alert()
        assert await link.hear_data() == b""
        await until(lambda: link.diary.lost)
        assert isinstance(link.diary.error, ConnectionResetError)

    one_of_each.run(main)


def test_raw_end_gets_no_goodbye(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.transport.write(b"x")
        link.peer.end()
        assert await link.hear_all() == [(23, b"x")]
        await until(lambda: link.diary.lost)
        assert link.diary.error is None
        assert link.transport.get_extra_info("ktls").truncated

    one_of_each.run(main)


def test_raw_end_that_is_refused(net: Net, loop: Loop) -> None:
    async def main() -> None:
        link = await connect(net, loop, suppress_ragged_eofs=False)
        socket.socket.shutdown(link.theirs, socket.SHUT_WR)
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "lost"]
        assert isinstance(link.diary.error, TruncatedError)

    loop.run(main)


def reset_points() -> list[str]:
    return ["idle", "paused", "writing", "closing", "half closed", "reading"]


@pytest.mark.parametrize("when", reset_points())
def test_reset(net: Net, one_of_each: Loop, when: str) -> None:
    """At every point: ``connection_lost`` once, with the error if we did not end it ourselves; nothing spins."""

    async def main() -> None:
        link = scripted(net, buffers=4096)
        if when in ("writing", "closing"):
            link.transport.write(bytes(1_000_000))
        if when == "closing":
            link.transport.close()
        if when == "half closed":
            link.transport.write_eof()
        if when == "paused":
            link.transport.pause_reading()
        if when == "reading":
            link.peer.send_raw(link.peer.seal(DATA, bytes(1000))[:500])
        await turns()
        link.peer.reset()
        await turns()
        if when == "paused":
            assert not link.diary.lost
            link.transport.resume_reading()
        await until(lambda: link.diary.lost)
        assert isinstance(link.diary.error, ConnectionError)
        assert link.diary.events[-1] == "lost"
        assert link.diary.events.count("lost") == 1
        assert "eof" not in link.diary.events

    one_of_each.run(main)


def test_reset_while_the_goodbye_is_under_way(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096)
        link.transport.write(bytes(12_000))
        link.transport.close()
        await turns()
        link.peer.reset()
        await until(lambda: link.diary.lost)
        assert link.diary.error is None or isinstance(link.diary.error, ConnectionError)

    one_of_each.run(main)


# --- half close ------------------------------------------------------------------------------------------------------


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


# --- bad peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "closed"])
def test_fatal_alert(net: Net, one_of_each: Loop, keep: bool) -> None:
    async def main() -> None:
        link = scripted(net, Keeper(keep_open=keep))
        link.peer.send_data(b"x")
        link.peer.send_alert(AlertDescription.ACCESS_DENIED)
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "data", "lost"]
        assert isinstance(link.diary.error, AlertReceived)
        assert link.diary.error.description == AlertDescription.ACCESS_DENIED

    one_of_each.run(main)


BAD: dict[str, Any] = {
    "tag": (lambda peer: corrupt(peer.seal(DATA, b"good")), AlertDescription.BAD_RECORD_MAC),
    "header": (lambda peer: b"GET / HTTP/1.1\r\n\r\n", None),
    "long": (lambda peer: b"\x17\x03\x03\x7f\xff" + bytes(100), AlertDescription.RECORD_OVERFLOW),
    "short": (lambda peer: b"\x17\x03\x03\x00\x03abc", None),
    "message": (
        lambda peer: peer.seal(ContentType.HANDSHAKE, b"\x02\x00\x00\x00"),
        AlertDescription.UNEXPECTED_MESSAGE,
    ),
    "type": (lambda peer: peer.seal(99, b"?"), AlertDescription.UNEXPECTED_MESSAGE),
}


def corrupt(record: bytes) -> bytes:
    return record[:-1] + bytes((record[-1] ^ 1,))


@pytest.mark.parametrize("what", BAD)
def test_bad_record(net: Net, one_of_each: Loop, what: str) -> None:
    """Good data in front is delivered, the peer gets the alert, the protocol the error, and nobody spins."""
    make, alert = BAD[what]

    async def main() -> None:
        link = scripted(net)
        link.peer.send_raw(link.peer.seal(DATA, b"good") + make(link.peer))
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "data", "lost"]
        assert link.diary.data == b"good"
        assert isinstance(link.diary.error, RemoteProtocolError)
        (kind, fragment), *rest = await link.hear_all()
        assert (kind, fragment[0], rest) == (21, 2, [])
        assert fragment[1] == link.diary.error.alert
        assert alert is None or fragment[1] == alert

    one_of_each.run(main)


def test_no_spinning_after_a_bad_record(
    net: Net, one_of_each: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record keeps the socket readable for ever; while the alert waits for room, the loop must have rest."""
    calls = 0

    def counting(original: Any) -> Any:
        def callback(transport: Any) -> None:
            nonlocal calls
            calls += 1
            original(transport)

        return callback

    for name in ("_on_readable", "_discard", "_on_writable"):
        monkeypatch.setattr(KTLSTransport, name, counting(getattr(KTLSTransport, name)))

    async def main() -> None:
        link = scripted(net, buffers=4096)
        link.transport.write(bytes(100_000))
        link.peer.send_raw(corrupt(link.peer.seal(DATA, b"bad")))
        await until(link.transport.is_closing)
        before = calls
        await turns(300)
        assert calls - before < 10
        link.transport.abort()
        await until(lambda: link.diary.lost)

    one_of_each.run(main)


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
