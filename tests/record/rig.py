"""A driver at work: over any two layers, with a scripted peer at the other end."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import ProtocolVersion, Role
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.driver import Driver
from ktls.testing import FaultyReceiver, FaultySender, RecordPeer, loopback_pair
from ktls.testing.peers import made_up_keys, made_up_secret

from . import layers

_T = TypeVar("_T")

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from ktls.protocol.limits import KeyLimits
    from ktls.protocol.suites import CipherSuite
    from ktls.record.interface import KeyChangeObserver, RecordReceiver

Layer = Literal["userspace", "kernel"]


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
