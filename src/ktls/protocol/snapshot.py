"""The state of a connection as values, so that another process can go on with it.

Only a connection at rest has such a state: no key change under way, no handshake message half received. What is not here is derived again (keys), or is
the record layer's (sequence numbers). It holds the traffic secrets: whoever has it can read and forge everything from here on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .connection import KernelConnection, KeyLog
from .enums import Role
from .errors import LocalProtocolError
from .key_schedule import TrafficSecret
from .limits import FloodBudget, KeyLimits
from .states import HalfState
from .suites import CipherSuite

__all__ = ("ConnectionSnapshot", "restore_connection", "snapshot_connection")

_CARRIED_STATES = frozenset((HalfState.OPEN, HalfState.EXHAUSTED, HalfState.CLOSED))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSnapshot:
    """A ``KernelConnection`` at rest. ``ValueError`` if the values contradict each other."""

    role: Role
    suite: CipherSuite
    #: None for TLS 1.2, whose keys never change.
    tx_secret: TrafficSecret | None
    rx_secret: TrafficSecret | None
    tx_state: HalfState
    rx_state: HalfState
    #: Seconds that the keys have been in use.
    tx_age: float
    rx_age: float
    limits: KeyLimits
    tx_key_can_change: bool
    request_outstanding: bool
    answers_left: int
    #: What is left of the flood budget; None: all of it.
    tokens: float | None

    def __post_init__(self) -> None:
        """Refuse what no connection can be."""
        secrets = [secret for secret in (self.tx_secret, self.rx_secret) if secret is not None]
        if any(secret.suite is not self.suite or secret.generation < 0 for secret in secrets):
            raise ValueError("a traffic secret that is not the connection's")
        if not {self.tx_state, self.rx_state} <= _CARRIED_STATES:
            raise ValueError("a connection that has failed has no state")


def snapshot_connection(connection: KernelConnection, *, now: float) -> ConnectionSnapshot:
    """Return the state of ``connection``. ``LocalProtocolError`` if it is not at rest, or has failed; nothing is changed either way."""
    tx, rx = connection._tx, connection._rx
    if HalfState.FAILED in (tx.state, rx.state):
        raise LocalProtocolError("the connection has failed")
    if connection.fragment_pending:
        raise LocalProtocolError("only a part of a handshake message has come")
    if tx.installed != tx.generation or rx.installed != rx.generation:
        raise LocalProtocolError("a key is being changed")
    budget = connection._budget
    return ConnectionSnapshot(
        role=connection.role,
        suite=connection.cipher_suite,
        tx_secret=tx.secret,
        rx_secret=rx.secret,
        tx_state=tx.state,
        rx_state=rx.state,
        tx_age=max(0.0, now - tx.since),
        rx_age=max(0.0, now - rx.since),
        limits=connection.limits,
        tx_key_can_change=connection.tx_key_can_change,
        request_outstanding=connection._request_outstanding,
        answers_left=connection._answers_left,
        tokens=budget.tokens if budget is not None else None,
    )


def restore_connection(
    snapshot: ConnectionSnapshot,
    *,
    limits: KeyLimits | None = None,
    key_log: KeyLog | None = None,
    now: float,
) -> KernelConnection:
    """Return a connection in the state of ``snapshot``; ``limits`` take the place of those that it had. ``ValueError`` if there can be no such connection."""
    connection = KernelConnection(
        snapshot.role,
        snapshot.suite,
        tx_secret=snapshot.tx_secret,
        rx_secret=snapshot.rx_secret,
        limits=limits if limits is not None else snapshot.limits,
        tx_key_can_change=snapshot.tx_key_can_change,
        key_log=key_log,
        now=now,
    )
    connection._tx.state, connection._rx.state = snapshot.tx_state, snapshot.rx_state
    connection._tx.since, connection._rx.since = now - snapshot.tx_age, now - snapshot.rx_age
    connection._request_outstanding = snapshot.request_outstanding
    connection._answers_left = snapshot.answers_left
    if snapshot.tokens is not None:
        connection._budget = FloodBudget(now, snapshot.tokens)
    return connection
