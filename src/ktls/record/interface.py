"""The contract of a record layer: two halves, so that the directions may live in different places.

A half protects (``RecordSender``) or opens (``RecordReceiver``) records on a connected TCP socket. It knows keys, records and bytes; it does not know what a
KeyUpdate means. The ``driver`` runs the commands of a ``KernelConnection`` over two halves and serialises the calls: no half is thread-safe.

Waiting is the front end's business. ``flags`` go down to the system call: ``MSG_DONTWAIT`` never waits, 0 follows the descriptor's own mode. A half that would have
to wait raises ``BlockingIOError`` and has then taken or given *nothing*.

A half is dead after its first fatal error and raises the same error again, whatever the layer below pretends (kernel TLS reports
some errors once, then waits for ever or drops data in silence).

``ktls.testing.check_record_layer`` is this contract as a test suite; it runs on every implementation.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from ktls.protocol.enums import Direction, KeyChangeCause

if TYPE_CHECKING:
    from ktls.protocol.enums import ContentType
    from ktls.protocol.key_schedule import TrafficKeys
    from ktls.protocol.states import InboundPlainMessage

__all__ = (
    "DEAD_ERRNOS",
    "ControlRecord",
    "KeyChangeObserver",
    "LayerName",
    "Lock",
    "ReadBuffer",
    "RecordReceiver",
    "RecordSender",
    "WriteBuffer",
)

#: Where a direction lives, as ``Offload.tx`` and ``Offload.rx`` say it.
LayerName: TypeAlias = Literal["kernel", "userspace", "engine"]

#: What guards a driver.
Lock: TypeAlias = "threading.Lock | threading.RLock"

#: Told after each change of a key which direction's it was, and why. Must not raise, nor call the connection.
KeyChangeObserver: TypeAlias = Callable[[Direction, KeyChangeCause], None]

ReadBuffer: TypeAlias = bytes | bytearray | memoryview
WriteBuffer: TypeAlias = bytearray | memoryview

#: After one of these the connection is gone for good. Other errors (no memory, a bad file given to ``sendfile``) say nothing about it.
#: Nor does EBADMSG from a kernel's sender: it is the receiving half's error, and the alert about it can go out once that half has read it.
DEAD_ERRNOS: Final = frozenset(
    {
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
    }
)


class ControlRecord(Exception):
    """Not an error: the next record is not application data; ``read_record`` will return it."""


class RecordSender(Protocol):
    """Seals records and sends them."""

    #: Which layer this is.
    name: LayerName
    #: Whether ``install`` works a second time.
    can_change_key: bool
    #: Largest plaintext of one record, in bytes.
    max_fragment: int

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """Send application data, as many records as needed; return how many bytes were accepted, at least 1.

        Accepted bytes need no further call to be delivered, unless ``unsent`` says so, and except ``flush`` before closing. Raises ``OSError``, and
        ``RemoteProtocolError`` if this is how the layer learns that the peer broke the rules. So do the others that send.
        """
        ...

    def send_vector(self, buffers: list[ReadBuffer], flags: int = 0) -> int:
        """Send ``buffers`` (1 or more, none of them empty) as if they were one piece; return as ``send``."""
        ...

    def send_record(self, content_type: ContentType, fragment: bytes, flags: int = 0) -> None:
        """Send ``fragment`` (1 to ``max_fragment`` bytes) as one record: all of it, or ``BlockingIOError``."""
        ...

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """Send up to ``count`` bytes of the file ``fd`` from ``offset`` as application data; 0 means end of file."""
        ...

    def install(self, keys: TrafficKeys) -> None:
        """Protect everything from here on with ``keys``, sequence number 0. ``OSError`` if refused; the old key is then still in force."""
        ...

    @property
    def unsent(self) -> bool:
        """Whether accepted bytes are still in this process: then nothing but a further call (``flush``) moves them."""
        ...

    def sequence_number(self) -> int:
        """Return the number of the next record under the current key: how many it has sealed."""
        ...

    def flush(self, flags: int = 0) -> None:
        """Hand to TCP whatever is still held above it; ``BlockingIOError`` if that can't be done yet.

        Only after it has returned may the socket be shut down or closed without losing accepted bytes.
        """
        ...


class RecordReceiver(Protocol):
    """Receives records and opens them."""

    @property
    def name(self) -> LayerName:
        """Which layer this is."""
        ...

    @property
    def can_change_key(self) -> bool:
        """Whether ``install`` works a second time."""
        ...

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive application data into ``buffer`` (``nbytes`` at most, 0 for all of it); return the count, 0 at the end of the TCP stream.

        Raises ``ControlRecord`` if the next record is of another type, ``RemoteProtocolError`` if a record can't be opened
        (bad_record_mac, record_overflow, ...): the connection has then failed.
        """
        ...

    def read_record(self, flags: int = 0) -> InboundPlainMessage | None:
        """Return the next record, of whatever type (the unread rest of a data record that was begun), or None at the end of the TCP stream."""
        ...

    def record_waits(self) -> bool:
        """Whether a record without application data is next, or a fatal error (which may be raised here already).

        Never waits, and takes nothing. May read ahead into this process.
        """
        ...

    def install(self, keys: TrafficKeys) -> None:
        """Open everything from here on with ``keys``, sequence number 0. To be called right after a KeyUpdate was read."""
        ...

    def sequence_number(self) -> int:
        """Return the number of the next record under the current key. Records are counted when opened, which may be before they are delivered."""
        ...

    def pending(self) -> int:
        """Return how many decrypted bytes are held in this process, invisible to ``poll``; at least 1 if a read would tell anything else from here."""
        ...
