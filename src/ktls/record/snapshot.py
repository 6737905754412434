"""What a record layer knows, as values: everything that another process needs to go on, beside the socket and the connection's secrets.

A kernel's layer knows little: key and sequence number are in the socket. A layer in user space carries its own count, and what it has read ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final

from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.snapshot import ConnectionSnapshot
from ktls.protocol.suites import MAX_FRAGMENT

__all__ = ("DriverSnapshot", "ReceiverSnapshot", "SenderSnapshot", "SnapshotLayer")

#: Layers that have a state that can be carried. ``catchup``: receiving in user space until the kernel can take over.
SnapshotLayer: TypeAlias = Literal["kernel", "userspace", "catchup"]

_MAX_SEQUENCE = 2**64 - 1


def _check_counts(*counts: int) -> None:
    if not all(0 <= count <= _MAX_SEQUENCE for count in counts):
        raise ValueError("a count that no record layer can have")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SenderSnapshot:
    """A ``RecordSender`` that holds nothing back."""

    layer: SnapshotLayer
    can_change_key: bool
    max_fragment: int
    #: Of the next record in user space; in the kernel, of the first record under the present key.
    sequence_number: int
    #: TLS 1.2 in user space. Otherwise they follow from the traffic secret, or only the kernel has them.
    keys: TrafficKeys | None = None
    #: Kernel: bytes that TCP had been given before the present key, and bytes of plain text accepted under it. ``flush`` counts with them.
    base: int = 0
    octets: int = 0

    def __post_init__(self) -> None:
        """Refuse what can't be (``ValueError``)."""
        _check_counts(self.sequence_number, self.base, self.octets)
        if self.layer == "catchup" or not 0 < self.max_fragment <= MAX_FRAGMENT:
            raise ValueError("a sender that can't be")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverSnapshot:
    """A ``RecordReceiver``."""

    layer: SnapshotLayer
    can_change_key: bool
    #: Of the next record, in user space.
    sequence_number: int = 0
    #: As ``SenderSnapshot.keys``.
    keys: TrafficKeys | None = None
    #: Kernel: it has stopped, for what was no KeyUpdate.
    halted: bool = False
    #: User space: whether it never reads past a record.
    exact: bool = False
    #: User space: read from TCP and not yet opened.
    ciphertext: bytes = field(default=b"", repr=False)
    #: User space: type and rest of the record that was opened and not yet wholly delivered.
    content_type: int | None = None
    fragment: bytes = field(default=b"", repr=False)
    eof: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be (``ValueError``)."""
        _check_counts(self.sequence_number)
        if len(self.fragment) > MAX_FRAGMENT or not 0 <= (self.content_type or 0) <= 255:
            raise ValueError("a record that can't be")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DriverSnapshot:
    """A ``Driver`` at rest."""

    connection: ConnectionSnapshot
    sender: SenderSnapshot
    receiver: ReceiverSnapshot
    #: Bytes of application data under the present keys.
    tx_octets: int
    rx_octets: int
    #: Application data that was received and not yet delivered.
    early: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        """Refuse what can't be (``ValueError``)."""
        _check_counts(self.tx_octets, self.rx_octets)
