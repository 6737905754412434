"""How the driver closes and fails: close_notify, alerts, truncation, errors of the network."""

from __future__ import annotations

import errno

import pytest

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import AlertDescription
from ktls.protocol.errors import (
    AlertReceived,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from ktls.protocol.messages import build_alert
from ktls.protocol.states import InboundPlainMessage

from .layers import TLS12
from .rig import (
    ALERT,
    CLOSE_NOTIFY,
    HANDSHAKE,
    Layer,
    Worker,
    again,
    anywhere,
    both,
    next_is_data,
    next_is_key_update,
    next_message,
    rig,
)


@anywhere
def test_tls12_close_is_answered_at_once(layer: Layer) -> None:
    with rig(layer, suite=TLS12) as r:
        r.peer.send_raw(r.peer.seal_data(b"last") + r.peer.seal(ALERT, b"\x01\x00"))
        assert r.read(4) == b"last"
        assert r.driver.recv_into(bytearray(9)) == 0
        assert r.driver.recv_into(bytearray(9)) == 0
        assert r.driver.peer_closed
        assert next_message(r) == CLOSE_NOTIFY
        with pytest.raises(LocalProtocolError):
            r.driver.send(b"x")


@anywhere
def test_tls13_close_is_of_one_direction(layer: Layer) -> None:
    with rig(layer) as r:
        r.peer.send_alert()
        assert r.driver.recv_into(bytearray(9)) == 0
        r.driver.send(b"more")
        next_is_data(r, b"more")
        for _ in range(3):
            r.driver.close_notify()
        assert next_message(r) == CLOSE_NOTIFY
        assert r.sender.calls.count("send_record") == 1
        with pytest.raises(LocalProtocolError):
            r.driver.send(b"x")


@anywhere
@pytest.mark.parametrize(
    ("record", "alert"),
    [
        ((HANDSHAKE, b"\x05\x00\x00\x00"), AlertDescription.UNEXPECTED_MESSAGE),
        ((HANDSHAKE, b"\x18\x00\x00\x01\x02"), AlertDescription.ILLEGAL_PARAMETER),
        ((HANDSHAKE, b"\x18\x00\x00\x01\x00\x04"), AlertDescription.UNEXPECTED_MESSAGE),
        ((HANDSHAKE, b"\x04\x00\x00\x01x"), AlertDescription.DECODE_ERROR),
        ((99, b"what?"), AlertDescription.UNEXPECTED_MESSAGE),
        ((ALERT, b"\x02"), AlertDescription.DECODE_ERROR),
    ],
)
def test_broken_rules_are_answered_with_an_alert(
    layer: Layer, record: tuple[int, bytes], alert: AlertDescription
) -> None:
    with rig(layer) as r:
        r.peer.send_raw(
            r.peer.seal_data(b"good") + r.peer.seal(*record) + r.peer.seal_data(b"never")
        )
        assert r.read(4) == b"good"
        for _ in range(3):
            with pytest.raises(RemoteProtocolError) as caught:
                r.read(1)
            assert caught.value.alert is alert
            with pytest.raises(RemoteProtocolError):
                r.driver.send(b"x")
        assert next_message(r) == InboundPlainMessage(ALERT, build_alert(alert))
        assert r.sender.calls.count("send_record") == 1


@anywhere
def test_bad_record_is_answered_with_an_alert(layer: Layer) -> None:
    with rig(layer) as r:
        good = r.peer.seal_data(b"good")
        bad = bytearray(r.peer.seal_data(b"evil"))
        bad[-1] ^= 1
        r.peer.send_raw(good + bytes(bad))
        assert r.read(4) == b"good"
        for _ in range(3):
            with pytest.raises(RemoteProtocolError) as caught:
                r.read(1)
            assert caught.value.alert is AlertDescription.BAD_RECORD_MAC
        expected = build_alert(AlertDescription.BAD_RECORD_MAC)
        assert next_message(r) == InboundPlainMessage(ALERT, expected)


@anywhere
def test_alert_that_blocks_goes_out_later(layer: Layer) -> None:
    with rig(layer) as r:
        r.sender.refuse("send_record", again(), 1)
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        r.driver.close_notify()
        alert = build_alert(AlertDescription.UNEXPECTED_MESSAGE)
        assert next_message(r) == InboundPlainMessage(ALERT, alert)
        r.peer.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            r.peer.read_record()


@anywhere
def test_sender_is_told_the_reason_at_any_moment(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of the failing: "the sending side is closed" would be a lie, and say that the connection goes on."""
    senders: list[Worker[int]] = []
    fail = KernelConnection.fail

    with rig(layer) as r:

        def fail_and_send(self: KernelConnection) -> None:
            fail(self)
            if not senders:
                senders.append(Worker(lambda: r.driver.send(b"x")))
                senders[0].join(0.2)

        monkeypatch.setattr(KernelConnection, "fail", fail_and_send)
        r.driver.send(b"first")
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        with pytest.raises(RemoteProtocolError):
            senders[0].result()


@both
def test_alert_stands_behind_an_owed_key_update(layer: Layer) -> None:
    """The queue keeps its order also when the connection fails."""
    with rig(layer) as r:
        r.sender.refuse("send_record", again(), 2)
        with pytest.raises(BlockingIOError):
            r.driver.refresh_traffic_keys()
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        r.driver.run_owed()
        next_is_key_update(r)
        alert = build_alert(AlertDescription.UNEXPECTED_MESSAGE)
        assert next_message(r) == InboundPlainMessage(ALERT, alert)


@anywhere
def test_no_alert_after_our_close_notify(layer: Layer) -> None:
    with rig(layer) as r:
        r.driver.close_notify()
        r.peer.send_record(99, b"what?")
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        assert next_message(r) == CLOSE_NOTIFY
        assert r.sender.calls.count("send_record") == 1


@anywhere
def test_received_alert_is_not_answered(layer: Layer) -> None:
    with rig(layer) as r:
        r.peer.send_alert(AlertDescription.INTERNAL_ERROR)
        for _ in range(2):
            with pytest.raises(AlertReceived) as caught:
                r.read(1)
            assert caught.value.description is AlertDescription.INTERNAL_ERROR
            with pytest.raises(AlertReceived):
                r.driver.send(b"x")
        assert "send_record" not in r.sender.calls


@anywhere
@pytest.mark.parametrize("cut", [0, 3, 30])
def test_truncated(layer: Layer, cut: int) -> None:
    with rig(layer) as r:
        r.peer.send_raw(r.peer.seal_data(b"data") + r.peer.seal_data(bytes(100))[:cut])
        r.peer.end()
        assert r.read(4) == b"data"
        for _ in range(3):
            with pytest.raises(TruncatedError):
                r.read(1)
        assert r.driver.send(b"more") == 4
        next_is_data(r, b"more")


@anywhere
def test_network_error_found_by_the_reader_ends_sending(layer: Layer) -> None:
    """Without this the kernel would take the records, and drop them."""
    with rig(layer, key_changes=True) as r:
        r.peer.reset()
        for _ in range(2):
            with pytest.raises(ConnectionError):
                r.read(1)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                r.driver.send(b"x")
            with pytest.raises(ConnectionError):
                r.driver.refresh_traffic_keys()
        with pytest.raises(ConnectionError):
            r.driver.close_notify()
        assert "send_record" not in r.sender.calls
        assert not r.driver.owes


@anywhere
def test_failed_send_leaves_nothing_owed(layer: Layer) -> None:
    """A waiting reader would spin on it."""
    with rig(layer, key_changes=True) as r:
        r.sender.refuse("send_record", BrokenPipeError(errno.EPIPE, "gone"))
        with pytest.raises(BrokenPipeError):
            r.driver.refresh_traffic_keys()
        assert not r.driver.owes
        with pytest.raises(BrokenPipeError):
            r.driver.send(b"x")
