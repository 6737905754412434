"""From user space into the kernel, at a record boundary."""

from __future__ import annotations

import errno

import pytest

from ktls.protocol.enums import ContentType
from ktls.protocol.suites import CipherSuite
from ktls.record.catchup import CatchUpReceiver
from ktls.record.interface import ControlRecord
from ktls.record.kernel import attach
from ktls.testing import RecordPeer, loopback_pair, made_up_keys, pattern
from ktls.testing.bench import receive

from .layers import SUITES, TLS13, can_rekey

every_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)


@pytest.mark.kernel
@every_suite
@pytest.mark.parametrize("cut", [1, 4, 5, 20, 40, 60, 120])
def test_moves_at_the_first_boundary(suite: CipherSuite, cut: int) -> None:
    """Wherever the over-read ended: nothing lost, repeated or reordered, and the numbers go on."""
    with loopback_pair() as (sock, theirs):
        attach(sock)
        peer = RecordPeer(theirs, suite, tx_sequence_number=5)
        stream = b"".join(peer.seal_data(pattern(20, 20 * n)) for n in range(10))
        keys = made_up_keys(suite, "peer")
        receiver = CatchUpReceiver(
            sock, suite, keys, 5, stream[:cut], can_change_key=can_rekey(suite)
        )
        assert receiver.name == "userspace"
        peer.send_raw(stream[cut:])
        assert receive(receiver, 200) == pattern(200)
        assert receiver.kernel() is not None
        assert receiver.refusal is None
        assert receiver.sequence_number() == 15
        assert receiver.pending() == 0
        peer.send_record(ContentType.ALERT, b"\x01\x5a")
        with pytest.raises(ControlRecord):
            receiver.recv_into(bytearray(9))
        assert receiver.record_waits()
        assert receiver.read_record() is not None


@pytest.mark.kernel
@pytest.mark.rekey
def test_key_update_in_the_over_read() -> None:
    with loopback_pair() as (sock, theirs):
        attach(sock)
        peer = RecordPeer(theirs, TLS13)
        update = peer.seal_key_update()
        data = peer.seal_data(b"new")
        receiver = CatchUpReceiver(
            sock, TLS13, made_up_keys(TLS13, "peer"), 0, update + data[:9], can_change_key=True
        )
        assert receiver.read_record() is not None
        receiver.install(made_up_keys(TLS13, "peer", 1))
        peer.send_raw(data[9:])
        assert receive(receiver, 3) == b"new"
        peer.send_raw(peer.seal_data(b"more") + peer.seal_key_update() + peer.seal_data(b"newer"))
        assert receive(receiver, 4) == b"more"
        assert receiver.name == "kernel"
        assert receiver.read_record() is not None
        receiver.install(made_up_keys(TLS13, "peer", 2))
        assert receive(receiver, 5) == b"newer"


def test_refusal_is_kept_and_asked_once() -> None:
    """Without the ULP the kernel refuses; user space goes on."""
    with loopback_pair() as (sock, theirs):
        peer = RecordPeer(theirs, TLS13)
        first = peer.seal_data(b"one")
        receiver = CatchUpReceiver(
            sock, TLS13, made_up_keys(TLS13, "peer"), 0, first, can_change_key=False
        )
        assert not receiver.can_change_key
        assert receiver.kernel() is None
        assert receive(receiver, 3) == b"one"
        assert receiver.refusal is None
        assert receiver.kernel() is None
        refusal = receiver.refusal
        assert refusal is not None
        assert refusal.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
        assert receiver.can_change_key
        peer.send_data(b"two")
        assert receive(receiver, 3) == b"two"
        assert receiver.refusal is refusal
        assert receiver.name == "userspace"
