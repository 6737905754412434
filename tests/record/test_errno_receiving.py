"""What Linux says to who receives, row by row, and that our layers make the right thing of it; see ``test_errno_setup``."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.enums import AlertDescription
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.messages import build_alert
from ktls.protocol.states import InboundPlainMessage
from ktls.record.interface import ControlRecord
from ktls.record.linux import SOL_TLS, TLS_TX
from ktls.testing import eventually, made_up_keys, pattern, wait_readable
from ktls.testing.bench import reset_noticed

from .layers import TLS13
from .rig import (
    ALERT,
    DATA,
    HANDSHAKE,
    KEY_UPDATE,
    NO_WAIT,
    SPACE,
    TICKET,
    WARNING,
    both_versions,
    crypto_info,
    pipe,
    readable,
    receiving,
    refused,
    rig,
)

if TYPE_CHECKING:
    from ktls.protocol.suites import CipherSuite

pytestmark = pytest.mark.kernel


@both_versions
def test_eio_at_a_control_record(suite: CipherSuite) -> None:
    with receiving(suite) as (receiver, peer, sock):
        peer.send_record(ALERT, WARNING)
        for _ in range(2):
            with refused(errno.EIO):
                sock.recv(10)
            with pytest.raises(ControlRecord):
                receiver.recv_into(bytearray(10))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert receiver.read_record() == InboundPlainMessage(ALERT, WARNING)


@both_versions
def test_einval_at_splice_of_a_control_record(suite: CipherSuite) -> None:
    with receiving(suite) as (receiver, peer, sock), pipe() as (reads, writes):
        peer.send_raw(peer.seal(ALERT, WARNING) + peer.seal_data(b"data"))
        with refused(errno.EINVAL):
            os.splice(sock.fileno(), writes, 100)
        with pytest.raises(ControlRecord):
            receiver.splice(writes, 100)
        assert receiver.read_record() == InboundPlainMessage(ALERT, WARNING)
        assert receiver.splice(writes, 100) == 4
        assert os.read(reads, 9) == b"data"


@pytest.mark.rekey
def test_ekeyexpired_after_a_key_update() -> None:
    with receiving() as (receiver, peer, sock):
        peer.send_raw(peer.seal_key_update() + peer.seal_data(b"new"))
        assert receiver.read_record() == InboundPlainMessage(HANDSHAKE, KEY_UPDATE)
        with refused(errno.EKEYEXPIRED), pipe() as (_, writes):
            os.splice(sock.fileno(), writes, 10)
        for flags in (0, socket.MSG_PEEK):
            with refused(errno.EKEYEXPIRED):
                sock.recv(10, flags)
        assert not readable(sock) & select.POLLIN
        receiver.install(made_up_keys(TLS13, "peer", 1))
        assert readable(sock) & select.POLLIN
        buffer = bytearray(9)
        assert receiver.recv_into(buffer) == 3


@pytest.mark.rekey
def test_ekeyexpired_when_somebody_else_read_the_key_update() -> None:
    """Another holder of the descriptor: we can't know the key, and say so for ever."""
    with receiving() as (receiver, peer, sock):
        peer.send_raw(peer.seal_key_update() + peer.seal_data(b"new"))
        sock.recvmsg(100, SPACE)
        for _ in range(2):
            with pytest.raises(RemoteProtocolError, match="another holder"):
                receiver.recv_into(bytearray(9))


@pytest.mark.rekey
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_ekeyexpired_key_update_split_over_two_records(cut: int) -> None:
    with rig("kernel") as r:
        records = r.peer.seal(HANDSHAKE, KEY_UPDATE[:cut]) + r.peer.seal(
            HANDSHAKE, KEY_UPDATE[cut:]
        )
        r.peer.next_tx_key()
        r.peer.send_raw(records + r.peer.seal_data(b"new"))
        assert r.read(3) == b"new"
        assert r.connection.rx_generation == 1


