"""A driver at work: over any two layers, with a scripted peer at the other end. And one half of the kernel by itself, with the same peer."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import pytest

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import ContentType, ProtocolVersion, Role
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.driver import Driver
from ktls.record.linux import pack_crypto_info
from ktls.testing import (
    FaultyReceiver,
    FaultySender,
    RecordPeer,
    fill_up,
    is_key_update,
    loopback_pair,
    made_up_keys,
)
from ktls.testing.peers import made_up_secret

from . import layers
from .layers import TLS12, TLS13, kernel_receiver, kernel_sender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktls.protocol.limits import KeyLimits
    from ktls.record.interface import KeyChangeObserver, RecordReceiver
    from ktls.record.kernel import KernelReceiver, KernelSender

_T = TypeVar("_T")

Layer = Literal["userspace", "kernel"]

DATA, ALERT, HANDSHAKE = (
    ContentType.APPLICATION_DATA,
    ContentType.ALERT,
    ContentType.HANDSHAKE,
)
NO_WAIT = socket.MSG_DONTWAIT
SPACE = socket.CMSG_SPACE(1)
#: Alerts and messages as they stand on the wire.
WARNING = b"\x01\x5a"
KEY_UPDATE = b"\x18\x00\x00\x01\x00"
TICKET = bytes.fromhex("04 00000e 00001c20 01020304 00 0001 78 0000")
CLOSE_NOTIFY = InboundPlainMessage(ALERT, b"\x01\x00")
#: Where both directions can change keys.
KINDS = [
    pytest.param("userspace", id="userspace"),
    pytest.param("kernel", id="kernel", marks=[pytest.mark.kernel, pytest.mark.rekey]),
]
both = pytest.mark.parametrize("layer", KINDS)
#: Where keys need not change.
ANY = [
    pytest.param("userspace", id="userspace"),
    pytest.param("kernel", id="kernel", marks=pytest.mark.kernel),
]
anywhere = pytest.mark.parametrize("layer", ANY)
both_versions = pytest.mark.parametrize("suite", [TLS12, TLS13], ids=lambda suite: suite.name)


@dataclass
class Rig:
    driver: Driver
    peer: RecordPeer
    sender: FaultySender
    #: None where the receiver is used without a wrapper.
    receiver: FaultyReceiver | None
    connection: KernelConnection
    sock: socket.socket
    tickets: list[bytes]

    def read(self, size: int) -> bytes:
        """Receive ``size`` bytes through the driver."""
        data = bytearray()
        buffer = bytearray(65536)
        while len(data) < size:
            count = self.driver.recv_into(buffer, min(len(buffer), size - len(data)))
            if not count:
                raise AssertionError(f"ended after {len(data)} of {size} bytes")
            data += buffer[:count]
        return bytes(data)

    def look(self) -> bytes:
        """Receive once without waiting; b"" if nothing is there."""
        buffer = bytearray(65536)
        try:
            count = self.driver.recv_into(buffer, 0, 0x40)  # MSG_DONTWAIT
        except BlockingIOError:
            return b""
        return bytes(buffer[:count])


@contextlib.contextmanager
def rig(
    tx: Layer = "userspace",
    rx: Layer | None = None,
    suite: CipherSuite = layers.TLS13,
    *,
    faulty_receiver: bool = False,
    key_changes: bool | None = None,
    limits: KeyLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
    small: bool = False,
    max_fragment: int = MAX_FRAGMENT,
    on_key_change: KeyChangeObserver | None = None,
    role: Role = Role.CLIENT,
) -> Iterator[Rig]:
    """Give a driver whose directions live where it is said. ``key_changes``: what the sender is to say, if not the truth."""
    size = 16 * 1024 if small else None
    with loopback_pair(sndbuf=size, rcvbuf=size) as (sock, theirs):
        ours, peers = made_up_keys(suite, "us"), made_up_keys(suite, "peer")
        make_sender = layers.kernel_sender if tx == "kernel" else layers.userspace_sender
        make_receiver = (
            layers.kernel_receiver if (rx or tx) == "kernel" else layers.userspace_receiver
        )
        inner: RecordReceiver = make_receiver(sock, suite, peers, 0)
        receiver = FaultyReceiver(inner) if faulty_receiver else None
        sender = FaultySender(make_sender(sock, suite, ours, 0, max_fragment))
        if key_changes is not None:
            sender.can_change_key = key_changes
        is_tls13 = suite.version is ProtocolVersion.TLSv1_3
        connection = KernelConnection(
            role,
            suite,
            tx_secret=made_up_secret(suite, "us") if is_tls13 else None,
            rx_secret=made_up_secret(suite, "peer") if is_tls13 else None,
            limits=limits,
            tx_key_can_change=sender.can_change_key,
            now=clock(),
        )
        tickets: list[bytes] = []
        driver = Driver(
            connection,
            sender,
            inner if receiver is None else receiver,
            on_ticket=tickets.append,
            on_key_change=on_key_change,
            clock=clock,
        )
        yield Rig(driver, RecordPeer(theirs, suite), sender, receiver, connection, sock, tickets)


class Worker(threading.Thread, Generic[_T]):
    """Runs something in another thread, and hands its result or error over."""

    def __init__(self, work: Callable[[], _T]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error

    def result(self) -> _T:
        """Wait for the end; return the result, or raise the error."""
        self.join(40)
        if self.is_alive():
            raise AssertionError("the thread does not end")
        if self._error is not None:
            raise self._error
        return self._results[0]


def again() -> BlockingIOError:
    """What a layer raises where there is no room."""
    return BlockingIOError(errno.EAGAIN, "no room")


def next_message(r: Rig) -> InboundPlainMessage:
    """What the peer receives next; it must be something."""
    message = r.peer.read_message()
    assert message is not None
    return message


def next_is_data(r: Rig, data: bytes) -> None:
    """Check that the peer receives a record with ``data`` next."""
    assert next_message(r) == InboundPlainMessage(DATA, data)


def next_is_key_update(r: Rig) -> None:
    """Check that the peer receives a KeyUpdate next."""
    message = next_message(r)
    assert is_key_update(message), message


def fill(r: Rig) -> int:
    """Fill the way to the peer; return the number of bytes."""
    return fill_up(lambda: r.driver.send(bytes(MAX_FRAGMENT), NO_WAIT), r.sock)


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """Expect an ``OSError`` with this errno."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


