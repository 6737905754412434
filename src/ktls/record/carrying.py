"""Record layers taken apart into values, and put together again on the same connection.

The one module beside the layers' own that knows their insides. A layer is taken apart when it is at rest only: nothing of it waits to be sent, it has met no error.
"""

from __future__ import annotations

import dataclasses
import socket

from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.errors import LocalProtocolError
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import CipherSuite

from .aead import RecordProtection, record_type
from .catchup import CatchUpReceiver
from .interface import RecordReceiver, RecordSender
from .kernel import KernelReceiver, KernelSender
from .snapshot import ReceiverSnapshot, SenderSnapshot
from .userspace import UserspaceReceiver, UserspaceSender

__all__ = ("restore_receiver", "restore_sender", "snapshot_receiver", "snapshot_sender")


def _no_state() -> LocalProtocolError:
    return LocalProtocolError("this record layer has no state that could be carried")


def _check_alive(
    layer: KernelSender | UserspaceSender | KernelReceiver | UserspaceReceiver,
) -> None:
    if layer._dead is not None:
        raise LocalProtocolError("the connection has failed")


def _keys_to_carry(protection: RecordProtection, number: int) -> TrafficKeys | None:
    """Return the keys, for a successor that begins with record ``number``. In TLS 1.3 they follow from the traffic secret."""
    if protection.suite.version is ProtocolVersion.TLSv1_3:
        return None
    keys = protection.keys
    explicit = (keys.explicit_nonce + number) % 2**64 if len(keys.iv) == 4 else 0
    return TrafficKeys(keys.key, keys.iv, explicit)


def _keys(carried: TrafficKeys | None, secret: TrafficSecret | None) -> TrafficKeys:
    found = secret.keys() if secret is not None else carried
    if found is None:
        raise ValueError("neither a secret nor keys")
    return found


# --- sending -------------------------------------------------------------------------------------------------------------


def snapshot_sender(sender: RecordSender) -> SenderSnapshot:
    """Return what a successor of ``sender`` has to know. ``LocalProtocolError`` if there can be none now."""
    if isinstance(sender, KernelSender):
        _check_alive(sender)
        return SenderSnapshot(
            layer="kernel",
            can_change_key=sender.can_change_key,
            max_fragment=sender.max_fragment,
            sequence_number=sender._first,
            base=sender._base,
            octets=sender._octets,
        )
    if not isinstance(sender, UserspaceSender):
        raise _no_state()
    _check_alive(sender)
    if sender.unsent:
        raise LocalProtocolError("what was accepted has not been sent")
    number = sender.sequence_number()
    return SenderSnapshot(
        layer="userspace",
        can_change_key=True,
        max_fragment=sender.max_fragment,
        sequence_number=number,
        keys=_keys_to_carry(sender._protection, number),
    )


def restore_sender(
    sock: socket.socket, suite: CipherSuite, snapshot: SenderSnapshot, secret: TrafficSecret | None
) -> RecordSender:
    """Return a sender that goes on where ``snapshot`` was taken."""
    if snapshot.layer != "kernel":
        return UserspaceSender(
            sock,
            suite,
            _keys(snapshot.keys, secret),
            snapshot.sequence_number,
            max_fragment=snapshot.max_fragment,
        )
    sender = KernelSender.__new__(KernelSender)  # the key is in the socket already
    sender._sock = sock
    sender._suite = suite
    sender._dead = None
    sender.can_change_key = snapshot.can_change_key
    sender.max_fragment = snapshot.max_fragment
    sender._base, sender._first = snapshot.base, snapshot.sequence_number
    sender._octets = snapshot.octets
    return sender


# --- receiving -----------------------------------------------------------------------------------------------------------


def snapshot_receiver(receiver: RecordReceiver) -> ReceiverSnapshot:
    """Return what a successor of ``receiver`` has to know. ``LocalProtocolError`` if there can be none."""
    if isinstance(receiver, CatchUpReceiver):
        found = snapshot_receiver(receiver._advance())
        if found.layer == "kernel" or receiver.refusal is not None:
            return found
        return dataclasses.replace(found, layer="catchup", can_change_key=receiver._key_changes)
    if isinstance(receiver, KernelReceiver):
        _check_alive(receiver)
        return ReceiverSnapshot(
            layer="kernel", can_change_key=receiver.can_change_key, halted=receiver._halted
        )
    if not isinstance(receiver, UserspaceReceiver):
        raise _no_state()
    _check_alive(receiver)
    number, message = receiver.sequence_number(), receiver._message
    return ReceiverSnapshot(
        layer="userspace",
        can_change_key=True,
        sequence_number=number,
        keys=_keys_to_carry(receiver._protection, number),
        exact=receiver._exact,
        ciphertext=bytes(receiver._buffer),
        content_type=int(message.content_type) if message is not None else None,
        fragment=message.fragment if message is not None else b"",
        eof=receiver._eof,
    )


def restore_receiver(
    sock: socket.socket,
    suite: CipherSuite,
    snapshot: ReceiverSnapshot,
    secret: TrafficSecret | None,
) -> RecordReceiver:
    """Return a receiver that goes on where ``snapshot`` was taken."""
    if snapshot.layer == "kernel":
        kernel = KernelReceiver.__new__(KernelReceiver)  # the key is in the socket already
        kernel._sock = sock
        kernel._suite = suite
        kernel._dead = None
        kernel._halted = snapshot.halted
        kernel.can_change_key = snapshot.can_change_key
        return kernel
    receiver = UserspaceReceiver(
        sock,
        suite,
        _keys(snapshot.keys, secret),
        snapshot.sequence_number,
        initial=snapshot.ciphertext,
        exact=snapshot.exact,
    )
    if snapshot.content_type is not None:
        content_type = record_type(snapshot.content_type)
        receiver._message = InboundPlainMessage(content_type, snapshot.fragment)
    receiver._eof = snapshot.eof
    if snapshot.layer == "userspace":
        return receiver
    catchup = CatchUpReceiver.__new__(CatchUpReceiver)
    catchup._sock = sock
    catchup._key_changes = snapshot.can_change_key
    catchup._current = receiver
    catchup.refusal = None
    return catchup
