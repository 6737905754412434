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

import errno
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, final

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import AlertDescription, ContentType, Direction
from ktls.protocol.errors import (
    KeyLimitError,
    KTLSError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from ktls.protocol.limits import DirectionUsage, KeyUsage
from ktls.protocol.messages import build_alert
from ktls.protocol.states import (
    ApplicationData,
    Closed,
    ConnectionState,
    HalfState,
    PeerClosed,
    SendMessage,
    SessionTicket,
    UpdateRxKey,
    UpdateTxKey,
)

from .catchup import CatchUpReceiver
from .interface import (
    DEAD_ERRNOS,
    ControlRecord,
    LayerName,
    ReadBuffer,
    RecordReceiver,
    RecordSender,
    WriteBuffer,
)
from .kernel import KernelReceiver
from .meter import Meter

__all__ = ("Driver",)

#: Bytes received between two looks at the kernel's counter, at least: near the limit every record would be looked at.
_RX_STEP: Final = 16 * 1024

@final
class Driver:
    """One connection at work. Thread-safe.

    ``on_ticket`` gets each NewSessionTicket message, ``on_key_change`` is called after a key of either direction was changed; both run in the thread that
    found the cause, and may raise ``RemoteProtocolError`` only.
    """

    __slots__ = (
        "_clock",
        "_early",
        "_on_key_change",
        "_on_ticket",
        "_owed",
        "_rx_error",
        "_rx_install",
        "_rx_lock",
        "_rx_meter",
        "_rx_special",
        "_state_lock",
        "_tx_error",
        "_tx_lock",
        "_tx_meter",
        "connection",
        "receiver",
        "sender",
    )

    def __init__(
        self,
        connection: KernelConnection,
        sender: RecordSender,
        receiver: RecordReceiver,
        *,
        on_ticket: Callable[[bytes], None] | None = None,
        on_key_change: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.connection = connection
        self.sender = sender
        self.receiver = receiver
        self._on_ticket = on_ticket
        self._on_key_change = on_key_change
        self._clock = clock
        self._rx_lock = threading.Lock()
        self._tx_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._owed: deque[SendMessage | UpdateTxKey] = deque()
        self._tx_meter = Meter(connection.limits, clock)
        self._rx_meter = Meter(connection.limits, clock, _RX_STEP)
        self._tx_error: OSError | None = None
        #: None: open. PeerClosed: the end, in order. An error: raised by every further read.
        self._rx_error: OSError | PeerClosed | None = None
        #: A key that the layer has refused for now (no memory): nothing is read before it is in.
        self._rx_install: UpdateRxKey | None = None
        #: Application data that a slow path met.
        self._early = b""
        self._rx_special = False

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
        """Whether commands of the sending side wait for room in TCP's buffer."""
        return bool(self._owed)

    @property
    def peer_closed(self) -> bool:
        """Whether the peer's close_notify was received."""
        return isinstance(self._rx_error, PeerClosed)

    def pending(self) -> int:
        """Return how many decrypted bytes are held in this process, invisible to ``poll``."""
        return len(self._early) + self.receiver.pending()

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

    # --- sending -----------------------------------------------------------------------------------------------

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """Send application data; return how many bytes were accepted (0 only for no data).

        Raises ``BlockingIOError`` (nothing taken), ``KeyLimitError``, ``LocalProtocolError`` (our side is closed), ``OSError`` from the network; after the
        last, every further call raises it again.
        """
        size = len(data)
        if not size:
            return 0
        with self._tx_lock:
            self._prepare_data(flags)
            allowance = self._tx_meter.allowance(self.sender.max_fragment)
            try:
                sent = self.sender.send(
                    data if size <= allowance else memoryview(data)[:allowance], flags
                )
            except OSError as error:
                self._tx_failed(error)
                raise
            self._tx_meter.used(-(-sent // self.sender.max_fragment), sent)
        if self._owed:
            self.run_owed()
        return sent

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """Send up to ``count`` bytes of a file from ``offset``; return how many were accepted, 0 at the end of the file. Raises as ``send``."""
        with self._tx_lock:
            self._prepare_data(0)
            allowance = self._tx_meter.allowance(self.sender.max_fragment)
            try:
                sent = self.sender.sendfile(fd, offset, min(count, allowance))
            except OSError as error:
                self._tx_failed(error)
                raise
            self._tx_meter.used(-(-sent // self.sender.max_fragment), sent)
        if self._owed:
            self.run_owed()
        return sent

    def refresh_traffic_keys(self, request_peer: bool = False, flags: int = 0) -> None:
        """Change our key, and ask the peer for a new one with ``request_peer``.

        ``LocalProtocolError``: nothing happened. ``BlockingIOError``: it will happen, in order, before the next data.
        """
        with self._state_lock:
            self._owe(
                self.connection.refresh_traffic_keys(request_peer=request_peer, now=self._clock())
            )
        with self._tx_lock:
            self._run_owed(flags)

    def close_notify(self, flags: int = 0) -> None:
        """Close our side with close_notify, after everything owed. ``BlockingIOError``: call again; doing so repeats nothing."""
        with self._state_lock:
            self._owe(self.connection.close())
        with self._tx_lock:
            self._run_owed(flags)

    def run_owed(self) -> None:
        """Run what is owed as far as it goes without waiting, for a lock or for TCP. Never raises: a later send reports the error."""
        while self._owed and self._tx_lock.acquire(blocking=False):
            try:
                self._run_owed(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                return  # kept in _tx_error
            finally:
                self._tx_lock.release()

    def flush(self, flags: int = 0) -> None:
        """Hand to TCP whatever the sending layer still holds; ``BlockingIOError`` if that can't be done yet."""
        with self._tx_lock:
            self.sender.flush(flags)

    def _owe(self, items: Iterable[ConnectionState]) -> None:
        """Queue the sending commands among ``items``. Under the state lock."""
        for item in items:
            if isinstance(item, SendMessage | UpdateTxKey):
                self._owed.append(item)

    def _prepare_data(self, flags: int) -> None:
        """Make sure that application data may go out now. Under the tx lock."""
        if self._owed:
            self._run_owed(flags)
        if self._tx_error is not None:
            raise self._tx_error.with_traceback(None)
        if self._tx_meter.due():
            self._look_at_tx()
            self._run_owed(flags)
        if self.connection.tx_state is not HalfState.OPEN:
            self._refuse_data(flags)

    def _look_at_tx(self) -> None:
        number = self.sender.sequence_number()
        with self._state_lock:
            self._owe(
                self.connection.record_usage(
                    Direction.TX, number, octets=self._tx_meter.octets, now=self._clock()
                )
            )
        self._tx_meter.looked(number, self.connection.record_limit(Direction.TX))

    def _refuse_data(self, flags: int) -> None:
        state = self.connection.tx_state
        if state is HalfState.EXHAUSTED:
            self._tx_error = KeyLimitError(
                "the sending key has reached its limit, or the peer asked for a new one, and this connection can't change it"
            )
            with self._state_lock:
                self._owe(self.connection.close())
            self._run_owed(flags)
            raise self._tx_error
        if state is HalfState.FAILED and isinstance(self._rx_error, OSError):
            raise self._rx_error.with_traceback(None)
        raise LocalProtocolError("the sending side is closed")

    def _run_owed(self, flags: int) -> None:
        """Run the queue; leave what would block. Under the tx lock."""
        owed = self._owed
        while owed:
            item = owed[0]
            try:
                if isinstance(item, SendMessage):
                    self.sender.send_record(item.content_type, item.fragment, flags)
                    self._tx_meter.used(1, 0)
                else:
                    self._install_tx(item)
            except OSError as error:
                self._tx_failed(error)
                raise
            owed.popleft()

    def _install_tx(self, item: UpdateTxKey) -> None:
        self.sender.install(item.keys)
        with self._state_lock:
            self.connection.tx_key_installed(item.generation)
        self._tx_meter.key_changed()
        if self._on_key_change is not None:
            self._on_key_change()

    def _tx_failed(self, error: OSError) -> None:
        """Remember a network error: the kernel reports it once, and then pretends to send."""
        if error.errno in DEAD_ERRNOS:
            self._tx_error = self._tx_error or error

    # --- receiving ---------------------------------------------------------------------------------------------

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive application data; return the count, 0 after the peer's close_notify.

        Raises ``BlockingIOError``, ``TruncatedError`` (TCP ended without close_notify), ``RemoteProtocolError``, ``AlertReceived``, ``KeyLimitError`` (the peer
        changed its key and this layer can't), ``OSError`` from the network. All but the first are raised by every further call too.
        """
        with self._rx_lock:
            while True:
                if self._rx_special:
                    if self._early:
                        return self._take_early(buffer, nbytes)
                    if self._rx_error is not None:
                        return self._end()
                    self._read_record(flags)
                    continue
                try:
                    count = self.receiver.recv_into(buffer, nbytes, flags)
                except ControlRecord:
                    count = -1
                except OSError as error:
                    self._rx_failed(error)
                    raise
                if count > 0:
                    self._received(count)
                    return count
                if count < 0:
                    self._read_record(flags)
                else:
                    self._truncated()

    def splice(self, pipe: int, count: int) -> int:
        """Move application data from the kernel into ``pipe``, uncopied; return the count, 0 after close_notify. Raises as ``recv_into``.

        ``LocalProtocolError`` where the receiving direction is not in the kernel: use ``recv_into``.
        """
        with self._rx_lock:
            while True:
                receiver = self._kernel_receiver()
                if receiver is None or self._early:
                    raise LocalProtocolError("only kernel TLS can splice")
                if self._rx_error is not None:
                    return self._end()
                if self._rx_special:
                    self._read_record(0)
                    continue
                try:
                    moved = receiver.splice(pipe, count)
                except ControlRecord:
                    moved = -1
                except OSError as error:
                    self._rx_failed(error)
                    raise
                if moved > 0:
                    self._received(moved)
                    return moved
                if moved < 0:
                    self._read_record(0)
                else:
                    self._truncated()

    def settle(self) -> None:
        """Handle control records that wait where ``poll`` does not show them. For callers who poll the descriptor by themselves, after each read.

        Errors are kept for the next read.
        """
        with self._rx_lock:
            try:
                while (
                    not self._rx_special
                    and (receiver := self._kernel_receiver()) is not None
                    and receiver.record_waits()
                ):
                    self._read_record(socket.MSG_DONTWAIT)
            except OSError as error:
                self._rx_failed(error)

    def _kernel_receiver(self) -> KernelReceiver | None:
        receiver = self.receiver
        if isinstance(receiver, CatchUpReceiver):
            return receiver.kernel()
        return receiver if isinstance(receiver, KernelReceiver) else None

    def _take_early(self, buffer: WriteBuffer, nbytes: int) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(self._early), nbytes or len(view))
        view[:count] = self._early[:count]
        self._early = self._early[count:]
        self._mark()
        return count

    def _mark(self) -> None:
        """Note whether the next read is a special case. Inside a handshake message every record is looked at, data too."""
        self._rx_special = (
            bool(self._early)
            or self._rx_error is not None
            or self._rx_install is not None
            or self.connection.fragment_pending
        )

    def _end(self) -> int:
        if isinstance(self._rx_error, OSError):
            raise self._rx_error.with_traceback(None)
        return 0

    def _received(self, count: int) -> None:
        self._rx_meter.used(count, count)
        self.connection.received_data(count)
        if self._rx_meter.due():
            number = self.receiver.sequence_number()
            with self._state_lock:
                self._owe(
                    self.connection.record_usage(
                        Direction.RX, number, octets=self._rx_meter.octets, now=self._clock()
                    )
                )
            self._rx_meter.looked(number, self.connection.record_limit(Direction.RX))
        if self._owed:
            self.run_owed()

    def _read_record(self, flags: int) -> None:
        """Read one record by the slow path and run what follows from it. Under the rx lock."""
        if self._rx_install is not None:
            self._install_rx(self._rx_install)
            return
        try:
            message = self.receiver.read_record(flags)
        except OSError as error:
            self._rx_failed(error)
            raise
        if message is None:
            self._truncated()
            return
        may_alert = self.connection.tx_state in (HalfState.OPEN, HalfState.EXHAUSTED)
        try:
            with self._state_lock:
                items = self.connection.process_message(message, now=self._clock())
                self._owe(items)
            for item in items:
                self._receive_item(item)
        except OSError as error:
            self._rx_failed(error, may_alert=may_alert)
            raise
        self._rx_meter.used(1, 0)
        self._mark()
        self.run_owed()

    def _receive_item(self, item: ConnectionState) -> None:
        match item:
            case UpdateRxKey():
                self._install_rx(item)
            case ApplicationData():
                self._early += item.data
            case SessionTicket():
                if self._on_ticket is not None:
                    self._on_ticket(item.message)
            case PeerClosed():
                self._rx_error = item
            case SendMessage() | UpdateTxKey() | Closed():
                pass  # queued already, or said by the state

    def _install_rx(self, item: UpdateRxKey) -> None:
        self._rx_install = item
        self._rx_special = True
        try:
            self.receiver.install(item.keys)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise KeyLimitError(
                "the peer changed its key, and this kernel can't change the receiving key"
            ) from error
        self._rx_install = None
        self.connection.rx_key_installed(item.generation)
        self._mark()
        self._rx_meter.key_changed()
        if self._on_key_change is not None:
            self._on_key_change()

    def _truncated(self) -> None:
        self._rx_error = TruncatedError(
            "the TCP connection ended without close_notify: the data may be incomplete"
        )
        self._mark()

    def _rx_failed(self, error: OSError, *, may_alert: bool | None = None) -> None:
        """Keep a fatal error of the receiving side, and answer it with the alert that it asks for. Under the rx lock."""
        if not isinstance(error, KTLSError) and error.errno not in DEAD_ERRNOS:
            return
        connection = self.connection
        if may_alert is None:
            may_alert = connection.tx_state in (HalfState.OPEN, HalfState.EXHAUSTED)
        self._rx_error = error
        self._rx_special = True
        if not isinstance(error, KTLSError):
            self._tx_error = self._tx_error or error  # the network is gone in both directions
            return
        alert = None
        if isinstance(error, RemoteProtocolError):
            alert = build_alert(error.alert)
        elif isinstance(error, KeyLimitError):
            alert = build_alert(AlertDescription.CLOSE_NOTIFY)
        with self._state_lock:
            connection.fail()
            if alert is not None and may_alert:
                self._owed.append(SendMessage(ContentType.ALERT, alert))
        self.run_owed()
