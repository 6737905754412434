"""Records protected in this process: the fallback, the opener of what was read past the handshake, and the reference in tests.

Same contract as ``kernel``, over the same sockets; the two mix freely, one direction each.

Theory of operation
-------------------
Sending: records are sealed into an output buffer that goes to TCP as it can. ``send`` seals only while that buffer is empty, and at most ``_BATCH`` bytes
at a time; so what it has accepted is at most one batch, and a batch that did not go out whole is pushed by whatever call comes next. ``flush`` must be called
before the socket is closed.

An exception of a signal handler may come after any call (see ``driver``). So a count and the buffer that it belongs to always move on together: what was sealed and did not
get into the buffer does not exist, and its number is still free.

Receiving: bytes are read ahead into a buffer and cut into records. With ``exact`` it never reads past the end of the current record, so that the kernel can take
over at a record boundary (see ``catchup``). A record that was opened and not wholly read is kept as a view.
"""

from __future__ import annotations

import os
import socket
from typing import Final, final

from ktls.protocol.enums import ContentType
from ktls.protocol.errors import KTLSError, RemoteProtocolError
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite

from .aead import HEADER_LENGTH, RecordProtection
from .interface import DEAD_ERRNOS, ControlRecord, LayerName, ReadBuffer, WriteBuffer
from .interruption import of_a_handler
from .refusal import refused_for_a_sender

__all__ = ("UserspaceReceiver", "UserspaceSender")

#: Plaintext sealed by one call of ``send``: big enough that the system call does not count, small enough to stay in cache.
_BATCH: Final = 8 * MAX_FRAGMENT
#: Bytes asked from TCP at once.
_READ_SIZE: Final = 64 * 1024


@final
class UserspaceSender:
    """``RecordSender`` with the AEADs of ``cryptography``."""

    __slots__ = ("_dead", "_number", "_out", "_protection", "_sock", "max_fragment")

    name: LayerName = "userspace"
    can_change_key = True

    def __init__(
        self,
        sock: socket.socket,
        suite: CipherSuite,
        keys: TrafficKeys,
        sequence_number: int = 0,
        *,
        max_fragment: int = MAX_FRAGMENT,
    ) -> None:
        self._sock = sock
        self._protection = RecordProtection(suite, keys, sequence_number)
        self._out = memoryview(b"")
        #: How many records have been put into the buffer.
        self._number = sequence_number
        self._dead: OSError | None = None
        self.max_fragment = max_fragment

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """See ``RecordSender``."""
        self.flush(flags)
        accepted = memoryview(data).cast("B")[:_BATCH]
        step = self.max_fragment
        seal = self._at_next().seal
        records = [
            seal(ContentType.APPLICATION_DATA, accepted[start : start + step])
            for start in range(0, len(accepted), step)
        ]
        self._push(b"".join(records), flags)
        return len(accepted)

    def send_vector(self, buffers: list[ReadBuffer], flags: int = 0) -> int:
        """See ``RecordSender``."""
        return self.send(b"".join(buffers), flags)

    def send_record(self, content_type: ContentType, fragment: bytes, flags: int = 0) -> None:
        """See ``RecordSender``."""
        self.flush(flags)
        self._push(self._at_next().seal(content_type, fragment), flags)

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """See ``RecordSender``. Reads the file into this process: no zero copy here."""
        self.flush()
        data = os.pread(fd, min(count, _BATCH), offset)
        return self.send(data) if data else 0

    def install(self, keys: TrafficKeys) -> None:
        """See ``RecordSender``. What was sealed before stays in front."""
        self._protection, self._number = RecordProtection(self._protection.suite, keys), 0

    def sequence_number(self) -> int:
        """See ``RecordSender``."""
        return self._number

    @property
    def unsent(self) -> bool:
        """See ``RecordSender``."""
        return len(self._out) > 0

    def flush(self, flags: int = 0) -> None:
        """See ``RecordSender``."""
        if self._dead is not None:
            raise type(self._dead)(self._dead.errno, self._dead.strerror)
        while self._out:
            sent: list[int] = []
            try:
                sent += map(self._sock.send, (self._out,), (flags,))  # one step: see interruption
            except OSError as error:
                if error.errno in DEAD_ERRNOS:
                    self._dead = error
                # The other direction may be the kernel's: TCP itself says none of these.
                refusal = refused_for_a_sender(self._sock, error.errno)
                if refusal is not None:
                    raise refusal from error
                raise
            finally:
                if sent:
                    self._out = self._out[sent[0] :]

    @property
    def sock(self) -> socket.socket:
        """The socket."""
        return self._sock

    def _at_next(self) -> RecordProtection:
        """Return the key, at the record that is next."""
        self._protection.sequence_number = self._number
        return self._protection

    def _push(self, records: bytes, flags: int) -> None:
        """Take ``records`` as accepted, and send what can be sent now."""
        before = self._number
        self._out, self._number = memoryview(records), self._protection.sequence_number
        try:
            self.flush(flags)
        except RemoteProtocolError:  # is told once; and then nothing is accepted
            if len(self._out) == len(records):
                self._out, self._number = memoryview(b""), before
            raise
        except OSError as error:
            # Accepted is accepted: the rest goes out with the next call, which also reports an error that lasts (no memory).
            if self._dead is not None or of_a_handler(error):
                raise


