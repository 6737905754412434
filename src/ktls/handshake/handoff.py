"""The hand-off: from a finished handshake to a running record layer.

Chooses a layer for each direction, never fails because the kernel lacks something (unless ``offload="kernel"`` demands it), and says why it chose.

- No keys (CBC suite, no key log): the engine goes on.
- Kernel without rekey, TLS 1.3: receiving stays in user space, because the peer may send a KeyUpdate at any time and the kernel could not follow. Sending is in the
  kernel: our own key need not change before its limit.
- A peer that can only take small records: the kernel only if it can limit their size (``TLS_TX_MAX_PAYLOAD_LEN``).
- Bytes were read past the handshake: receiving begins in user space and moves into the kernel at the first record boundary.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import Direction, KeyChangeCause, ProtocolVersion
from ktls.protocol.errors import OffloadError
from ktls.protocol.limits import KeyLimits
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.catchup import CatchUpReceiver
from ktls.record.driver import Driver
from ktls.record.engine import EngineDriver
from ktls.record.interface import KeyChangeObserver, LayerName, RecordReceiver, RecordSender
from ktls.record.kernel import KernelReceiver, KernelSender, attach
from ktls.record.probe import (
    FORBIDDEN,
    counters_unreadable,
    max_payload_supported,
    rekey_supported,
    rekey_unsupported,
)
from ktls.record.userspace import UserspaceReceiver, UserspaceSender

from .result import HandshakeResult, HandshakeSecrets
from .tickets import TicketRelay

__all__ = ("Offload", "OffloadPolicy", "RecordDriver", "hand_off", "prepare")

#: ``auto``: the kernel where it can. ``kernel``: both directions, or ``OffloadError``. ``userspace``: never the kernel.
OffloadPolicy: TypeAlias = Literal["auto", "kernel", "userspace"]

RecordDriver: TypeAlias = Driver | EngineDriver


@final
@dataclass(frozen=True, slots=True)
class Offload:
    """Where the records of a connection are protected, each direction, and why not in the kernel (None where both are)."""

    tx: LayerName
    rx: LayerName
    reason: str | None = None


def prepare(sock: socket.socket, policy: OffloadPolicy) -> str | None:
    """Attach the ULP to a socket just connected or accepted; return why the kernel can't be used, or None.

    Until keys are set the socket is plain TCP, so this is harmless if the hand-off then chooses otherwise.
    """
    if policy == "userspace":
        return "user space was asked for"
    try:
        attach(sock)
    except OSError as error:
        return _refusal(error)
    return counters_unreadable()


def _refusal(error: OSError) -> str:
    text = {
        errno.ENOENT: "the kernel has no module tls, or it is not loaded and we may not load it (modprobe tls)",
        errno.ENOTCONN: "the peer had already closed when the socket was prepared",
        **dict.fromkeys(FORBIDDEN, "a security policy forbids kernel TLS (setsockopt TCP_ULP)"),
    }
    reason = text.get(error.errno or 0)
    return reason or f"the kernel refused: {os.strerror(error.errno or 0)}"


def hand_off(
    sock: socket.socket,
    result: HandshakeResult,
    *,
    policy: OffloadPolicy = "auto",
    unavailable: str | None = None,
    limits: KeyLimits | None = None,
    on_key_change: KeyChangeObserver | None = None,
    clock: Callable[[], float] = time.monotonic,
    lock: threading.RLock | None = None,
) -> tuple[RecordDriver, str | None]:
    """Set a connection going after ``result``; return its driver, and why it is not wholly in the kernel.

    ``unavailable`` is what ``prepare`` returned; ``on_key_change`` is told of every change of a key;
    ``lock`` is what ``Driver`` says of it. The TCP stream must be exactly behind ``result.leftover``.
    Raises ``OffloadError`` only with the policy ``kernel``; nothing was sent then.
    """
    secrets = result.secrets
    if secrets is None:
        if policy == "kernel":
            raise OffloadError(result.no_secrets_reason or "the engine gave no keys")
        return _stay_with_engine(sock, result), result.no_secrets_reason
    if unavailable is not None and policy == "kernel":
        raise OffloadError(unavailable)
    reasons = [unavailable] if unavailable is not None else []
    use_kernel = not reasons
    sender = _sender(sock, secrets, result.max_fragment, use_kernel, reasons)
    receiver = _receiver(sock, secrets, result.leftover, use_kernel, policy, reasons)
    if reasons and policy == "kernel":
        raise OffloadError(reasons[0])
    now = clock()
    connection = KernelConnection(
        result.role,
        secrets.suite,
        tx_secret=secrets.tx_secret,
        rx_secret=secrets.rx_secret,
        limits=limits,
        tx_key_can_change=sender.can_change_key,
        key_log=result.key_log,
        now=now,
    )
    relay = result.tickets
    driver = Driver(
        connection,
        sender,
        receiver,
        on_ticket=relay.feed if relay is not None else None,
        on_key_change=on_key_change if relay is None else _ratcheting(relay, on_key_change),
        clock=clock,
        lock=lock,
    )
    return driver, reasons[0] if reasons else None


def _ratcheting(relay: TicketRelay, observer: KeyChangeObserver | None) -> KeyChangeObserver:
    """The relay's engine moves on with every key, too."""

    def key_changed(direction: Direction, cause: KeyChangeCause) -> None:
        relay.ratchet()
        if observer is not None:
            observer(direction, cause)

    return key_changed


