"""A driver's state taken out of one process and set going in another, on the same TCP connection.

With kernel TLS keys and sequence numbers are in the socket, so whoever has its descriptor can send and receive. But the next KeyUpdate, of either side, needs the traffic secret, which only
this process has; and whoever is to close without losing data has to know what was accepted before. So that goes along.

Only a driver at rest can be taken out. Afterwards it is dead, since two drivers of one connection would use the same nonces twice (in user space) or change keys
behind each other's back.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from ktls.protocol.errors import LocalProtocolError
from ktls.protocol.key_schedule import TrafficSecret
from ktls.protocol.limits import KeyLimits
from ktls.protocol.snapshot import restore_connection, snapshot_connection
from ktls.protocol.states import HalfState, PeerClosed
from ktls.protocol.suites import CipherSuite

from .carrying import restore_receiver, restore_sender, snapshot_receiver, snapshot_sender
from .driver import Driver
from .interface import KeyChangeObserver, Lock
from .linux import CRYPTO_INFO, SOL_TLS, TLS_RX, TLS_TX, pack_crypto_info, unpack_rec_seq
from .snapshot import DriverSnapshot

__all__ = ("check_socket", "restore_driver", "take_driver")

_VERSION_AND_CIPHER: Final = 4


@contextlib.contextmanager
def _held(lock: Lock, what: str) -> Iterator[None]:
    if not lock.acquire(blocking=False):
        raise LocalProtocolError(f"another thread is {what}")
    try:
        yield
    finally:
        lock.release()


def take_driver(driver: Driver, *, clock: Callable[[], float] = time.monotonic) -> DriverSnapshot:
    """Return the state of ``driver``, which is dead from here on: every call raises ``LocalProtocolError``, the secrets are dropped. Nothing is sent.

    ``LocalProtocolError`` also where that can't be done now (bytes or a key change under way, a part of a handshake message, another thread at work) or never
    (failed): the driver is then as it was.
    """
    driver.run_owed()
    sending, receiving = driver.sending, driver.receiving
    with (
        _held(receiving._lock, "receiving"),
        _held(sending._lock, "sending"),
        sending._state_lock,
    ):
        _check_at_rest(driver)
        snapshot = DriverSnapshot(
            sender=snapshot_sender(driver.sender),
            receiver=snapshot_receiver(driver.receiver),
            connection=snapshot_connection(driver.connection, now=clock()),
            tx_octets=sending._meter.octets,
            rx_octets=receiving._meter.octets,
            early=receiving._early,
        )
        gone = LocalProtocolError("the state of this connection was exported: it is elsewhere now")
        driver.connection.fail()
        sending._error = receiving._end = gone
        receiving._early = b""
        receiving._mark()
    return snapshot


def _check_at_rest(driver: Driver) -> None:
    """Under all locks. What the layers and the connection have to say about it they say themselves."""
    sending, receiving = driver.sending, driver.receiving
    torn = sending._advancing or receiving._reading  # nobody else is at work: see interruption
    if torn or sending._error is not None or isinstance(receiving._end, OSError):
        raise LocalProtocolError("the connection has failed")
    sending.look_first()
    receiving._look_first()
    if sending.owes:
        raise LocalProtocolError("what was accepted has not been sent")


def check_socket(sock: socket.socket, snapshot: DriverSnapshot) -> None:
    """See to it that ``sock`` is the connection that ``snapshot`` was taken of, as far as the kernel can tell; ``ValueError`` if it is another.

    What the kernel protects has to have exactly the key that follows from the secret; what user space protects must not be protected by the kernel as well.
    """
    connection = snapshot.connection
    for option, layer, secret in (
        (TLS_TX, snapshot.sender.layer, connection.tx_secret),
        (TLS_RX, snapshot.receiver.layer, connection.rx_secret),
    ):
        if not _belongs(sock, option, layer == "kernel", connection.suite, secret):
            raise ValueError("the state is not of this connection: the kernel has other keys")


def _belongs(
    sock: socket.socket,
    option: int,
    in_kernel: bool,
    suite: CipherSuite,
    secret: TrafficSecret | None,
) -> bool:
    layout = CRYPTO_INFO[suite.aead]
    try:
        beginning = sock.getsockopt(SOL_TLS, option, _VERSION_AND_CIPHER)
    except OSError:
        return not in_kernel
    if not in_kernel or beginning != struct.pack("=HH", suite.version, layout.cipher_type):
        return False
    if secret is None:
        return True  # TLS 1.2: the keys are nowhere else
    found = sock.getsockopt(SOL_TLS, option, layout.size)
    return hmac.compare_digest(found, pack_crypto_info(suite, secret.keys(), unpack_rec_seq(found)))


def restore_driver(
    sock: socket.socket,
    snapshot: DriverSnapshot,
    *,
    limits: KeyLimits | None = None,
    on_key_change: KeyChangeObserver | None = None,
    clock: Callable[[], float] = time.monotonic,
    lock: threading.RLock | None = None,
) -> Driver:
    """Set going what was taken out, on ``sock``, which ``check_socket`` has passed. ``limits`` take the place of those that the connection had.

    ``ValueError`` if the values can't be.
    """
    suite = snapshot.connection.suite
    connection = restore_connection(snapshot.connection, limits=limits, now=clock())
    sender = restore_sender(sock, suite, snapshot.sender, snapshot.connection.tx_secret)
    receiver = restore_receiver(sock, suite, snapshot.receiver, snapshot.connection.rx_secret)
    driver = Driver(
        connection, sender, receiver, on_key_change=on_key_change, clock=clock, lock=lock
    )
    driver.sending._meter.resume(snapshot.tx_octets, snapshot.connection.tx_age)
    receiving = driver.receiving
    receiving._meter.resume(snapshot.rx_octets, snapshot.connection.rx_age)
    receiving._early = snapshot.early
    if connection.rx_state is HalfState.CLOSED:
        receiving._end = PeerClosed()
        receiving._read_no_more()
    receiving._mark()
    return driver
