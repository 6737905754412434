"""Record layers taken apart into values, and put together again on the same connection."""

from __future__ import annotations

import pytest

from ktls.protocol.enums import ContentType, ProtocolVersion
from ktls.protocol.errors import LocalProtocolError
from ktls.protocol.suites import CipherSuite
from ktls.record.carrying import (
    restore_receiver,
    restore_sender,
    snapshot_receiver,
    snapshot_sender,
)
from ktls.record.catchup import CatchUpReceiver
from ktls.record.kernel import attach
from ktls.record.snapshot import ReceiverSnapshot, SenderSnapshot, SnapshotLayer
from ktls.record.userspace import UserspaceReceiver, UserspaceSender
from ktls.testing import RecordPeer, loopback_pair, made_up_keys, made_up_secret, pattern
from ktls.testing.bench import receive

from .layers import SUITES, TLS13, can_rekey
from .rig import rig

every_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)


@every_suite
def test_numbers_and_nonces_go_on_in_user_space(suite: CipherSuite) -> None:
    """Not one number is used twice, nor left out: the peer could not open the next record."""
    with loopback_pair() as (sock, theirs):
        peer = RecordPeer(theirs, suite, tx_sequence_number=7)
        secrets = [
            made_up_secret(suite, who) if suite.version is ProtocolVersion.TLSv1_3 else None
            for who in ("us", "peer")
        ]
        sender = UserspaceSender(sock, suite, made_up_keys(suite, "us"), 0)
        receiver = UserspaceReceiver(sock, suite, made_up_keys(suite, "peer"), 7)
        for step in range(1, 4):
            sender.send(pattern(step))
            assert peer.read_data(step) == pattern(step)
            peer.send_raw(peer.seal_data(pattern(step)))
            assert receive(receiver, step) == pattern(step)
            assert (sender.sequence_number(), receiver.sequence_number()) == (step, 7 + step)
            carried = snapshot_sender(sender), snapshot_receiver(receiver)
            assert (carried[0].keys is None) is (secrets[0] is not None)
            restored = restore_sender(sock, suite, carried[0], secrets[0])
            assert isinstance(restored, UserspaceSender)
            sender = restored
            again = restore_receiver(sock, suite, carried[1], secrets[1])
            assert isinstance(again, UserspaceReceiver)
            receiver = again


@pytest.mark.kernel
@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_catching_up_with_the_kernel_goes_on(cut: int) -> None:
    """Bytes read past the handshake are still in the process: the successor opens them, and then the kernel takes over."""
    with loopback_pair() as (sock, theirs):
        attach(sock)
        peer = RecordPeer(theirs, TLS13, tx_sequence_number=5)
        stream = b"".join(peer.seal_data(pattern(20, 20 * n)) for n in range(10))
        keys = made_up_keys(TLS13, "peer")
        receiver = CatchUpReceiver(
            sock, TLS13, keys, 5, stream[:cut], can_change_key=can_rekey(TLS13)
        )
        carried = snapshot_receiver(receiver)
        assert carried.layer == "catchup"
        successor = restore_receiver(sock, TLS13, carried, made_up_secret(TLS13, "peer"))
        assert isinstance(successor, CatchUpReceiver)
        peer.send_raw(stream[cut:])
        assert receive(successor, 200) == pattern(200)
        assert successor.kernel() is not None
        assert snapshot_receiver(successor).layer == "kernel"
        assert successor.sequence_number() == 15


def test_without_a_kernel_it_stays_in_user_space() -> None:
    """Refused once, the successor does not try again."""
    with loopback_pair() as (sock, theirs):
        peer = RecordPeer(theirs, TLS13)
        receiver = CatchUpReceiver(
            sock, TLS13, made_up_keys(TLS13, "peer"), 0, b"", can_change_key=True
        )
        assert receiver.kernel() is None  # no ULP was attached
        carried = snapshot_receiver(receiver)
        assert carried.layer == "userspace"
        assert carried.exact
        successor = restore_receiver(sock, TLS13, carried, made_up_secret(TLS13, "peer"))
        peer.send_raw(peer.seal_data(b"data"))
        assert receive(successor, 4) == b"data"
        assert snapshot_receiver(successor).sequence_number == 1


@pytest.mark.kernel
@pytest.mark.rekey
def test_a_kernel_that_has_stopped_is_told_to_go_on() -> None:
    """A continuation that begins with the byte of a KeyUpdate stops the kernel; the successor has to know."""
    with loopback_pair() as (sock, theirs):
        attach(sock)
        peer = RecordPeer(theirs, TLS13)
        receiver = CatchUpReceiver(
            sock, TLS13, made_up_keys(TLS13, "peer"), 0, b"", can_change_key=True
        ).kernel()
        assert receiver is not None
        peer.send_record(ContentType.HANDSHAKE, b"\x18 the rest of a ticket")
        peer.send_raw(peer.seal_data(b"data"))
        assert receiver.read_record() is not None
        carried = snapshot_receiver(receiver)
        assert carried.halted
        successor = restore_receiver(sock, TLS13, carried, None)
        assert receive(successor, 4) == b"data"


def test_unknown_layers_have_no_state() -> None:
    with rig(faulty_receiver=True) as r:
        with pytest.raises(LocalProtocolError, match="no state"):
            snapshot_sender(r.sender)
        assert r.receiver is not None
        with pytest.raises(LocalProtocolError, match="no state"):
            snapshot_receiver(r.receiver)


def test_keys_are_not_made_up() -> None:
    with loopback_pair() as (sock, _):
        sender = UserspaceSender(sock, TLS13, made_up_keys(TLS13, "us"), 0)
        carried = snapshot_sender(sender)
        with pytest.raises(ValueError, match="neither"):
            restore_sender(sock, TLS13, carried, None)


def test_nothing_is_left_unset() -> None:
    """Successors are made without their constructors: a new attribute of a layer must not be forgotten here."""
    with loopback_pair() as (sock, _):
        sender = restore_sender(
            sock,
            TLS13,
            SenderSnapshot(layer="kernel", can_change_key=True, max_fragment=99, sequence_number=0),
            None,
        )
        made: list[object] = [sender]
        layers: tuple[SnapshotLayer, ...] = ("kernel", "catchup", "userspace")
        for layer in layers:
            snapshot = ReceiverSnapshot(layer=layer, can_change_key=True)
            made.append(restore_receiver(sock, TLS13, snapshot, made_up_secret(TLS13, "peer")))
        for half in made:
            slots: tuple[str, ...] = getattr(type(half), "__slots__", ())
            assert slots
            assert [slot for slot in slots if not hasattr(half, slot)] == []
