"""The receiving half of a driver: application data, and every other record by a slow path through the connection.

See ``driver`` for the theory. A receiving key is installed before anything more is read.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final, final

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import AlertDescription, Direction, KeyChangeCause
from ktls.protocol.errors import (
    KeyLimitError,
    KTLSError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from ktls.protocol.messages import build_alert
from ktls.protocol.states import (
    ApplicationData,
    Closed,
    ConnectionState,
    HalfState,
    InboundPlainMessage,
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
    KeyChangeObserver,
    Lock,
    RecordReceiver,
    WriteBuffer,
)
from .interruption import acquire_and_note, of_a_handler, torn
from .kernel import KernelReceiver
from .meter import Meter
from .sending import SendingHalf

__all__ = ("MORE", "ReceivingHalf")

#: What ``read_now`` returns instead of going on with records that are not data: whoever has other connections lets them have their turn, then comes back.
MORE: Final = -2
#: As many of them are dealt with at once.
_RECORDS_AT_ONCE: Final = 64
#: Bytes received between two looks at the kernel's counter, at least: near the limit every record would be looked at.
_RX_STEP: Final = 16 * 1024


@final
class ReceivingHalf:
    """Everything that comes in. What is owed in answer goes to ``sending``. ``locks``: rx and state."""

    __slots__ = (
        "_awaited",
        "_clock",
        "_connection",
        "_early",
        "_end",
        "_granted",
        "_install",
        "_lock",
        "_meter",
        "_on_key_change",
        "_on_ticket",
        "_reading",
        "_receiver",
        "_sending",
        "_sock",
        "_special",
        "_state_lock",
        "grant",
    )

    def __init__(
        self,
        connection: KernelConnection,
        receiver: RecordReceiver,
        sending: SendingHalf,
        locks: tuple[Lock, Lock],
        *,
        on_ticket: Callable[[bytes], None] | None,
        on_key_change: KeyChangeObserver | None,
        clock: Callable[[], float],
        direct: bool,
    ) -> None:
        """``direct``: all calls come from one thread, so that reading may do without a look at anything but ``grant``."""
        self._connection = connection
        self._receiver = receiver
        self._sending = sending
        self._on_ticket = on_ticket
        self._on_key_change = on_key_change
        self._clock = clock
        self._lock, self._state_lock = locks
        self._meter = Meter(connection.limits, clock, _RX_STEP)
        #: None: open. PeerClosed: the end, in order. An error: raised by every further read.
        self._end: OSError | PeerClosed | None = None
        #: A key that the layer has refused for now (no memory): nothing is read before it is in.
        self._install: UpdateRxKey | None = None
        #: Whether the last reader was told to wait: it may poll now, and would not hear of what somebody else takes from TCP.
        self._awaited = False
        #: Whether a record was begun to be read, and not everything that follows from it is done. Guarded by the rx lock: who finds it there finds a torn one.
        self._reading = False
        #: Application data that a slow path met.
        self._early = b""
        #: Whether any of the above makes the next read a special case.
        self._special = False
        kernel = receiver if direct and isinstance(receiver, KernelReceiver) else None
        self._sock = kernel.sock if kernel is not None else None
        #: Bytes that may be read right away: nothing is special, no limit is near. 0: look first.
        self.grant = self._granted = 0

    @property
    def peer_closed(self) -> bool:
        """Whether the peer's close_notify was received."""
        return isinstance(self._end, PeerClosed)

    def pending(self) -> int:
        """Return how many decrypted bytes are held in this process, invisible to ``poll``."""
        return len(self._early) + self._receiver.pending()

    def read_now(self, buffer: WriteBuffer) -> int:
        """As ``recv_into`` on a socket that never waits, but -1 if nothing is there: that is no exception for a loop that always reads until then.

        ``MORE``: a flood of records that bring no data; call again soon, also if ``poll`` does not say so.
        """
        if self.grant > 0 and self._sock is not None:
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                return -1
            except OSError as error:
                self._met(error)
                count = 0
            if count:
                self.grant -= count
                return count
        try:
            return self.recv_into(buffer, records=_RECORDS_AT_ONCE)
        except BlockingIOError:
            return -1

    def _met(self, error: OSError) -> None:
        """Deal with what a read met that went past the receiver: a control record, or an error that may be told only once."""
        receiver = self._receiver
        assert isinstance(receiver, KernelReceiver)
        with self._lock:
            self._look_first()  # the grant ends here: after an error, nothing is read past it
            found = receiver.translate(error)
            if isinstance(found, OSError):
                self._failed(found)
                raise found
            try:
                self._read_record(0)
            except BlockingIOError:
                pass

    def _look_first(self) -> None:
        """Let nothing be read without a look at everything, and count what was. Under the rx lock."""
        if self._reading:
            self._fail_torn()
        if self._granted:
            taken = self._granted - self.grant
            self.grant = self._granted = 0
            self._meter.used(taken, taken)
            self._connection.received_data(taken)

    def recv_into(
        self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0, *, records: int = sys.maxsize
    ) -> int:
        """Receive application data; return the count, 0 after the peer's close_notify.

        Raises ``BlockingIOError``, ``TruncatedError`` (TCP ended without close_notify), ``RemoteProtocolError``, ``AlertReceived``, ``KeyLimitError`` (the peer
        changed its key and this layer can't), ``OSError`` from the network. All but the first are raised by every further call too.

        Returns ``MORE`` after so many ``records`` that were no data.
        """
        with self._lock:
            self._awaited = False
            self._look_first()
            for _ in range(records):
                if self._special:
                    if self._early:
                        return self._take_early(buffer, nbytes)
                    if self._end is not None:
                        return self._at_end()
                    self._read_record(flags)
                    continue
                try:
                    count = self._receiver.recv_into(buffer, nbytes, flags)
                except ControlRecord:
                    count = -1
                except OSError as error:
                    self._failed(error)
                    raise
                if count > 0:
                    self._received(count)
                    return count
                if count < 0:
                    self._read_record(flags)
                else:
                    self._truncated()
            return MORE

    def splice(self, pipe: int, count: int) -> int:
        """Move application data from the kernel into ``pipe``, uncopied; return the count, 0 after close_notify. Raises as ``recv_into``.

        ``LocalProtocolError`` where the receiving direction is not in the kernel: use ``recv_into``.
        """
        with self._lock:
            self._look_first()
            while True:
                receiver = self._kernel_receiver()
                if receiver is None or self._early:
                    raise LocalProtocolError("only kernel TLS can splice")
                if self._end is not None:
                    return self._at_end()
                if self._special:
                    self._read_record(0)
                    continue
                try:
                    moved = receiver.splice(pipe, count)
                except ControlRecord:
                    moved = -1
                except OSError as error:
                    self._failed(error)
                    raise
                if moved > 0:
                    self._received(moved)
                    return moved
                if moved < 0:
                    self._read_record(0)
                else:
                    self._truncated()

    def settle(self, *, read_ahead: bool = False) -> None:
        """Handle control records that are next, without waiting, and without taking application data. Errors are kept for the next read.

        In the kernel these may be records that ``poll`` does not show. In user space it takes ``read_ahead``, and then data may end up in this
        process (``pending``) that ``poll`` does not show; so nothing is done there after a read that would have blocked, until the next read.
        """
        held: list[bool] = []
        try:
            if not acquire_and_note(held, self._lock, 0):
                return  # a reader is at work: it meets everything
            self._look_first()
            while not self._early and self._end is None:
                if self._install is None:
                    may_take = read_ahead and not self._awaited
                    layer = self._kernel_receiver() or (self._receiver if may_take else None)
                    if layer is None or not layer.record_waits():
                        return
                self._read_record(socket.MSG_DONTWAIT)
        except OSError as error:
            self._failed(error)
        finally:
            if held and held[0]:
                self._lock.release()

    def _kernel_receiver(self) -> KernelReceiver | None:
        receiver = self._receiver
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
        held = self._early or self._end is not None or self._install is not None
        self._special = bool(held) or self._connection.fragment_pending

    def _at_end(self) -> int:
        if isinstance(self._end, OSError):
            raise self._end.with_traceback(None)
        return 0

    def _received(self, count: int) -> None:
        self._meter.used(count, count)
        self._connection.received_data(count)
        if self._meter.due():
            self._look_at_rx()
        if self._sending.owes:
            self._sending.run_owed()
        if self._sock is not None:
            self.grant = self._granted = self._meter.spare()

    def _look_at_rx(self) -> None:
        octets, now = self._meter.octets, self._clock()
        try:
            number = self._receiver.sequence_number()
        except OSError as error:
            if of_a_handler(error):
                raise
            return  # what was received belongs to the caller; the next read looks again
        with self._state_lock:
            self._sending.follow(
                lambda: self._connection.record_usage(Direction.RX, number, octets=octets, now=now)
            )
        self._meter.looked(number, self._connection.record_limit(Direction.RX))

    def _read_record(self, flags: int) -> None:
        """Read one record by the slow path and run what follows from it. Under the rx lock."""
        self._look_first()
        if self._install is not None:
            try:
                self._install_key(self._install)
            except OSError as error:
                self._failed(error)
                raise
            return
        self._reading = True
        try:
            message = self._receiver.read_record(flags)
            if message is None:
                self._truncated()
            else:
                for item in self._process(message):
                    self._receive_item(item)
                self._meter.used(1, 0)
                self._mark()
        except OSError as error:
            self._failed(error)
            self._reading = False
            raise
        else:
            self._reading = False
        finally:
            self._sending.run_owed()

    def _fail_torn(self) -> None:
        """Fail: a record was taken, and not all that follows from it was done. Under the rx lock."""
        self._reading = False
        self._failed(error := torn("the reading of a record"))
        raise error

    def _process(self, message: InboundPlainMessage) -> Sequence[ConnectionState]:
        """Let the connection say what follows, and queue what is to be sent. No sender may see a failure without its reason."""
        now = self._clock()
        with self._state_lock:
            may_alert = self._may_alert()
            try:
                return self._sending.follow(
                    lambda: self._connection.process_message(message, now=now)
                )
            except KTLSError as error:
                if isinstance(error, LocalProtocolError) and self._sending.failure is not None:
                    raise self._sending.failure from None  # it has failed before, and here is why
                self._fail(error, may_alert)
                raise

    def _receive_item(self, item: ConnectionState) -> None:
        match item:
            case UpdateRxKey():
                self._install_key(item)
            case ApplicationData():
                self._early += item.data
            case SessionTicket():
                if self._on_ticket is not None:
                    self._on_ticket(item.message)
            case PeerClosed():
                self._end = item
                self._read_no_more()
            case SendMessage() | UpdateTxKey() | Closed():
                pass  # queued already, or said by the state

    def _install_key(self, item: UpdateRxKey) -> None:
        self._install = item
        self._special = True
        try:
            self._receiver.install(item.keys)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise KeyLimitError(
                "the peer changed its key, and this kernel can't change the receiving key"
            ) from error
        self._install = None
        self._connection.rx_key_installed(item.generation)
        self._mark()
        self._meter.key_changed()
        if self._on_key_change is not None:
            self._on_key_change(Direction.RX, KeyChangeCause.PEER)

    def _truncated(self) -> None:
        failure = self._sending.failure
        if isinstance(failure, RemoteProtocolError):
            self._end = failure  # a send was told, and ended reading
        else:
            self._end = TruncatedError(
                "the TCP connection ended without close_notify: the data may be incomplete"
            )
        self._mark()

    def _failed(self, error: OSError) -> None:
        """Keep a fatal error of the receiving side, and answer it with the alert that it asks for; a signal handler's goes on. Under the rx lock."""
        if of_a_handler(error):
            raise error
        if isinstance(error, KTLSError):
            with self._state_lock:
                self._fail(error, self._may_alert())
            self._sending.run_owed()
        elif error.errno == errno.EAGAIN:
            self._awaited = True
        elif error.errno in DEAD_ERRNOS:
            self._end = error
            self._special = True
            self._sending.network_failed(error)

    def _read_no_more(self) -> None:
        """What still comes is nobody's business: the sending half must not stumble over what the kernel finds in it."""
        receiver = self._receiver
        if receiver.name == "kernel" and (kernel := self._kernel_receiver()) is not None:
            self._sending.look_first()
            self._sending.unread = kernel.sock

    def _may_alert(self) -> bool:
        return self._connection.tx_state in (HalfState.OPEN, HalfState.EXHAUSTED)

    def _fail(self, error: KTLSError, may_alert: bool) -> None:
        """Under both locks. Repeating it does nothing more: there is one alert."""
        self._end = error
        self._special = True
        self._read_no_more()
        alert = None
        if isinstance(error, RemoteProtocolError):
            alert = build_alert(error.alert)
        elif isinstance(error, KeyLimitError):
            alert = build_alert(AlertDescription.CLOSE_NOTIFY)
        self._connection.fail()
        self._sending.failure = error
        if alert is not None and may_alert:
            self._sending.alert(alert)