@contextlib.contextmanager
def receiving(
    suite: CipherSuite = TLS13,
) -> Iterator[tuple[KernelReceiver, RecordPeer, socket.socket]]:
    """Give the kernel's receiving half, its peer, and the socket."""
    with loopback_pair() as (sock, theirs):
        receiver = kernel_receiver(sock, suite, made_up_keys(suite, "peer"), 0)
        yield receiver, RecordPeer(theirs, suite), sock


@contextlib.contextmanager
def sending(
    suite: CipherSuite = TLS13, *, small: bool = False
) -> Iterator[tuple[KernelSender, RecordPeer, socket.socket]]:
    """Give the kernel's sending half, its peer, and the socket. ``small``: buffers of 16 KiB."""
    size = 16 * 1024 if small else None
    with loopback_pair(sndbuf=size, rcvbuf=size) as (sock, theirs):
        sender = kernel_sender(sock, suite, made_up_keys(suite, "us"), 0, MAX_FRAGMENT)
        yield sender, RecordPeer(theirs, suite), sock


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Give the ends of a pipe: to read, to write."""
    reads, writes = os.pipe()
    try:
        yield reads, writes
    finally:
        os.close(reads)
        os.close(writes)


def crypto_info(suite: CipherSuite = TLS13, name: str = "us") -> bytes:
    """What ``setsockopt`` takes for the made-up keys of that name, from record 0 on."""
    return pack_crypto_info(suite, made_up_keys(suite, name), 0)


def readable(sock: socket.socket) -> int:
    """What ``poll`` says now, of everything."""
    poller = select.poll()
    poller.register(sock, select.POLLIN | select.POLLOUT)
    return dict(poller.poll(0)).get(sock.fileno(), 0)
