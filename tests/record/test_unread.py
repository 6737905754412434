"""What comes when nobody reads any more: the kernel looks at it all the same, and what it finds must stop nobody who sends."""

from __future__ import annotations

import select
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.enums import AlertDescription, ContentType
from ktls.protocol.errors import LocalProtocolError, RemoteProtocolError
from ktls.protocol.messages import build_alert
from ktls.protocol.states import InboundPlainMessage
from ktls.record.driver import Driver
from ktls.record.handover import restore_driver, take_driver
from ktls.testing import eventually, fill_up, wait_readable

from .rig import Layer, both_versions, rig

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.protocol.suites import CipherSuite

pytestmark = pytest.mark.kernel

#: By its length and by its version no record, so that the kernel says so when it has the header.
TOO_LONG = b"\x17\x03\x03\xff\xff" + bytes(8)
PLAIN_TEXT = b"250 back to plain text\r\n"


@both_versions
@pytest.mark.parametrize("behind", [TOO_LONG, PLAIN_TEXT], ids=["too long", "plain text"])
def test_alert_goes_out_although_something_worse_is_behind(
    suite: CipherSuite, behind: bytes
) -> None:
    """The kernel finds the bad header when the record in front of it is taken; nobody ever reads that error."""
    with rig("kernel", suite=suite) as r:
        r.peer.send_raw(r.peer.seal(ContentType.ALERT, b"\x02") + behind)
        assert wait_readable(r.sock)
        with pytest.raises(RemoteProtocolError, match="alert record of 1 bytes"):
            r.driver.recv_into(bytearray(9))
        decode_error = build_alert(AlertDescription.DECODE_ERROR)
        assert r.peer.read_message() == InboundPlainMessage(ContentType.ALERT, decode_error)
        with pytest.raises(RemoteProtocolError, match="alert record of 1 bytes"):
            r.driver.send(b"x")


@pytest.mark.parametrize("behind", [TOO_LONG, PLAIN_TEXT], ids=["too long", "plain text"])
def test_what_follows_close_notify_stops_no_sender(behind: bytes) -> None:
    """TLS 1.3 closes each direction on its own; in ours there is still something to say."""
    with rig("kernel") as r:
        r.peer.send_alert()
        assert wait_readable(r.sock)
        assert r.driver.recv_into(bytearray(9)) == 0
        r.peer.send_raw(behind)
        # The error is where a send would find it.
        eventually(lambda: _has_error(r.sock), "the kernel looks at what came")
        r.peer.send_raw(behind)
        assert r.driver.send(b"data") == 4
        assert r.driver.send_vector([b"more ", b"data"]) == 9
        r.driver.close_notify()
        assert r.peer.read_data(13) == b"datamore data"
        closing = build_alert(AlertDescription.CLOSE_NOTIFY)
        assert r.peer.read_message() == InboundPlainMessage(ContentType.ALERT, closing)


@pytest.mark.parametrize("behind", [TOO_LONG, PLAIN_TEXT], ids=["too long", "plain text"])
def test_what_follows_close_notify_stops_no_successor(behind: bytes) -> None:
    """As above, where the driver's state was carried in between."""
    with rig("kernel") as r:
        driver = Driver(r.connection, r.sender.inner, r.driver.receiver)
        r.peer.send_alert()
        assert wait_readable(r.sock)
        assert driver.recv_into(bytearray(9)) == 0
        driver = restore_driver(r.sock, take_driver(driver))
        r.peer.send_raw(behind)
        eventually(lambda: _has_error(r.sock), "the kernel looks at what came")
        assert driver.send(b"data") == 4
        assert r.peer.read_data(4) == b"data"


def _has_error(sock: socket.socket) -> bool:
    """Whether an error waits for whoever comes next."""
    poller = select.poll()
    poller.register(sock, 0)
    return bool(dict(poller.poll(0)).get(sock.fileno(), 0) & select.POLLERR)


