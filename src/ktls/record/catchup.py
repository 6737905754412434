"""Receiving that begins in user space and moves into the kernel at the first record boundary.

Whoever read the handshake may have read past it: a cache of the application, asyncio's streams, STARTTLS. Those bytes can't be given back to the socket, so they are opened here, with
exact reads; as soon as nothing is held, ``TLS_RX`` is set with the number of the next record. Nothing is lost, repeated or reordered.
"""

from __future__ import annotations

import socket
from typing import final

from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import CipherSuite

from .interface import LayerName, WriteBuffer
from .interruption import of_a_handler
from .kernel import KernelReceiver
from .userspace import UserspaceReceiver

__all__ = ("CatchUpReceiver",)


@final
class CatchUpReceiver:
    """``RecordReceiver`` that is a ``UserspaceReceiver`` until it can be a ``KernelReceiver``.

    Should the kernel refuse at that moment, it remains in user space; ``refusal`` says why.
    """

    __slots__ = ("_current", "_key_changes", "_sock", "refusal")

    def __init__(
        self,
        sock: socket.socket,
        suite: CipherSuite,
        keys: TrafficKeys,
        sequence_number: int,
        initial: bytes,
        *,
        can_change_key: bool,
    ) -> None:
        self._sock = sock
        self._key_changes = can_change_key
        self._current: UserspaceReceiver | KernelReceiver = UserspaceReceiver(
            sock, suite, keys, sequence_number, initial=initial, exact=True
        )
        self.refusal: OSError | None = None

    @property
    def name(self) -> LayerName:
        """Which layer it is at the moment."""
        return self._current.name

    @property
    def can_change_key(self) -> bool:
        """See ``RecordReceiver``. Where the kernel can't, this is about to end: so it is False from the start."""
        return self._key_changes if self.refusal is None else self._current.can_change_key

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """See ``RecordReceiver``."""
        return self._advance().recv_into(buffer, nbytes, flags)

    def read_record(self, flags: int = 0) -> InboundPlainMessage | None:
        """See ``RecordReceiver``."""
        return self._advance().read_record(flags)

    def record_waits(self) -> bool:
        """See ``RecordReceiver``."""
        return self._advance().record_waits()

    def install(self, keys: TrafficKeys) -> None:
        """See ``RecordReceiver``."""
        self._current.install(keys)

    def sequence_number(self) -> int:
        """See ``RecordReceiver``."""
        return self._current.sequence_number()

    def pending(self) -> int:
        """See ``RecordReceiver``."""
        return self._current.pending()

    def kernel(self) -> KernelReceiver | None:
        """Return the kernel's receiver once it has taken over."""
        current = self._advance()
        return current if isinstance(current, KernelReceiver) else None

    def _advance(self) -> UserspaceReceiver | KernelReceiver:
        current = self._current
        if isinstance(current, UserspaceReceiver) and self.refusal is None and current.at_boundary:
            protection = current.protection
            try:
                self._current = KernelReceiver(
                    self._sock,
                    protection.suite,
                    protection.keys,
                    protection.sequence_number,
                    can_change_key=self._key_changes,
                )
            except OSError as error:
                if of_a_handler(error):
                    raise
                self.refusal = error
        return self._current
