"""One direction ends or stands still, and the other goes on: our own end, silence, a full TCP buffer."""

from __future__ import annotations

import socket
from typing import Final

import pytest

from ktls import (
    AlertReceived,
    KeyLimitError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from ktls.protocol.enums import AlertDescription, ContentType

from ..peers.scripted import UPDATE, UPDATE_REQUESTED
from .craft import DATA, flipped
from .matrix import behaviour
from .outcomes import fin, reset, sends, short_timeout
from .scene import Scene

_CLOSE: Final = AlertDescription.CLOSE_NOTIFY
_AGAIN: Final = 3

# --- our end came first --------------------------------------------------------------------------------------------

_OURS: Final = "After our close_notify"


def _we_close(scene: Scene) -> None:
    scene.tls.sendall(b"all of it")
    scene.tls.shutdown(socket.SHUT_WR)
    scene.peer.expect_data(b"all of it")
    scene.peer.expect_alert(_CLOSE)
    scene.peer.expect_fin()


def _nothing_more_goes_out(scene: Scene) -> None:
    for _ in range(_AGAIN):
        with pytest.raises(LocalProtocolError):
            scene.tls.send(b"no")


def _nothing_more_comes(scene: Scene) -> None:
    """A clean end, however often it is asked for."""
    for _ in range(_AGAIN):
        assert scene.tls.recv(10) == b""


def _reading_raises(scene: Scene, error: type[BaseException]) -> None:
    for _ in range(_AGAIN):
        with pytest.raises(error):
            scene.tls.recv(10)


def _we_close_the_rest(scene: Scene) -> None:
    scene.tls.close()
    scene.peer.expect_fin()


@behaviour(_OURS, "goes on sending, then closes", "everything is read, then a clean end")
def test_peer_goes_on(scene: Scene) -> None:
    _we_close(scene)
    for text in (b"still", b"yours", b"x" * 2**14):
        scene.peer.send_data(text)
        scene.reads(text)
        _nothing_more_goes_out(scene)
    scene.peer.close_notify()
    fin(scene)
    _nothing_more_comes(scene)
    _nothing_more_goes_out(scene)
    _we_close_the_rest(scene)


@behaviour(
    _OURS,
    "updates its key and asks for ours",
    "follows; nothing is answered",
    versions=("1.3",),
)
def test_update_after_our_end(scene: Scene) -> None:
    _we_close(scene)
    scene.peer.send_update(UPDATE_REQUESTED)
    scene.peer.send_data(b"new")
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    scene.reads(b"new")
    scene.peer.close_notify()
    assert scene.tls.recv(10) == b""
    _we_close_the_rest(scene)


@behaviour(_OURS, "FIN without close_notify", "`TruncatedError`")
def test_fin_after_our_end(scene: Scene) -> None:
    _we_close(scene)
    scene.peer.send_data(b"some")
    fin(scene)
    scene.reads(b"some")
    _reading_raises(scene, TruncatedError)
    _nothing_more_goes_out(scene)
    _we_close_the_rest(scene)


@behaviour(_OURS, "RST", "what came is read, then `ConnectionResetError` for ever")
def test_reset_after_our_end(scene: Scene) -> None:
    _we_close(scene)
    scene.peer.send_data(b"some")
    reset(scene)
    scene.reads(b"some")
    _reading_raises(scene, ConnectionResetError)
    scene.tls.close()


@behaviour(_OURS, "a fatal alert", "`AlertReceived`")
def test_alert_after_our_end(scene: Scene) -> None:
    _we_close(scene)
    scene.peer.send_alert(AlertDescription.INTERNAL_ERROR)
    _reading_raises(scene, AlertReceived)
    _we_close_the_rest(scene)


@behaviour(
    _OURS, "a bad record", "`bad_record_mac`, locally: nothing more is sent after close_notify"
)
def test_bad_record_after_our_end(scene: Scene) -> None:
    _we_close(scene)
    scene.may_fail_to_decrypt()
    scene.peer.send_raw(flipped(scene.peer.seal(DATA, b"bad"), -1))
    for _ in range(_AGAIN):
        with pytest.raises(RemoteProtocolError) as caught:
            scene.tls.recv(10)
        assert caught.value.alert is AlertDescription.BAD_RECORD_MAC
    _we_close_the_rest(scene)


@behaviour(_OURS, "close_notify that crossed it", "a clean end of both directions")
def test_crossing(scene: Scene) -> None:
    scene.peer.close_notify()
    _we_close(scene)
    _nothing_more_comes(scene)
    _we_close_the_rest(scene)


# --- the peer's end came first -------------------------------------------------------------------------------------

_THEIRS: Final = "After the peer's close_notify"


@behaviour(
    _THEIRS,
    "half close: reads on after close_notify and FIN",
    "we go on sending",
    versions=("1.3",),
)
def test_we_go_on(scene: Scene) -> None:
    scene.peer.close_notify()
    fin(scene)
    assert scene.tls.recv(10) == b""
    for text in (b"mine", b"x" * 2**14, b"mine"):
        sends(scene, text)
        assert scene.tls.recv(10) == b""
    scene.closes()


@behaviour(
    _THEIRS,
    "asked for our key before it, and reads on",
    "the KeyUpdate, then data under the new key",
    versions=("1.3",),
)
def test_owed_update(scene: Scene) -> None:
    update = scene.peer.sealed_update(UPDATE_REQUESTED)
    scene.peer.send_raw(update + scene.peer.seal(ContentType.ALERT, bytes((1, 0))))
    fin(scene)
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    assert scene.tls.recv(10) == b""
    if not scene.can_change_tx:
        scene.differs(_NO_ANSWER)
        for _ in range(_AGAIN):
            with pytest.raises(KeyLimitError):
                scene.tls.send(b"under which key?")
        scene.closes()
        return
    scene.peer.expect_update()
    sends(scene)
    scene.closes()


_NO_ANSWER: Final = "This kernel can't change our key, which the peer demanded: our side ends with close_notify and `KeyLimitError`."


@behaviour(
    _THEIRS,
    "owed us a KeyUpdate, and reads on",
    "a clean end; we go on sending",
    versions=("1.3",),
)
def test_update_never_answered(scene: Scene) -> None:
    if not scene.may_update():
        return
    scene.tls.refresh_traffic_keys(request_peer=True)
    scene.peer.expect_update(UPDATE_REQUESTED)
    scene.peer.close_notify()
    _nothing_more_comes(scene)
    sends(scene)
    scene.tls.refresh_traffic_keys(request_peer=True)
    assert scene.tls.key_usage.tx.generation == 2
    # The first request is still open, and there is to be one at most.
    scene.peer.expect_update(UPDATE)
    sends(scene)
    scene.closes()


@behaviour(_THEIRS, "RST", "a clean end; sending raises `ConnectionError`, for ever")
def test_reset_after_their_end(scene: Scene) -> None:
    scene.peer.send_data(b"last")
    scene.peer.close_notify()
    reset(scene)
    scene.reads(b"last")
    _nothing_more_comes(scene)
    for _ in range(_AGAIN):
        with pytest.raises(ConnectionError):
            scene.tls.send(b"no")
        assert scene.tls.recv(10) == b""
    scene.tls.close()


# --- silence -------------------------------------------------------------------------------------------------------

_SILENCE: Final = "Silence"
_TIMEOUT: Final = "`TimeoutError`, each time; goes on when it does"


def _nothing_comes(scene: Scene) -> None:
    with short_timeout(scene.tls):
        for _ in range(2):
            with pytest.raises(TimeoutError):
                scene.tls.recv(10)


@behaviour(_SILENCE, "stops at every point of a record", _TIMEOUT)
def test_silence_inside_records(scene: Scene) -> None:
    for cut in (0, 1, 2, 3, 4, 5, 6, 12, 13, 14, -16, -1):
        record = scene.peer.seal(DATA, b"x" * 50)
        cut %= len(record)
        scene.peer.send_raw(record[:cut])
        _nothing_comes(scene)
        sends(scene)
        scene.peer.send_raw(record[cut:])
        scene.reads(b"x" * 50)
    scene.both_ways()


@behaviour(_SILENCE, "stops inside a handshake message, and after it", _TIMEOUT, versions=("1.3",))
def test_silence_inside_an_update(scene: Scene) -> None:
    for byte in range(len(UPDATE)):
        scene.peer.send_handshake(UPDATE[byte : byte + 1])
        if byte < len(UPDATE) - 1:
            _nothing_comes(scene)
            sends(scene)
    scene.peer.change_tx_key()
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    _nothing_comes(scene)
    scene.both_ways()


@behaviour(
    _SILENCE,
    "never says anything more, and we close",
    "close_notify and FIN; nothing is waited for",
)
def test_silence_and_we_close(scene: Scene) -> None:
    record = scene.peer.seal(DATA, b"never whole")
    scene.peer.send_raw(record[:20])
    _nothing_comes(scene)
    scene.closes()