def test_reset_is_still_told_to_a_sender_after_close_notify() -> None:
    """Only errors about records are forgotten."""
    with rig("kernel") as r:
        r.peer.send_alert()
        assert wait_readable(r.sock)
        assert r.driver.recv_into(bytearray(9)) == 0
        r.peer.reset()
        eventually(lambda: _has_error(r.sock), "the reset arrives")
        for _ in range(2):
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                r.driver.send(b"data")


@pytest.mark.parametrize("behind", [TOO_LONG, PLAIN_TEXT], ids=["too long", "plain text"])
def test_event_loop_hears_of_an_error_each_time(behind: bytes) -> None:
    """Also where reading went past the receiving half until then."""
    with rig("kernel") as r:
        driver = Driver(r.connection, r.driver.sender, r.driver.receiver, lock=threading.RLock())
        r.sock.setblocking(False)
        buffer = bytearray(100)
        for _ in range(2):
            r.peer.send_data(b"data")
            assert wait_readable(r.sock)
            assert driver.receiving.read_now(buffer) == 4
        assert driver.receiving.grant > 0
        r.peer.send_raw(behind)
        assert wait_readable(r.sock)
        for _ in range(3):
            with pytest.raises(RemoteProtocolError):
                driver.receiving.read_now(buffer)
        with pytest.raises(RemoteProtocolError):
            driver.send(b"x")
        with pytest.raises(LocalProtocolError):
            driver.refresh_traffic_keys()


@pytest.mark.parametrize("send", ["send", "send_vector", "refresh_traffic_keys"])
@pytest.mark.parametrize("tx", ["kernel", "userspace"])
@pytest.mark.rekey
def test_sender_that_is_told_first_leaves_nobody_waiting(tx: Layer, send: str) -> None:
    """The kernel tells it once. A reader who waits already, and who comes later, hear it all the same, and the peer gets the alert."""
    with rig(tx, "kernel") as r:
        driver = Driver(r.connection, r.sender.inner, r.driver.receiver)
        r.peer.send_raw(TOO_LONG)
        eventually(lambda: _has_error(r.sock), "the kernel looks at what came")
        calls: dict[str, Callable[[], object]] = {
            "send": lambda: driver.send(b"data"),
            "send_vector": lambda: driver.send_vector([b"da", b"ta"]),
            "refresh_traffic_keys": driver.refresh_traffic_keys,
        }
        for call in (calls[send], calls["send"]):
            with pytest.raises(RemoteProtocolError, match="too long"):
                call()
            with pytest.raises(RemoteProtocolError, match="too long"):
                driver.recv_into(bytearray(9))
        assert isinstance(driver.failure, RemoteProtocolError)
        if send != "refresh_traffic_keys":  # nothing of the data was accepted
            overflow = build_alert(AlertDescription.RECORD_OVERFLOW)
            assert r.peer.read_message() == InboundPlainMessage(ContentType.ALERT, overflow)


@pytest.mark.parametrize("push", ["flush", "run_owed"])
@pytest.mark.rekey
def test_whoever_pushes_out_what_waits_may_be_told_first(push: str) -> None:
    """A sender in user space holds what TCP had no room for. Whoever reads must not take the end of reading for the end of TCP."""
    with rig("userspace", "kernel", small=True) as r:
        driver = Driver(r.connection, r.sender.inner, r.driver.receiver)
        fill_up(lambda: driver.send(bytes(100_000), socket.MSG_DONTWAIT), r.sock)
        assert driver.unsent
        r.peer.send_raw(TOO_LONG)
        eventually(lambda: _has_error(r.sock), "the kernel looks at what came")
        if push == "flush":
            with pytest.raises(RemoteProtocolError, match="too long"):
                driver.flush(socket.MSG_DONTWAIT)
        else:
            driver.run_owed()
        for _ in range(2):
            with pytest.raises(RemoteProtocolError, match="too long"):
                driver.recv_into(bytearray(9))
        assert isinstance(driver.failure, RemoteProtocolError)
        assert driver.owes  # the alert is behind what waits