@final
class UserspaceReceiver:
    """``RecordReceiver`` with the AEADs of ``cryptography``.

    ``initial`` are bytes that were read from the socket before (the over-read of a handshake).
    """

    __slots__ = (
        "_buffer",
        "_dead",
        "_eof",
        "_exact",
        "_message",
        "_number",
        "_protection",
        "_sock",
    )

    name: LayerName = "userspace"
    can_change_key = True

    def __init__(
        self,
        sock: socket.socket,
        suite: CipherSuite,
        keys: TrafficKeys,
        sequence_number: int = 0,
        *,
        initial: bytes = b"",
        exact: bool = False,
    ) -> None:
        self._sock = sock
        self._protection = RecordProtection(suite, keys, sequence_number)
        self._buffer = bytearray(initial)
        #: How many records have left the buffer.
        self._number = sequence_number
        self._exact = exact
        #: The record that was opened and not wholly delivered.
        self._message: InboundPlainMessage | None = None
        self._dead: OSError | None = None
        self._eof = False

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """See ``RecordReceiver``."""
        while True:
            message = self._peek(flags)
            if message is None:
                return 0
            if message.content_type != ContentType.APPLICATION_DATA:
                raise ControlRecord
            if message.fragment:
                break
            raise ControlRecord  # an empty record: the connection counts those
        # Released at once: an error that is met behind the data is kept, and its frames with it; the caller could not resize its buffer.
        with (
            memoryview(buffer) as whole,
            whole.cast("B") as octets,
            octets[: nbytes or None] as view,
        ):
            return self._fill(view, message.fragment)

    def read_record(self, flags: int = 0) -> InboundPlainMessage | None:
        """See ``RecordReceiver``."""
        message = self._peek(flags)
        self._message = None
        return message

    def record_waits(self) -> bool:
        """See ``RecordReceiver``."""
        try:
            message = self._peek(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if message is None:
            return False
        return message.content_type != ContentType.APPLICATION_DATA or not message.fragment

    def install(self, keys: TrafficKeys) -> None:
        """See ``RecordReceiver``."""
        self._protection, self._number = RecordProtection(self._protection.suite, keys), 0

    def sequence_number(self) -> int:
        """See ``RecordReceiver``."""
        return self._number

    def pending(self) -> int:
        """See ``RecordReceiver``."""
        if self._message is not None:
            return max(1, len(self._message.fragment))
        # A refused record has left the socket, too.
        return 1 if isinstance(self._dead, KTLSError) else 0

    @property
    def unread(self) -> int:
        """How many bytes were read from TCP and not yet opened."""
        return len(self._buffer)

    @property
    def protection(self) -> RecordProtection:
        """The key at work, for a successor that takes over at a boundary."""
        return self._at_next()

    @property
    def at_boundary(self) -> bool:
        """Whether nothing at all is held: the next byte of the TCP stream begins a record."""
        return not self._buffer and self._message is None and not self._eof and self._dead is None

    def _fill(self, view: memoryview, fragment: bytes) -> int:
        """Deliver ``fragment``, and whole data records behind it as long as they are here and fit."""
        filled = 0
        while True:
            count = min(len(view) - filled, len(fragment))
            view[filled : filled + count] = fragment[:count]
            filled += count
            if count < len(fragment):
                self._message = InboundPlainMessage(ContentType.APPLICATION_DATA, fragment[count:])
                return filled
            self._message = None
            if self._missing() > 0:
                return filled
            try:
                # Also when there is no room for it: ``pending`` then shows what ``poll`` can't.
                message = self._open()
            except KTLSError:
                return filled  # what was good is delivered first; the next call raises it
            if filled == len(view) or message.content_type != ContentType.APPLICATION_DATA:
                return filled
            fragment = message.fragment
            if not fragment:
                return filled

    def _peek(self, flags: int) -> InboundPlainMessage | None:
        """Return the record that is next, opened but not taken, or None at the end of the stream."""
        if self._message is not None:
            return self._message
        if self._dead is not None:
            raise self._dead.with_traceback(None)
        while (missing := self._missing()) > 0:
            if self._eof:
                return (
                    None  # also inside a record: without close_notify it is a truncation either way
                )
            self._pull(missing if self._exact else max(missing, _READ_SIZE), flags)
        return self._open()

    def _pull(self, size: int, flags: int) -> None:
        """Read from TCP into the buffer."""
        came: list[bytes] = []
        try:
            came += map(self._sock.recv, (size,), (flags,))  # one step: see interruption
        except OSError as error:
            if error.errno in DEAD_ERRNOS:  # TCP reports it once, and then an orderly end
                self._dead = error
            raise
        finally:
            if came:
                self._eof = not came[0]
                self._buffer += came[0]

    def _at_next(self) -> RecordProtection:
        """Return the key, at the record that is next."""
        self._protection.sequence_number = self._number
        return self._protection

    def _missing(self) -> int:
        """How many bytes are known to be missing until a whole record is here."""
        have = len(self._buffer)
        if have < HEADER_LENGTH:
            return HEADER_LENGTH - have
        if self._protection.header_error(self._buffer) is not None:
            return 0  # ``_open`` refuses it at once
        length = int.from_bytes(self._buffer[3:HEADER_LENGTH], "big")
        return max(0, HEADER_LENGTH + length - have)

    def _open(self) -> InboundPlainMessage:
        """Open the record that is next and make it ``_message``."""
        protection = self._at_next()
        header = bytes(self._buffer[:HEADER_LENGTH])
        end = HEADER_LENGTH + int.from_bytes(header[3:], "big")
        try:
            with memoryview(self._buffer) as view, view[HEADER_LENGTH:end] as body:
                message = protection.open(header, body)
        except KTLSError as error:
            self._dead = error
            raise
        self._message, self._number = message, protection.sequence_number
        del self._buffer[:end]
        return message