@pytest.mark.rekey
def test_ekeyexpired_half_a_key_update_leaves_poll_awake() -> None:
    """The kernel stops for the first half; whoever polls must still be told of the second."""
    with rig("kernel") as r:
        r.peer.send_record(HANDSHAKE, KEY_UPDATE[:1])
        assert wait_readable(r.sock)
        r.driver.settle()
        assert not wait_readable(r.sock, 0)
        rest = r.peer.seal(HANDSHAKE, KEY_UPDATE[1:])
        r.peer.next_tx_key()
        r.peer.send_raw(rest + r.peer.seal_data(b"new"))
        assert wait_readable(r.sock)
        assert r.look() == b"new"


@pytest.mark.rekey
def test_ekeyexpired_false_pause() -> None:
    """A continuation fragment that begins with the byte of a KeyUpdate."""
    with rig("kernel") as r:
        message = TICKET[:4] + b"\x18" + TICKET[5:]
        r.peer.send_raw(
            r.peer.seal(HANDSHAKE, message[:4])
            + r.peer.seal(HANDSHAKE, message[4:])
            + r.peer.seal_data(b"data")
        )
        assert r.read(4) == b"data"
        assert r.tickets == [message]
        assert r.connection.rx_generation == 0


@pytest.mark.rekey
def test_no_ekeyexpired_when_a_ticket_is_in_front() -> None:
    """NewSessionTicket and KeyUpdate in one record: the kernel does not stop, we change the key before the next read."""
    with rig("kernel") as r:
        record = r.peer.seal(HANDSHAKE, TICKET + KEY_UPDATE)
        r.peer.next_tx_key()
        r.peer.send_raw(record + r.peer.seal_data(b"new"))
        assert r.read(3) == b"new"
        assert r.tickets == [TICKET]


@both_versions
def test_eagain_at_recv(suite: CipherSuite) -> None:
    """Until a whole record is there; ``poll`` agrees."""
    with receiving(suite) as (receiver, peer, sock):
        record = peer.seal_data(pattern(5000))
        peer.send_raw(record[:-1])
        with pytest.raises(BlockingIOError):
            receiver.recv_into(bytearray(10), 0, NO_WAIT)
        assert not readable(sock) & select.POLLIN
        peer.send_raw(record[-1:])
        assert wait_readable(sock)
        assert receiver.recv_into(bytearray(9000), 0, NO_WAIT) == 5000


def test_eagain_at_splice() -> None:
    """The kernel heeds the flag of the call, not the mode of the descriptor: a socket with O_NONBLOCK would wait."""
    with receiving() as (receiver, peer, sock), pipe() as (reads, writes):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 2, 0))
        started = time.monotonic()
        with refused(errno.EAGAIN):
            receiver.splice(writes, 100)
        assert time.monotonic() - started < 1
        peer.send_data(b"data")
        assert wait_readable(sock)
        assert receiver.splice(writes, 100) == 4
        assert os.read(reads, 9) == b"data"


@both_versions
def test_ebadmsg_at_recv(suite: CipherSuite) -> None:
    """A raw socket would fail its sends now; we clear SO_ERROR, and the alert gets through."""
    with receiving(suite) as (_, peer, sock):
        sock.setsockopt(SOL_TLS, TLS_TX, crypto_info(suite))
        peer.tx.sequence_number += 1
        peer.send_data(b"bad")
        for _ in range(2):
            with refused(errno.EBADMSG):
                sock.recv(10)
        with refused(errno.EBADMSG):
            sock.send(b"x")
    with rig("kernel", suite=suite) as r:
        r.peer.tx.sequence_number += 1
        r.peer.send_data(b"bad")
        with pytest.raises(RemoteProtocolError) as caught:
            r.read(1)
        assert caught.value.alert is AlertDescription.BAD_RECORD_MAC
        assert r.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        alert = build_alert(AlertDescription.BAD_RECORD_MAC)
        assert r.peer.read_record() == InboundPlainMessage(ALERT, alert)


