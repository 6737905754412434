"""What the contract does not say about the kernel's halves; errors of the kernel are in ``test_errno_setup`` and its neighbours."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from ktls.protocol.enums import ContentType
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.interface import ControlRecord
from ktls.record.tcp import acknowledged, queued_by_tcp
from ktls.testing import (
    PATIENCE,
    RecordPeer,
    eventually,
    fill_up,
    loopback_pair,
    made_up_keys,
    pattern,
    wait_readable,
)

from .layers import SUITES, TLS13, kernel_receiver, kernel_sender
from .rig import pipe

every_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)


@pytest.mark.kernel
@every_suite
def test_one_system_call_merges_records(suite: CipherSuite) -> None:
    with loopback_pair() as (sock, theirs):
        receiver = kernel_receiver(sock, suite, made_up_keys(suite, "peer"), 0)
        peer = RecordPeer(theirs, suite)
        peer.send_raw(b"".join(peer.seal_data(pattern(100, 100 * n)) for n in range(20)))
        buffer = bytearray(4000)
        assert wait_readable(sock)
        assert receiver.recv_into(buffer) == 2000
        assert buffer[:2000] == pattern(2000)


@pytest.mark.kernel
def test_record_waits_takes_nothing() -> None:
    with loopback_pair() as (sock, theirs):
        receiver = kernel_receiver(sock, TLS13, made_up_keys(TLS13, "peer"), 0)
        peer = RecordPeer(theirs, TLS13)
        assert not receiver.record_waits()
        peer.send_raw(peer.seal_data(b"data") + peer.seal(ContentType.ALERT, b"\x01\x5a"))
        assert wait_readable(sock)
        for _ in range(3):
            assert not receiver.record_waits()
        assert receiver.recv_into(bytearray(9)) == 4
        for _ in range(3):
            assert receiver.record_waits()
        assert receiver.read_record() is not None
        peer.end()
        assert wait_readable(sock)
        assert not receiver.record_waits()


@pytest.mark.kernel
def test_splice_stops_at_the_pipe_and_the_record() -> None:
    with loopback_pair() as (sock, theirs), pipe() as (reads, writes):
        receiver = kernel_receiver(sock, TLS13, made_up_keys(TLS13, "peer"), 0)
        peer = RecordPeer(theirs, TLS13)
        peer.send_raw(peer.seal_data(pattern(MAX_FRAGMENT)) + peer.seal_data(b"more"))
        data = bytearray()
        while len(data) < MAX_FRAGMENT + 4:
            moved = receiver.splice(writes, 5000)
            assert 0 < moved <= 5000
            data += os.read(reads, moved)
        assert bytes(data) == pattern(MAX_FRAGMENT) + b"more"
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            receiver.splice(writes, 100)
        peer.send_record(ContentType.ALERT, b"\x01\x5a")
        assert wait_readable(sock)
        with pytest.raises(ControlRecord):
            receiver.splice(writes, 100)


@pytest.mark.kernel
def test_flush_is_about_acknowledgement() -> None:
    with loopback_pair() as (sock, _):
        sender = kernel_sender(sock, TLS13, made_up_keys(TLS13, "us"), 0, MAX_FRAGMENT)
        sender.flush()
        assert not sender.unsent
        assert sender.max_fragment == MAX_FRAGMENT
        fill_up(lambda: sender.send(bytes(MAX_FRAGMENT), socket.MSG_DONTWAIT), sock)
        with pytest.raises(BlockingIOError, match="not acknowledged"):
            sender.flush()


@pytest.mark.kernel
def test_sendfile_past_the_end_waits_for_nobody(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(10_000))
    slowest = 0.0
    with loopback_pair(sndbuf=4096, rcvbuf=4096) as (sock, _), path.open("rb") as file:
        sender = kernel_sender(sock, TLS13, made_up_keys(TLS13, "us"), 0, MAX_FRAGMENT)
        sock.setblocking(False)

        def send() -> int:
            nonlocal slowest
            begun = time.monotonic()
            try:
                return sender.sendfile(file.fileno(), 0, 1 << 20)
            finally:
                slowest = max(slowest, time.monotonic() - begun)

        assert fill_up(send, sock) >= 10_000
        assert sender.sendfile(file.fileno(), 10_000, 1 << 20) == 0
    # Where it waits, it is for the peer, so until SO_SNDTIMEO.
    assert slowest < PATIENCE / 2


@pytest.mark.kernel
def test_closed_descriptor() -> None:
    with loopback_pair() as (sock, _):
        sender = kernel_sender(sock, TLS13, made_up_keys(TLS13, "us"), 0, MAX_FRAGMENT)
        receiver = kernel_receiver(sock, TLS13, made_up_keys(TLS13, "peer"), 0)
        sock.close()
        for call in (
            sender.sequence_number,
            receiver.sequence_number,
            lambda: sender.send(b"x"),
            lambda: receiver.recv_into(bytearray(1)),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EBADF


def test_keys_without_the_ulp_are_refused_anywhere() -> None:
    with loopback_pair() as (sock, _), pytest.raises(OSError) as caught:
        kernel_free_socket(sock)
    assert caught.value.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)


def kernel_free_socket(sock: socket.socket) -> None:
    from ktls.record.kernel import KernelReceiver

    KernelReceiver(sock, TLS13, made_up_keys(TLS13, "peer"), can_change_key=False)


@pytest.mark.kernel
@every_suite
def test_flush_knows_how_many_bytes_tcp_must_get(suite: CipherSuite, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(pattern(40_000))
    with loopback_pair() as (sock, theirs), file.open("rb") as opened:
        sender = kernel_sender(sock, suite, made_up_keys(suite, "us"), 0, MAX_FRAGMENT)
        for keys in range(3 if sender.can_change_key else 1):
            if keys:
                sender.install(made_up_keys(suite, f"us, changed {keys}"))
            sender.send(pattern(100_000))
            sender.send_vector([pattern(10), pattern(20_000)])
            sender.send_record(ContentType.ALERT, b"\x01\x5a")
            sender.sendfile(opened.fileno(), 0, 40_000)
            drain(theirs)
        eventually(lambda: not queued_by_tcp(sock), "TCP is not quiet")
        assert sender._expected() == acknowledged(sock)
        sender.flush()


@pytest.mark.kernel
def test_flush_is_not_deceived_by_a_quiet_tcp() -> None:
    """What the kernel still holds above TCP is not sent: a thread of its own has to run first."""
    with loopback_pair() as (sock, _):
        sender = kernel_sender(sock, TLS13, made_up_keys(TLS13, "us"), 0, MAX_FRAGMENT)
        sender.send(b"data")
        eventually(lambda: not queued_by_tcp(sock), "TCP is not quiet")
        sender.flush()
        sender._octets += 1  # as if one byte more had been accepted that TCP has not got yet
        with pytest.raises(BlockingIOError):
            sender.flush()


def drain(sock: socket.socket) -> None:
    """Take whatever comes within a moment."""
    while wait_readable(sock, 0.05):
        assert sock.recv(1 << 20)
