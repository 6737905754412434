"""TCP takes nothing more of ours, and something comes: reading never waits for sending, and what was accepted arrives."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Final, final

import pytest

from ktls import AlertReceived, KeyLimitError, RemoteProtocolError, TruncatedError
from ktls.protocol.enums import AlertDescription, ContentType
from ktls.testing.peers import pattern

from ..peers.parties import Task, same
from ..peers.scripted import UPDATE, UPDATE_REQUESTED
from .craft import DATA, flipped
from .matrix import behaviour
from .outcomes import fin, reset, short_timeout
from .scene import Scene

_GROUP: Final = "While TCP takes nothing more of ours"
_CLOSE: Final = AlertDescription.CLOSE_NOTIFY
#: More than the buffers hold.
_ALL: Final = pattern(2**20)
_BUFFER: Final = 2**15
#: What user space seals at once: so much more than the buffers hold that it can't get rid of it.
_PIECE: Final = 2**17


@final
@dataclass
class _Stream:
    """``_ALL`` on its way through a connection of which the peer reads nothing yet."""

    scene: Scene
    sent: int = 0
    received: bytearray = field(default_factory=bytearray)

    @classmethod
    def stuck(cls, scene: Scene) -> _Stream:
        """Send until nothing more goes."""
        for sock in (scene.tls, scene.peer.sock):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self = cls(scene)
        self.sent += scene.tls.send(_ALL[:1000])
        with short_timeout(scene.tls), pytest.raises(TimeoutError):
            self.send()
        assert 0 < self.sent < len(_ALL)
        return self

    def send(self) -> None:
        """Send what is left. After a timeout, as after one of OpenSSL's, the same data comes next."""
        while self.sent < len(_ALL):
            self.sent += self.scene.tls.send(_ALL[self.sent : self.sent + _PIECE])

    def drain(self, *, count: int | None = None) -> tuple[int, bytes] | None:
        """Let the peer read data, all that comes or ``count`` bytes; return the record behind it, None at FIN."""
        while count is None or len(self.received) < count:
            record = self.scene.peer.read()
            if record is None or record[0] != ContentType.APPLICATION_DATA:
                return record
            self.received += record[1]
        return None

    def drain_what_comes(self) -> None:
        """Let the peer read to the end, whatever that is: authentic data, no alert."""
        try:
            assert self.drain() is None
        except AssertionError as error:
            assert "FIN inside a record" in str(error)  # noqa: PT017  # the kernel threw its queue away
        assert same(bytes(self.received), _ALL[: len(self.received)])

    def goes_on(self) -> None:
        """The peer reads, we send the rest, and everything arrives."""
        with Task(self.send) as sending:
            self.drain(count=len(_ALL))
        sending.result()
        assert same(bytes(self.received), _ALL)

    def ends_with(self, alert: AlertDescription | None) -> None:
        """We close while the peer reads: it gets all that was accepted, then the alert, then FIN."""
        with Task(self.scene.tls.close) as closing:
            record = self.drain()
            if alert is not None:
                level = 1 if alert == _CLOSE else 2
                assert record == (ContentType.ALERT, bytes((level, alert)))
                record = self.scene.peer.read()
            assert record is None
        closing.result()
        # What was accepted, and may be a piece of which we were not told yet.
        assert len(self.received) >= self.sent
        assert same(bytes(self.received), _ALL[: len(self.received)])


@behaviour(_GROUP, "reads nothing, then everything", "`TimeoutError`; then all of it arrives")
def test_silence(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    for _ in range(2):
        with short_timeout(scene.tls), pytest.raises(TimeoutError):
            stream.send()
    scene.peer.send_data(b"by the way")
    scene.reads(b"by the way")
    stream.goes_on()
    scene.both_ways()
    scene.closes()


@behaviour(_GROUP, "FIN without close_notify", "`TruncatedError`; then all of ours arrives")
def test_fin(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    scene.peer.send_data(b"last")
    fin(scene)
    scene.reads(b"last")
    for _ in range(2):
        with pytest.raises(TruncatedError):
            scene.tls.recv(10)
    stream.goes_on()
    scene.closes()


@behaviour(_GROUP, "RST", "`ConnectionError` in both directions, for ever")
def test_reset(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    reset(scene)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            scene.tls.recv(10)
        with pytest.raises(ConnectionError):
            stream.send()
    scene.tls.close()


@behaviour(_GROUP, "close_notify", "a clean end; then all of ours arrives", versions=("1.3",))
def test_close_notify(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    scene.peer.close_notify()
    for _ in range(2):
        assert scene.tls.recv(10) == b""
    stream.goes_on()
    scene.closes()


@behaviour(
    _GROUP, "close_notify", "a clean end; then what was accepted, and the answer", versions=("1.2",)
)
def test_close_notify_12(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    scene.peer.close_notify()
    for _ in range(2):
        assert scene.tls.recv(10) == b""
    stream.ends_with(_CLOSE)


@behaviour(_GROUP, "a fatal alert", "`AlertReceived` in both directions; nobody waits for the rest")
def test_alert(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    scene.peer.send_alert(AlertDescription.INTERNAL_ERROR)
    for _ in range(2):
        with pytest.raises(AlertReceived):
            scene.tls.recv(10)
        with pytest.raises(AlertReceived):
            stream.send()
    with Task(scene.tls.close) as closing:
        stream.drain_what_comes()
    closing.result()


@behaviour(_GROUP, "a bad record", "bad_record_mac, behind what was accepted")
def test_bad_record(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    scene.may_fail_to_decrypt()
    scene.peer.send_raw(flipped(scene.peer.seal(DATA, b"bad"), -1))
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            scene.tls.recv(10)
        with pytest.raises(RemoteProtocolError):
            stream.send()
    stream.ends_with(AlertDescription.BAD_RECORD_MAC)


_NO_ANSWER: Final = "This kernel can't change our key, which the peer demanded: our side ends with close_notify and `KeyLimitError`."


@behaviour(
    _GROUP,
    "updates its key, asks for ours, and sends data",
    "the data is read; our KeyUpdate comes behind what was accepted",
    versions=("1.3",),
)
def test_update(scene: Scene) -> None:
    stream = _Stream.stuck(scene)
    scene.peer.send_update(UPDATE_REQUESTED)
    scene.peer.send_data(b"new")
    if not scene.can_change_rx:
        scene.cannot_follow()
        stream.ends_with(_CLOSE)
        return
    scene.reads(b"new")
    if not scene.can_change_tx:
        scene.differs(_NO_ANSWER)
        with Task(stream.drain) as reading, pytest.raises(KeyLimitError):
            stream.send()
        assert reading.result() == (ContentType.ALERT, bytes((1, _CLOSE)))
        assert same(bytes(stream.received), _ALL[: stream.sent])
        scene.tls.close()
        scene.peer.expect_fin()
        return
    accepted = stream.sent
    with Task(stream.send) as sending:
        assert stream.drain() == (ContentType.HANDSHAKE, UPDATE)
        assert accepted <= len(stream.received) < len(_ALL)
        scene.peer.change_rx_key()
        stream.drain(count=len(_ALL))
    sending.result()
    assert same(bytes(stream.received), _ALL)
    scene.both_ways()
    scene.closes()