@both_versions
@pytest.mark.parametrize(
    ("header", "number", "alert"),
    [
        pytest.param(
            b"\x17\x03\x03\xff\xff", errno.EMSGSIZE, AlertDescription.RECORD_OVERFLOW, id="emsgsize"
        ),
        pytest.param(
            b"\x17\x02\x03\x00\x40", errno.EINVAL, AlertDescription.PROTOCOL_VERSION, id="einval"
        ),
        pytest.param(
            b"GET / HTTP/1.1", errno.EINVAL, AlertDescription.PROTOCOL_VERSION, id="plain text"
        ),
    ],
)
def test_framing_error_is_reported_once(
    suite: CipherSuite, header: bytes, number: int, alert: AlertDescription
) -> None:
    with receiving(suite) as (_, peer, sock):
        peer.send_raw(header + bytes(8))
        with refused(number):
            sock.recv(10)
        with refused(errno.EAGAIN):
            sock.recv(10, NO_WAIT)
        peer.end()
        assert wait_readable(sock)
        assert sock.recv(10) == b""  # as if nothing had been
    with rig("kernel", suite=suite) as r:
        r.peer.send_raw(header + bytes(8))
        for _ in range(3):
            with pytest.raises(RemoteProtocolError) as caught:
                r.read(1)
            assert caught.value.alert is alert
        assert r.peer.read_record() == InboundPlainMessage(ALERT, build_alert(alert))


@pytest.mark.parametrize("how", ["settle", "splice"])
def test_framing_error_is_not_lost_behind_an_empty_record(how: str) -> None:
    """Looking whether a control record waits, or whether 0 is the end, hears the only report."""
    with rig("kernel") as r, pipe() as (_, writes):
        r.peer.send_raw(r.peer.seal(DATA, b"") + b"\x17\x03\x03\xff\xff" + bytes(8))
        eventually(lambda: readable(r.sock) != 0, "nothing came")
        if how == "settle":
            r.driver.settle()
            r.driver.settle()
        r.sock.setblocking(False)
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as caught:
                r.driver.splice(writes, 100)
            assert caught.value.alert is AlertDescription.RECORD_OVERFLOW


def test_econnreset_is_not_lost_to_settle() -> None:
    """It is reported once, to whoever asks; afterwards reads say end, and sends pretend."""
    with receiving() as (_, peer, sock):
        peer.reset()
        reset_noticed(sock)
        with refused(errno.ECONNRESET):
            sock.recv(10, socket.MSG_PEEK)
        assert sock.recv(10) == b""
    with rig("kernel") as r:
        r.peer.reset()
        reset_noticed(r.sock)
        r.driver.settle()
        for _ in range(2):
            with refused(errno.ECONNRESET):
                r.read(1)
            with refused(errno.ECONNRESET):
                r.driver.send(b"x")


def test_zero_bytes_from_recvmsg() -> None:
    """The end, or a control record without content: only the control message tells."""
    with receiving() as (receiver, peer, sock):
        peer.send_record(ALERT, b"")
        assert sock.recvmsg(10, SPACE, socket.MSG_PEEK)[:2][0] == b""
        with pytest.raises(ControlRecord):
            receiver.recv_into(bytearray(9))
        assert receiver.read_record() == InboundPlainMessage(ALERT, b"")
        peer.end()
        for _ in range(2):
            assert receiver.recv_into(bytearray(9)) == 0
            assert receiver.read_record() is None


def test_zero_bytes_from_splice() -> None:
    """The end, or a data record without content."""
    with receiving() as (receiver, peer, sock), pipe() as (reads, writes):
        peer.send_record(DATA, b"")
        assert wait_readable(sock)
        assert os.splice(sock.fileno(), writes, 10) == 0
        peer.send_raw(peer.seal(DATA, b"") + peer.seal(DATA, b"") + peer.seal_data(b"data"))
        assert receiver.splice(writes, 100) == 4
        assert os.read(reads, 9) == b"data"
        peer.send_record(DATA, b"")
        peer.end()
        assert receiver.splice(writes, 100) == 0
