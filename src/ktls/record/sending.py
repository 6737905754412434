"""The sending half of a driver: application data, and the queue of owed commands in front of it.

See ``driver`` for the theory. The queue is the only place where a sending command waits, and it leaves it only when done.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final, final

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import ContentType, Direction
from ktls.protocol.errors import (
    KeyLimitError,
    KTLSError,
    LocalProtocolError,
    RemoteProtocolError,
)
from ktls.protocol.messages import build_alert
from ktls.protocol.states import ConnectionState, HalfState, SendMessage, UpdateTxKey
from ktls.protocol.suites import MAX_FRAGMENT

from .interface import DEAD_ERRNOS, KeyChangeObserver, Lock, ReadBuffer, RecordSender
from .interruption import acquire_and_note, of_a_handler, torn
from .kernel import KernelSender
from .meter import Meter
from .userspace import UserspaceSender

__all__ = ("SendingHalf",)

#: A full fragment has 2^14 bytes.
_FRAGMENT_BITS: Final = 14


def _beginning(buffers: list[ReadBuffer], count: int) -> list[ReadBuffer]:
    """Return the first ``count`` bytes of ``buffers``."""
    for position, buffer in enumerate(buffers):
        if len(buffer) > count:
            return (
                [*buffers[:position], memoryview(buffer)[:count]] if count else buffers[:position]
            )
        count -= len(buffer)
    return buffers


@final
class SendingHalf:
    """Everything that goes out. ``locks``: tx, and state, which guards the connection and is shared with the receiving half."""

    __slots__ = (
        "_advancing",
        "_clock",
        "_connection",
        "_direct",
        "_error",
        "_granted",
        "_lock",
        "_meter",
        "_on_key_change",
        "_owed",
        "_sender",
        "_state_lock",
        "_tried",
        "failure",
        "grant",
        "unread",
    )

    def __init__(
        self,
        connection: KernelConnection,
        sender: RecordSender,
        locks: tuple[Lock, Lock],
        *,
        on_key_change: KeyChangeObserver | None,
        clock: Callable[[], float],
        direct: bool,
    ) -> None:
        """``direct``: all calls come from one thread, so that data may go out without a look at anything but ``grant``."""
        self._connection = connection
        self._sender = sender
        self._on_key_change = on_key_change
        self._clock = clock
        self._lock, self._state_lock = locks
        #: A list, not a deque, which takes 600 bytes empty; it never has more than a handful.
        #: None until something is: most connections never owe anything.
        self._owed: list[SendMessage | UpdateTxKey] | None = None
        self._meter = Meter(connection.limits, clock)
        #: Whether the connection is being asked for commands that are not in the queue yet. Guarded by the state lock: who finds it there finds a torn change.
        self._advancing = False
        #: The message that was tried last, and the number of its record.
        self._tried: tuple[SendMessage, int] | None = None
        #: A network error, or the end of the key: raised by every further ``send``.
        self._error: OSError | None = None
        #: What made the connection fail: the receiving half found it, or the kernel told a send.
        self.failure: OSError | None = None
        #: The socket, once nobody reads it any more while the kernel goes on looking at what comes.
        self.unread: socket.socket | None = None
        self._direct = direct and sender.name == "kernel" and sender.max_fragment == MAX_FRAGMENT
        #: Records that may be sent right away: nothing is owed, nothing has failed, no limit is near. 0: look first.
        self.grant = self._granted = 0

    @property
    def owes(self) -> bool:
        """Whether commands, or bytes sealed already, wait in this process for room in TCP's buffer."""
        return bool(self._owed) or self._sender.unsent

    @property
    def unsent(self) -> bool:
        """Whether accepted data waits in this process: then nothing but a further call moves it."""
        return self._sender.unsent

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """Send application data; return how many bytes were accepted (0 only for no data).

        Raises ``BlockingIOError`` (nothing taken), ``KeyLimitError``, ``LocalProtocolError`` (our side is closed), ``OSError`` from the network; after the
        last, every further call raises it again.
        """
        size = len(data)
        grant = self.grant
        if grant > size >> _FRAGMENT_BITS:
            try:
                sent = self._sender.send(data, flags)
            except OSError as error:
                self._failed(error)
                raise
            self.grant = grant - (sent >> _FRAGMENT_BITS) - 1
            return sent
        if not size:
            return 0
        try:
            with self._lock:
                self._prepare_data(flags)
                allowance = self._meter.allowance(self._sender.max_fragment)
                try:
                    sent = self._sender.send(
                        data if size <= allowance else memoryview(data)[:allowance], flags
                    )
                except OSError as error:
                    self._failed(error)
                    raise
                self._meter.used(-(-sent // self._sender.max_fragment), sent)
                if self._direct and not self._owed and self.unread is None:
                    self.grant = self._granted = self._meter.spare()
        finally:
            self._released()
        return sent

    def send_vector(self, buffers: list[ReadBuffer], flags: int = 0) -> int:
        """Send ``buffers``, none of them empty, as if they were one piece; return how many bytes were accepted. Raises as ``send``."""
        sender = self._sender
        return self._send_at_most(
            lambda allowance: sender.send_vector(_beginning(buffers, allowance), flags), flags
        )

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """Send up to ``count`` bytes of a file from ``offset``; return how many were accepted, 0 at the end of the file. Raises as ``send``."""
        sender = self._sender
        return self._send_at_most(
            lambda allowance: sender.sendfile(fd, offset, min(count, allowance)), 0
        )

    def _send_at_most(self, attempt: Callable[[int], int], flags: int) -> int:
        """Let ``attempt`` send up to as many bytes as it is told, and count them. As ``send``, which does without the extra call."""
        try:
            with self._lock:
                self._prepare_data(flags)
                try:
                    sent = attempt(self._meter.allowance(self._sender.max_fragment))
                except OSError as error:
                    self._failed(error)
                    raise
                self._meter.used(-(-sent // self._sender.max_fragment), sent)
        finally:
            self._released()
        return sent

    def refresh_traffic_keys(self, request_peer: bool = False, flags: int = 0) -> None:
        """Change our key, and ask the peer for a new one with ``request_peer``.

        ``LocalProtocolError``: nothing happened. ``BlockingIOError``: it will happen, in order, before the next data.
        """
        now = self._clock()
        with self._state_lock:
            self.follow(lambda: self._connection.refresh_traffic_keys(request_peer, now=now))
        self._run(flags)

    def close_notify(self, flags: int = 0, *, patience: float = -1) -> None:
        """Close our side with close_notify, after everything owed. ``BlockingIOError``: call again; doing so repeats nothing.

        ``patience``: seconds to wait for another thread that is sending; -1: for ever.
        """
        with self._state_lock:
            self.follow(self._connection.close)
        self._run(flags, patience)

    def _run(self, flags: int, patience: float = -1) -> None:
        held: list[bool] = []
        try:
            if not acquire_and_note(held, self._lock, patience):
                raise BlockingIOError(errno.EAGAIN, "another thread is sending")
            self._run_owed(flags)
        finally:
            if held and held[0]:
                self._lock.release()
                self._released()

    def _released(self) -> None:
        """To be called after the lock was released, always: a reader that owed something in the meantime found it taken, and went on."""
        if self._owed:
            self.run_owed()

    def run_owed(self) -> None:
        """Run what is owed as far as it goes without waiting, for a lock or for TCP. Never raises but for a signal handler: a later send reports the error."""
        while self.owes:
            held: list[bool] = []
            try:
                if not acquire_and_note(held, self._lock, 0):
                    return
                self._run_owed(socket.MSG_DONTWAIT)
                if self._sender.unsent:
                    self._flush(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if of_a_handler(error):
                    raise
                return  # kept in _error, or in failure
            finally:
                if held and held[0]:
                    self._lock.release()

    def flush(self, flags: int = 0) -> None:
        """Hand to TCP whatever the sending layer still holds; ``BlockingIOError`` if that can't be done yet."""
        try:
            with self._lock:
                self._flush(flags)
        finally:
            self._released()

    def _flush(self, flags: int) -> None:
        """Under the tx lock."""
        try:
            self._sender.flush(flags)
        except OSError as error:
            self._failed(error)
            raise

    def follow(self, ask: Callable[[], Sequence[ConnectionState]]) -> Sequence[ConnectionState]:
        """Return what follows in the connection from ``ask``, and queue the sending commands of it: all of them, or the connection has failed. Under the state lock."""
        self.look_first()
        self._look_for_tear()
        self._advancing = True
        try:
            items = ask()
        except KTLSError:
            self._advancing = False
            raise
        self.owe(items)
        self._advancing = False
        return items

    def owe(self, items: Iterable[ConnectionState]) -> None:
        """Queue the sending commands among ``items``. Under the state lock.

        All in one step: whoever holds the tx lock runs what is there, and then sends data. Between a KeyUpdate and its key there must be none.
        """
        self.look_first()
        self._append([item for item in items if isinstance(item, SendMessage | UpdateTxKey)])

    def _look_for_tear(self) -> None:
        """Under the state lock. The secrets may have moved on, and nobody knows the commands: nothing can be sent any more."""
        if self._advancing:
            self._advancing = False
            self._connection.fail()
            self._error = self.failure = torn("a change of keys")
            raise self._error

    def look_first(self) -> None:
        """Let nothing go out without a look at everything, and count what did."""
        if self._granted:
            self._meter.used(self._granted - self.grant, 0)
            self.grant = self._granted = 0

    def _forget_what_came(self) -> None:
        """Clear the kernel's error about a record that nobody will read: it would be told to whoever sends, and again and again."""
        if self.unread is None:
            return
        number = self.unread.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number in DEAD_ERRNOS:
            error = OSError(number, os.strerror(number))
            self._failed(error)
            raise error

    def _prepare_data(self, flags: int) -> None:
        """Make sure that application data may go out now. Under the tx lock."""
        self.look_first()
        if self._advancing:
            with self._state_lock:  # in another thread it ends
                self._look_for_tear()
        if self._owed:
            try:
                self._run_owed(flags)
            except BlockingIOError:
                if self._connection.tx_state is HalfState.FAILED:
                    self._refuse_data(flags)  # whoever sends need not wait for the alert
                raise
        if self._error is not None:
            raise self._error.with_traceback(None)
        if self._meter.due():
            self._look_at_tx()
            self._run_owed(flags)
        if self._connection.tx_state is not HalfState.OPEN:
            self._refuse_data(flags)
        self._forget_what_came()

    def _look_at_tx(self) -> None:
        number, octets, now = self._sender.sequence_number(), self._meter.octets, self._clock()
        with self._state_lock:
            self.follow(
                lambda: self._connection.record_usage(Direction.TX, number, octets=octets, now=now)
            )
        self._meter.looked(number, self._connection.record_limit(Direction.TX))

    def _refuse_data(self, flags: int) -> None:
        state = self._connection.tx_state
        if state is HalfState.EXHAUSTED:
            self._error = KeyLimitError(
                "the sending key has reached its limit, or the peer asked for a new one, and this connection can't change it"
            )
            with self._state_lock:
                self.follow(self._connection.close)
            self._run_owed(flags)
            raise self._error
        if state is HalfState.FAILED:
            # Whoever let the connection fail holds the lock until the reason is known.
            with self._state_lock:
                failure = self.failure
            if failure is not None:
                raise failure.with_traceback(None)
        raise LocalProtocolError("the sending side is closed")

    def _run_owed(self, flags: int) -> None:
        """Run the queue; leave what would block. Under the tx lock."""
        owed = self._owed
        while owed:
            if self._error is not None and not isinstance(self._error, KTLSError):
                # Found by a reader, maybe: the kernel would take the records now, and drop them.
                owed.clear()
                raise self._error.with_traceback(None)
            self._forget_what_came()
            item = owed[0]
            try:
                if isinstance(item, SendMessage):
                    self._send_once(item, flags)
                else:
                    self._install(item)
            except OSError as error:
                self._failed(error)
                raise
            del owed[0]
            if isinstance(item, UpdateTxKey) and self._on_key_change is not None:
                self._on_key_change(Direction.TX, item.cause)

    def _send_once(self, item: SendMessage, flags: int) -> None:
        """Send the head of the queue, unless that was done already, when an exception of a signal handler kept it from leaving the queue."""
        number = self._sender.sequence_number()
        if self._tried is None or self._tried[0] is not item or self._tried[1] == number:
            self._tried = item, number
            self._sender.send_record(item.content_type, item.fragment, flags)
        self._meter.used(1, 0)

    def _install(self, item: UpdateTxKey) -> None:
        """Repeating it changes nothing, as long as nothing was sent."""
        try:
            self._sender.install(item.keys)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EINVAL):
                raise
            # The peer waits for the new key, and we only have the old one: not even close_notify can be said any more.
            self._error = KeyLimitError("the kernel refused the new sending key")
            with self._state_lock:
                self._connection.fail()
                self.failure = self._error
                if self._owed:
                    self._owed.clear()
            raise self._error from error
        with self._state_lock:
            self._connection.tx_key_installed(item.generation)
        self._meter.key_changed()

    def network_failed(self, error: OSError) -> None:
        """Note that the receiving half found the network gone."""
        self.look_first()
        self._error = self._error or error

    def alert(self, fragment: bytes) -> None:
        """Queue an alert behind what is owed already. Under the state lock."""
        self.look_first()
        self._append([SendMessage(ContentType.ALERT, fragment)])

    def _append(self, commands: list[SendMessage | UpdateTxKey]) -> None:
        """Under the state lock: the list is made once, and then stays the same object for whoever works on it."""
        if self._owed is None:
            if commands:
                self._owed = commands
        else:
            self._owed += commands

    def _failed(self, error: OSError) -> None:
        """Remember a network error: the kernel reports it once, and then pretends to send. And what the peer did wrong, if a send is told first. Under the tx lock."""
        if error.errno in DEAD_ERRNOS:
            self.look_first()
            self._error = self._error or error
        elif isinstance(error, RemoteProtocolError):
            if isinstance(self._sender, KernelSender | UserspaceSender):
                self.unread = self._sender.sock
            with self._state_lock:
                if self.failure is None:
                    self.failure = error
                    may_alert = self._connection.tx_state in (HalfState.OPEN, HalfState.EXHAUSTED)
                    self._connection.fail()
                    if may_alert:
                        self.alert(build_alert(error.alert))
            if self._direct:  # else it goes out when the lock is released
                self.run_owed()
