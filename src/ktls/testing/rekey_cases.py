"""What every ``RecordReceiver`` has to do whose key can be changed (TLS 1.3): one function a rule, named after it."""

from __future__ import annotations

from typing import Final

from ktls.protocol.enums import ContentType, KeyUpdateRequest
from ktls.protocol.messages import build_key_update
from ktls.protocol.states import InboundPlainMessage
from ktls.record.interface import ControlRecord, RecordReceiver

from .bench import Bench, Case, error_of, expect, receive
from .peers import made_up_keys

__all__ = (
    "RECEIVER_REKEY_CASES",
    "fragment_that_looks_like_a_key_update",
    "install_after_a_key_update",
    "key_update_behind_another_message",
    "key_update_split_over_two_records",
    "key_updates_in_a_row",
)

_HANDSHAKE: Final = ContentType.HANDSHAKE


def install_after_a_key_update(bench: Bench) -> None:
    """The records of the new key may be here already when the KeyUpdate is read."""
    with bench.receiving() as (receiver, peer, _):
        for generation in range(1, 20):
            peer.send_raw(peer.seal_data(b"old") + peer.seal_key_update() + peer.seal_data(b"new"))
            expect(receive(receiver, 3, step=100) == b"old", "the bytes changed")
            _follow(receiver, generation, bench)
            expect(receiver.sequence_number() == 0, "numbers begin at 0 again")
            expect(receive(receiver, 3, step=100) == b"new", "the bytes changed")
            expect(receiver.sequence_number() == 1, "one record since")


def key_updates_in_a_row(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        peer.send_raw(b"".join(peer.seal_key_update() for _ in range(5)) + peer.seal_data(b"data"))
        for generation in range(1, 6):
            _follow(receiver, generation, bench)
        expect(receive(receiver, 4) == b"data", "the bytes changed")


def key_update_behind_another_message(bench: Bench) -> None:
    """Two messages may share a record; the layer that stops at KeyUpdates does not see this one."""
    with bench.receiving() as (receiver, peer, _):
        ticket = b"\x04\x00\x00\x01x"
        both = ticket + build_key_update(KeyUpdateRequest.UPDATE_NOT_REQUESTED)
        record = peer.seal(_HANDSHAKE, both)
        peer.next_tx_key()
        peer.send_raw(record + peer.seal_data(b"data"))
        expect(receiver.read_record() == InboundPlainMessage(_HANDSHAKE, both), "the messages")
        receiver.install(made_up_keys(bench.suite, "peer", 1))
        expect(receive(receiver, 4) == b"data", "the bytes changed")


def key_update_split_over_two_records(bench: Bench) -> None:
    """The rest of it is still under the old key."""
    for cut in (1, 3):
        with bench.receiving() as (receiver, peer, _):
            update = build_key_update(KeyUpdateRequest.UPDATE_NOT_REQUESTED)
            records = peer.seal(_HANDSHAKE, update[:cut]) + peer.seal(_HANDSHAKE, update[cut:])
            peer.next_tx_key()
            peer.send_raw(records + peer.seal_data(b"data"))
            for part in (update[:cut], update[cut:]):
                expect(receiver.read_record() == InboundPlainMessage(_HANDSHAKE, part), "a part")
            receiver.install(made_up_keys(bench.suite, "peer", 1))
            expect(receive(receiver, 4) == b"data", "the bytes changed")


def fragment_that_looks_like_a_key_update(bench: Bench) -> None:
    """The rest of another message may begin with the type byte of a KeyUpdate."""
    with bench.receiving() as (receiver, peer, _):
        parts = [b"\x04\x00\x00\x03a", b"\x18b"]
        peer.send_raw(
            b"".join(peer.seal(_HANDSHAKE, part) for part in parts) + peer.seal_data(b"data")
        )
        for part in parts:
            expect(receiver.read_record() == InboundPlainMessage(_HANDSHAKE, part), "a part")
        expect(receive(receiver, 4) == b"data", "the bytes changed")
        expect(receiver.sequence_number() == 3, "3 records came")


def _follow(receiver: RecordReceiver, generation: int, bench: Bench) -> None:
    error = error_of(lambda: receiver.recv_into(bytearray(100)))
    expect(isinstance(error, ControlRecord), f"{error!r} instead of a KeyUpdate")
    message = receiver.read_record()
    update = build_key_update(KeyUpdateRequest.UPDATE_NOT_REQUESTED)
    expect(message == InboundPlainMessage(_HANDSHAKE, update), f"{message} for a KeyUpdate")
    receiver.install(made_up_keys(bench.suite, "peer", generation))


#: For receivers whose ``can_change_key`` is true, and TLS 1.3.
RECEIVER_REKEY_CASES: Final[tuple[Case, ...]] = (
    install_after_a_key_update,
    key_updates_in_a_row,
    key_update_behind_another_message,
    key_update_split_over_two_records,
    fragment_that_looks_like_a_key_update,
)