def _stay_with_engine(sock: socket.socket, result: HandshakeResult) -> EngineDriver:
    engine = result.engine_object
    if engine is None:
        raise AssertionError("a handshake result with neither secrets nor engine")
    if result.leftover:
        engine.incoming.write(result.leftover)
    return EngineDriver(sock, engine.sslobject, engine.incoming, engine.outgoing)


def _sender(
    sock: socket.socket,
    secrets: HandshakeSecrets,
    max_fragment: int,
    use_kernel: bool,
    reasons: list[str],
) -> RecordSender:
    keys, number = secrets.tx_keys, secrets.tx_sequence_number
    if use_kernel and max_fragment < MAX_FRAGMENT and not max_payload_supported():
        reasons.append("the peer needs small records, and this kernel can't limit them")
        use_kernel = False
    if use_kernel:
        can_change = secrets.suite.version is ProtocolVersion.TLSv1_3 and rekey_supported()
        try:
            return KernelSender(
                sock,
                secrets.suite,
                keys,
                number,
                can_change_key=can_change,
                max_fragment=max_fragment,
            )
        except OSError as error:
            reasons.append(_refused_suite(secrets, "sending", error))
    return UserspaceSender(sock, secrets.suite, keys, number, max_fragment=max_fragment)


def _receiver(
    sock: socket.socket,
    secrets: HandshakeSecrets,
    leftover: bytes,
    use_kernel: bool,
    policy: OffloadPolicy,
    reasons: list[str],
) -> RecordReceiver:
    suite, keys, number = secrets.suite, secrets.rx_keys, secrets.rx_sequence_number
    can_change = suite.version is ProtocolVersion.TLSv1_3 and rekey_supported()
    if (
        use_kernel
        and suite.version is ProtocolVersion.TLSv1_3
        and not can_change
        and policy != "kernel"
    ):
        reasons.append(
            f"{rekey_unsupported()}, and the peer of a TLS 1.3 connection may do so at any time"
        )
        use_kernel = False
    if use_kernel and leftover:
        return CatchUpReceiver(sock, suite, keys, number, leftover, can_change_key=can_change)
    if use_kernel:
        try:
            return KernelReceiver(sock, suite, keys, number, can_change_key=can_change)
        except OSError as error:
            reasons.append(_refused_suite(secrets, "receiving", error))
    return UserspaceReceiver(sock, suite, keys, number, initial=leftover)


def _refused_suite(secrets: HandshakeSecrets, what: str, error: OSError) -> str:
    aead = secrets.suite.aead.name
    if error.errno == errno.ENOENT:
        return f"the kernel has no cipher for {aead} ({what})"
    if error.errno in FORBIDDEN:
        return f"a security policy forbids what {what} through the kernel needs"
    return f"the kernel refused {aead} for {what}: {os.strerror(error.errno or 0)}"
