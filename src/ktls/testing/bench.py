"""The bench on which a record layer is checked: a fresh connection for each case, the layer at one end, a ``RecordPeer`` at the other."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, final

from ktls.protocol.enums import ContentType, ProtocolVersion
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.interface import ControlRecord, RecordReceiver, RecordSender

from .peers import RecordPeer, eventually, fill_up, loopback_pair, made_up_keys, turns

__all__ = (
    "DATA",
    "RESET_ERRNOS",
    "SIZES",
    "Bench",
    "Case",
    "MakeReceiver",
    "MakeSender",
    "deliver",
    "error_of",
    "expect",
    "fill",
    "flushed",
    "receive",
    "reset_noticed",
)

DATA: Final = ContentType.APPLICATION_DATA
#: Around the size of a record, and many records.
SIZES: Final = (1, MAX_FRAGMENT - 1, MAX_FRAGMENT, MAX_FRAGMENT + 1, 2**20)
#: Small enough to fill quickly, large enough for a record.
_SMALL: Final = 16 * 1024


class MakeSender(Protocol):
    """Makes a sender on a connected socket."""

    def __call__(
        self,
        sock: socket.socket,
        suite: CipherSuite,
        keys: TrafficKeys,
        sequence_number: int,
        max_fragment: int,
        /,
    ) -> RecordSender: ...


class MakeReceiver(Protocol):
    """Makes a receiver on a connected socket."""

    def __call__(
        self, sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, sequence_number: int, /
    ) -> RecordReceiver: ...


def expect(condition: object, what: str) -> None:
    """Raise ``AssertionError`` unless ``condition``; not a bare assert, which ``-O`` drops."""
    if not condition:
        raise AssertionError(what)


def error_of(action: Callable[[], object]) -> BaseException:
    """Return what ``action`` raises."""
    try:
        result = action()
    except Exception as error:
        return error
    raise AssertionError(f"nothing was raised, but {result!r} returned")


@final
@dataclass(frozen=True, slots=True)
class Bench:
    """What is checked, and with which cipher suite."""

    suite: CipherSuite
    make_sender: MakeSender | None
    make_receiver: MakeReceiver | None
    #: Whether the sender can be told to make smaller records.
    limits_fragments: bool

    @property
    def is_tls13(self) -> bool:
        """Whether the suite is one of TLS 1.3."""
        return self.suite.version is ProtocolVersion.TLSv1_3

    @contextlib.contextmanager
    def sending(
        self, *, small: bool = False, sequence_number: int = 0, max_fragment: int = MAX_FRAGMENT
    ) -> Iterator[tuple[RecordSender, RecordPeer, socket.socket]]:
        """Connect; give the sender under test, its peer, and the sender's socket."""
        size = _SMALL if small else None
        with loopback_pair(sndbuf=size, rcvbuf=size) as (ours, theirs):
            keys = made_up_keys(self.suite, "us")
            if self.make_sender is None:
                raise AssertionError("no sender to check")
            sender = self.make_sender(ours, self.suite, keys, sequence_number, max_fragment)
            peer = RecordPeer(theirs, self.suite, rx_sequence_number=sequence_number)
            yield sender, peer, ours

    @contextlib.contextmanager
    def receiving(
        self, *, sequence_number: int = 0
    ) -> Iterator[tuple[RecordReceiver, RecordPeer, socket.socket]]:
        """Connect; give the receiver under test, its peer, and the receiver's socket."""
        with loopback_pair() as (ours, theirs):
            keys = made_up_keys(self.suite, "peer")
            if self.make_receiver is None:
                raise AssertionError("no receiver to check")
            receiver = self.make_receiver(ours, self.suite, keys, sequence_number)
            yield receiver, RecordPeer(theirs, self.suite, tx_sequence_number=sequence_number), ours


Case: TypeAlias = Callable[[Bench], None]


def deliver(sender: RecordSender, peer: RecordPeer, data: bytes) -> bytes:
    """Send ``data`` without waiting, reading at the other end whenever there is no room; return what came out there."""
    view = memoryview(data)
    arrived = bytearray()
    sent = 0
    for _ in turns("all data sent and arrived"):
        if sent == len(view):
            break
        try:
            accepted = sender.send(view[sent:], socket.MSG_DONTWAIT)
        except BlockingIOError:
            _collect(peer, arrived)
            continue
        expect(0 < accepted <= len(view) - sent, f"send returned {accepted}")
        sent += accepted
    for _ in turns("all data arrived"):
        if len(arrived) >= len(view):
            break
        with contextlib.suppress(BlockingIOError):
            sender.flush(socket.MSG_DONTWAIT)
        _collect(peer, arrived)
    return bytes(arrived)


def _collect(peer: RecordPeer, arrived: bytearray) -> None:
    expect(peer.pull(), "TCP ended")
    while (message := peer.next_record()) is not None:
        expect(message.content_type == DATA, f"a record of type {message.content_type}")
        arrived += message.fragment


def flushed(sender: RecordSender) -> bool:
    """Whether ``flush`` succeeds now."""
    try:
        sender.flush(socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


def fill(sender: RecordSender, sock: socket.socket) -> int:
    """Send until there is no room, and none appears; return how many bytes were accepted."""
    return fill_up(lambda: sender.send(bytes(MAX_FRAGMENT), socket.MSG_DONTWAIT), sock)


def receive(receiver: RecordReceiver, size: int, step: int = 2**16) -> bytes:
    """Receive ``size`` bytes of application data with buffers of ``step`` bytes, passing over empty records."""
    received = bytearray()
    buffer = bytearray(step)
    while len(received) < size:
        try:
            count = receiver.recv_into(buffer, min(step, size - len(received)))
        except ControlRecord:
            message = receiver.read_record()
            expect(
                message == InboundPlainMessage(DATA, b""),
                f"{message} instead of data, after {len(received)} bytes",
            )
            continue
        expect(count, f"the stream ended after {len(received)} of {size} bytes")
        received += buffer[:count]
    return bytes(received)


def reset_noticed(sock: socket.socket) -> None:
    """Wait until the peer's RST has arrived."""
    # TCP_INFO begins with the state; 7 is TCP_CLOSE.
    eventually(
        lambda: sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07", "no RST came"
    )


RESET_ERRNOS: Final = frozenset({errno.ECONNRESET, errno.EPIPE})
