"""Runs the commands of a ``KernelConnection`` over a sender and a receiver, for any number of threads.

Theory of operation
-------------------
Three locks, always taken in this order, and never one held while waiting for a lower one:

- ``rx``: one reader at a time. Held while blocked in the kernel.
- ``tx``: one sender at a time, from the KeyUpdate record to the new key. ``setsockopt(TLS_TX)`` takes effect at once, even in the middle of another thread's
  ``send``; this lock is what makes a key change atomic.
- ``state``: the connection and the queue of owed commands. Held for microseconds, never over I/O.

Sending commands (``SendMessage``, ``UpdateTxKey``) go into one queue, in the order in which the connection gave them, and leave it only when done. So every step is resumable: a
KeyUpdate that would block stays at the head, and its key is not installed before it went out. Data never overtakes the queue.

Receiving never waits for a sender. A reader that owes an answer tries the ``tx`` lock; if a sender holds it, that sender runs the queue when it is done,
before its next data. Nobody holding the lock and the queue not empty means that TCP's buffer is full, and then the next send runs it.

A receiving key is installed by the reader at once, before anything more is read: a kernel that waits for a key is deaf, and silent to ``poll``.

What this module does not do: wait (``BlockingIOError`` goes up to the front end; ``flags`` come down from it), close sockets, choose layers. It is
replaceable: a kernel that did KeyUpdate by itself would need another driver, and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import Direction
from ktls.protocol.errors import KeyLimitError, RemoteProtocolError
from ktls.protocol.limits import DirectionUsage, KeyUsage
from ktls.protocol.states import HalfState

from .catchup import CatchUpReceiver
from .interface import (
    KeyChangeObserver,
    LayerName,
    ReadBuffer,
    RecordReceiver,
    RecordSender,
    WriteBuffer,
)
from .kernel import KernelReceiver
from .receiving import ReceivingHalf
from .sending import SendingHalf
from .userspace import UserspaceReceiver

__all__ = ("Driver",)


@final
class Driver:
    """One connection at work. Thread-safe.

    ``on_ticket`` gets each NewSessionTicket message, ``on_key_change`` is called after a key of either direction was changed; both run in the thread that
    found the cause, and may raise ``RemoteProtocolError`` only. They run under the driver's locks: they must not call it.

    ``lock`` takes the place of all three locks: for callers in one thread, whose connections may share it, and so need none of their own.
    """

    __slots__ = ("connection", "receiver", "receiving", "sender", "sending")

    def __init__(
        self,
        connection: KernelConnection,
        sender: RecordSender,
        receiver: RecordReceiver,
        *,
        on_ticket: Callable[[bytes], None] | None = None,
        on_key_change: KeyChangeObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        lock: threading.RLock | None = None,
    ) -> None:
        self.connection = connection
        self.sender = sender
        self.receiver = receiver
        rx_lock, tx_lock, state_lock = (lock or threading.Lock() for _ in range(3))
        direct = lock is not None
        self.sending = SendingHalf(
            connection,
            sender,
            (tx_lock, state_lock),
            on_key_change=on_key_change,
            clock=clock,
            direct=direct,
        )
        self.receiving = ReceivingHalf(
            connection,
            receiver,
            self.sending,
            (rx_lock, state_lock),
            on_ticket=on_ticket,
            on_key_change=on_key_change,
            clock=clock,
            direct=direct,
        )

    # --- facts -------------------------------------------------------------------------------------------------

    @property
    def tx_layer(self) -> LayerName:
        """Where the sending direction lives."""
        return self.sender.name

    @property
    def rx_layer(self) -> LayerName:
        """Where the receiving direction lives."""
        return self.receiver.name

    @property
    def owes(self) -> bool:
        """Whether commands, or bytes sealed already, wait in this process for room in TCP's buffer."""
        return self.sending.owes

    @property
    def tx_closed(self) -> bool:
        """Whether our close_notify has been sent."""
        return self.connection.tx_state is HalfState.CLOSED and not self.owes

    @property
    def unsent(self) -> bool:
        """Whether accepted data waits in this process: then nothing but a further call (``run_owed``, ``flush``) moves it."""
        return self.sending.unsent

    @property
    def peer_closed(self) -> bool:
        """Whether the peer's close_notify was received."""
        return self.receiving.peer_closed

    @property
    def failure(self) -> OSError | None:
        """What made the connection fail in both directions, if it did."""
        return self.sending.failure

    @property
    def refused_in_kernel(self) -> bool:
        """Whether the peer was refused for a record that the kernel may still hold: it can be neither opened nor dropped."""
        return self.rx_layer == "kernel" and isinstance(
            self.failure, RemoteProtocolError | KeyLimitError
        )

    @property
    def stuck_in_kernel(self) -> bool:
        """Whether the kernel has met a record that it can't open: neither that one nor what is behind it can be read, not even to be dropped."""
        receiver: RecordReceiver | None = self.receiver
        if isinstance(receiver, CatchUpReceiver):
            receiver = receiver.kernel()
        return isinstance(receiver, KernelReceiver) and receiver.dead

    def pending(self) -> int:
        """Return how many decrypted bytes are held in this process, invisible to ``poll``."""
        return self.receiving.pending()

    def unread(self) -> int:
        """Return how many bytes were read from TCP and not yet opened: after the peer's close_notify, what follows it in plain text."""
        receiver = self.receiver
        return receiver.unread if isinstance(receiver, UserspaceReceiver) else 0

    def key_usage(self) -> KeyUsage:
        """Return the exact use of the current keys, from the record layers' own counters. ``OSError`` once the socket is closed."""
        return KeyUsage(
            tx=self._usage(Direction.TX, self.sender), rx=self._usage(Direction.RX, self.receiver)
        )

    def _usage(self, direction: Direction, layer: RecordSender | RecordReceiver) -> DirectionUsage:
        # No lock: a blocked sender or reader would hold it. If the key changed while we looked, look again.
        connection = self.connection
        while True:
            generation = connection.installed_generation(direction)
            records = layer.sequence_number()
            if generation == connection.installed_generation(direction):
                limit = connection.record_limit(direction)
                return DirectionUsage(generation=generation, records=records, limit=limit)

    # --- sending: see SendingHalf ------------------------------------------------------------------------------

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """Send application data; return how many bytes were accepted (0 only for no data).

        Raises ``BlockingIOError`` (nothing taken), ``KeyLimitError``, ``LocalProtocolError`` (our side is closed), ``OSError`` from the network; after the
        last, every further call raises it again.
        """
        return self.sending.send(data, flags)

    def send_vector(self, buffers: list[ReadBuffer], flags: int = 0) -> int:
        """Send ``buffers``, none of them empty, as if they were one piece: in the kernel one system call. Returns and raises as ``send``."""
        return self.sending.send_vector(buffers, flags)

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """Send up to ``count`` bytes of a file from ``offset``; return how many were accepted, 0 at the end of the file. Raises as ``send``."""
        return self.sending.sendfile(fd, offset, count)

    def refresh_traffic_keys(self, request_peer: bool = False, flags: int = 0) -> None:
        """Change our key, and ask the peer for a new one with ``request_peer``.

        ``LocalProtocolError``: nothing happened. ``BlockingIOError``: it will happen, in order, before the next data.
        """
        self.sending.refresh_traffic_keys(request_peer, flags)

    def close_notify(self, flags: int = 0, *, patience: float = -1) -> None:
        """Close our side with close_notify, after everything owed. ``BlockingIOError``: call again; doing so repeats nothing.

        ``patience``: seconds to wait for another thread that is sending; -1: for ever.
        """
        self.sending.close_notify(flags, patience=patience)

    def run_owed(self) -> None:
        """Run what is owed as far as it goes without waiting, for a lock or for TCP. Never raises: a later send reports the error."""
        self.sending.run_owed()

    def flush(self, flags: int = 0) -> None:
        """Hand to TCP whatever the sending layer still holds; ``BlockingIOError`` if that can't be done yet."""
        self.sending.flush(flags)

    # --- receiving: see ReceivingHalf --------------------------------------------------------------------------

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive application data; return the count, 0 after the peer's close_notify.

        Raises ``BlockingIOError``, ``TruncatedError`` (TCP ended without close_notify), ``RemoteProtocolError``, ``AlertReceived``, ``KeyLimitError`` (the peer
        changed its key and this layer can't), ``OSError`` from the network. All but the first are raised by every further call too.
        """
        return self.receiving.recv_into(buffer, nbytes, flags)

    def splice(self, pipe: int, count: int) -> int:
        """Move application data from the kernel into ``pipe``, uncopied; return the count, 0 after close_notify. Raises as ``recv_into``.

        ``LocalProtocolError`` where the receiving direction is not in the kernel: use ``recv_into``.
        """
        return self.receiving.splice(pipe, count)

    def settle(self, *, read_ahead: bool = False) -> None:
        """Handle control records that are next, without waiting: for callers who poll by themselves (after each read), or send for long without reading.

        Takes no application data; errors are kept for the next read. In user space only with ``read_ahead``: data may then be in this process that
        ``poll`` does not show (``pending``).
        """
        self.receiving.settle(read_ahead=read_ahead)
