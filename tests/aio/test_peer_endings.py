"""How the peer ends connections: each end is told once, with the right error, whatever we are doing."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import pytest

from ktls.aio import KTLSTransport
from ktls.protocol.enums import AlertDescription, ContentType
from ktls.protocol.errors import AlertReceived, RemoteProtocolError, TruncatedError

from ..sockets.helpers import Case, Net, matrix, pattern
from ..support import TLS13
from .helpers import (
    CLOSE_NOTIFY,
    TLS12_SUITE,
    Keeper,
    Loop,
    connect,
    result,
    scripted,
    turns,
    until,
)

DATA = ContentType.APPLICATION_DATA


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


@pytest.mark.parametrize("paused", [False, True], ids=["reading", "paused"])
def test_reset_while_only_this_process_holds_data(
    net: Net, one_of_each: Loop, paused: bool
) -> None:
    """Sealed in user space, and no write waits. Who does not read hears of the reset all the same, and the loop does not spin."""

    async def main() -> None:
        link = scripted(net, offload="userspace", buffers=8192)
        if paused:
            link.transport.pause_reading()
        while not link.transport.driver.unsent:
            link.transport.write(bytes(100))
        assert link.transport.get_write_buffer_size() == 0
        link.peer.reset()
        await until(lambda: link.diary.lost)
        assert isinstance(link.diary.error, ConnectionError)

    one_of_each.run(main)
