"""What the contract does not say about user space: buffers, read-ahead, exactness, errors of TCP that pass."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from ktls.protocol.enums import ContentType
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.userspace import UserspaceReceiver, UserspaceSender
from ktls.testing import RecordPeer, loopback_pair, made_up_keys, pattern, wait_readable

from .layers import TLS13

KEYS = made_up_keys(TLS13, "us")
PEER_KEYS = made_up_keys(TLS13, "peer")


class Stubborn(socket.socket):
    """A socket whose sends do as they are told first."""

    orders: list[int | OSError]

    def send(self, data: Any, flags: int = 0) -> int:
        if not self.orders:
            return super().send(data, flags)
        order = self.orders.pop(0)
        if isinstance(order, OSError):
            raise order
        return super().send(memoryview(data)[:order], flags)


def stubborn(sock: socket.socket, *orders: int | OSError) -> Stubborn:
    mine = Stubborn(fileno=os.dup(sock.fileno()))
    mine.orders = list(orders)
    return mine


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN])
@pytest.mark.parametrize("first", [0, 1, 30])
def test_error_that_passes_repeats_nothing(number: int, first: int) -> None:
    """What was sealed counts as accepted: a caller who tried again would send it twice."""
    error = OSError(number, os.strerror(number))
    with (
        loopback_pair() as (sock, theirs),
        stubborn(sock, *([first] if first else []), error) as mine,
    ):
        sender = UserspaceSender(mine, TLS13, KEYS)
        assert sender.send(b"data" * 10) == 40
        assert sender.unsent
        mine.orders = [OSError(number, "still")]
        with pytest.raises(OSError, match="still"):
            sender.send(b"more")  # nothing taken
        sender.send_record(ContentType.ALERT, b"\x01\x5a")
        assert not sender.unsent
        peer = RecordPeer(theirs, TLS13)
        assert peer.read_data(40) == b"data" * 10
        message = peer.read_record()
        assert message is not None
        assert message.content_type == ContentType.ALERT
        assert sender.sequence_number() == peer.rx.sequence_number


def test_accepts_one_batch_and_no_more() -> None:
    with loopback_pair() as (sock, _):
        sender = UserspaceSender(sock, TLS13, KEYS)
        assert sender.send(bytes(2**20), socket.MSG_DONTWAIT) == 8 * MAX_FRAGMENT


def test_install_leaves_what_was_sealed() -> None:
    with (
        loopback_pair() as (sock, theirs),
        stubborn(sock, 7, BlockingIOError(errno.EAGAIN, "")) as mine,
    ):
        sender = UserspaceSender(mine, TLS13, KEYS)
        sender.send(b"old")
        assert sender.unsent
        sender.install(made_up_keys(TLS13, "us", 1))
        sender.send(b"new")
        peer = RecordPeer(theirs, TLS13)
        assert peer.read_data(3) == b"old"
        peer.next_rx_key()
        assert peer.read_data(3) == b"new"


def test_initial_bytes_come_first() -> None:
    with loopback_pair() as (sock, theirs):
        peer = RecordPeer(theirs, TLS13)
        stream = peer.seal_data(b"one") + peer.seal_data(b"two")
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS, initial=stream[:30])
        peer.send_raw(stream[30:])
        buffer = bytearray(100)
        assert receiver.recv_into(buffer) == 3
        assert receiver.recv_into(buffer) == 3
        assert buffer[:3] == b"two"


def test_exact_reads_stop_at_the_end_of_the_record() -> None:
    with loopback_pair() as (sock, theirs):
        peer = RecordPeer(theirs, TLS13)
        first = peer.seal_data(b"first")
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS, initial=first[:3], exact=True)
        assert not receiver.at_boundary
        second = peer.seal_data(b"second")
        peer.send_raw(first[3:] + second)
        assert receiver.recv_into(bytearray(2)) == 2
        assert not receiver.at_boundary
        assert receiver.recv_into(bytearray(100)) == 3
        assert receiver.at_boundary
        assert receiver.sequence_number() == 1
        assert sock.recv(1000) == second


def test_no_boundary_after_an_error_or_the_end() -> None:
    with loopback_pair() as (sock, theirs):
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS, exact=True)
        theirs.sendall(b"\x17\x03\x03\xff\xff")
        with pytest.raises(RemoteProtocolError):
            receiver.recv_into(bytearray(9))
        assert not receiver.at_boundary
    with loopback_pair() as (sock, theirs):
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS, exact=True)
        theirs.close()
        assert receiver.recv_into(bytearray(9)) == 0
        assert not receiver.at_boundary
    with loopback_pair() as (sock, theirs):
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS, exact=True)
        RecordPeer(theirs, TLS13).reset()
        assert wait_readable(sock)
        with pytest.raises(ConnectionResetError):
            receiver.recv_into(bytearray(9))
        assert not receiver.at_boundary


def test_errors_do_not_grow() -> None:
    """The same error object is raised again: its traceback must not collect all callers."""
    with loopback_pair() as (sock, theirs):
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS)
        theirs.sendall(b"\x17\x03\x03\xff\xff")

        def depth() -> int:
            with pytest.raises(RemoteProtocolError) as caught:
                receiver.recv_into(bytearray(9))
            return len(caught.traceback)

        depth()
        assert depth() == depth() == depth()


def test_pending_is_what_was_opened() -> None:
    with loopback_pair() as (sock, theirs):
        peer = RecordPeer(theirs, TLS13)
        peer.send_data(pattern(100))
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS)
        assert receiver.pending() == 0
        assert receiver.recv_into(bytearray(30)) == 30
        assert receiver.pending() == 70


@pytest.mark.parametrize("bad", [b"\x17\x03\x03\xff\xff", b"\x17\x03\x03\0\x20" + bytes(32)])
def test_error_behind_data_does_not_hold_the_buffer(bad: bytes) -> None:
    """The error is kept for the next call; what it keeps alive must not be the caller's buffer."""
    with loopback_pair() as (sock, theirs):
        peer = RecordPeer(theirs, TLS13)
        receiver = UserspaceReceiver(sock, TLS13, PEER_KEYS)
        theirs.sendall(peer.tx.seal(ContentType.APPLICATION_DATA, b"good") + bad)
        buffer = bytearray(100)
        assert receiver.recv_into(buffer) == 4
        del buffer[4:]
        assert buffer == b"good"
        with pytest.raises(RemoteProtocolError):
            receiver.recv_into(buffer)
