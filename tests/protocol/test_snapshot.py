"""The state of a connection at rest: what goes along, and what can't be carried."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.enums import ContentType, Direction, Role
from ktls.protocol.errors import LocalProtocolError, RemoteProtocolError
from ktls.protocol.limits import FloodBudget, KeyLimits
from ktls.protocol.snapshot import restore_connection, snapshot_connection
from ktls.protocol.states import HalfState, InboundPlainMessage, UpdateRxKey, UpdateTxKey

from .helpers import CHACHA, CLOSE_NOTIFY, KU, KU_REQUEST, TLS12, TLS13, connect, secret

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ktls.protocol.connection import KernelConnection
    from ktls.protocol.states import ConnectionState


def handshake(fragment: bytes) -> InboundPlainMessage:
    return InboundPlainMessage(ContentType.HANDSHAKE, fragment)


def run(connection: KernelConnection, items: Iterable[ConnectionState]) -> None:
    """Say that all keys are in."""
    for item in items:
        if isinstance(item, UpdateTxKey):
            connection.tx_key_installed(item.generation)
        elif isinstance(item, UpdateRxKey):
            connection.rx_key_installed(item.generation)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("suite", [TLS13, TLS12])
def test_a_successor_is_where_its_predecessor_was(role: Role, suite: Any) -> None:
    limits = KeyLimits(records=9, age=60.0)
    connection = connect(role, suite, limits=limits, tx_key_can_change=False)
    successor = restore_connection(snapshot_connection(connection, now=5.0), now=1005.0)
    assert repr(successor) == repr(connection)
    assert successor.limits == limits
    assert successor.tx_key_can_change is False
    assert successor.record_limit(Direction.TX) == connection.record_limit(Direction.TX)


def test_generations_and_secrets_go_along() -> None:
    connection = connect()
    run(connection, connection.refresh_traffic_keys(request_peer=True, now=1.0))
    run(connection, connection.process_message(handshake(KU_REQUEST), now=2.0))
    run(connection, connection.process_message(handshake(KU), now=3.0))
    logged: list[tuple[str, bytes]] = []
    successor = restore_connection(
        snapshot_connection(connection, now=4.0),
        key_log=lambda label, value: logged.append((label, value)),
        now=4.0,
    )
    assert (successor.tx_generation, successor.rx_generation) == (2, 2)
    assert successor.installed_generation(Direction.TX) == 2
    assert successor.refresh_traffic_keys(now=5.0) == connection.refresh_traffic_keys(now=5.0)
    assert successor.process_message(handshake(KU), now=6.0) == connection.process_message(
        handshake(KU), now=6.0
    )
    assert [label for label, _ in logged] == [
        "CLIENT_TRAFFIC_SECRET_3",
        "SERVER_TRAFFIC_SECRET_3",
    ]


def test_a_request_that_is_outstanding_is_not_repeated() -> None:
    connection = connect()
    run(connection, connection.refresh_traffic_keys(request_peer=True, now=1.0))
    successor = restore_connection(snapshot_connection(connection, now=1.0), now=1.0)
    sent, _ = successor.refresh_traffic_keys(request_peer=True, now=2.0)
    assert sent.fragment == KU  # type: ignore[union-attr]  # a SendMessage


def test_the_age_of_keys_goes_along() -> None:
    connection = connect(limits=KeyLimits(age=60.0), now=0.0)
    successor = restore_connection(snapshot_connection(connection, now=50.0), now=7.0)
    assert successor.record_usage(Direction.TX, 1, now=16.0) == ()
    assert successor.record_usage(Direction.TX, 1, now=17.0) != ()


def test_limits_can_be_replaced() -> None:
    snapshot = snapshot_connection(connect(limits=KeyLimits(records=9)), now=0.0)
    successor = restore_connection(snapshot, limits=KeyLimits(records=5), now=0.0)
    assert successor.record_limit(Direction.TX) == 5


@pytest.mark.parametrize("closes", ["us", "peer", "exhausted"])
def test_half_states_go_along(closes: str) -> None:
    connection = connect(tx_key_can_change=closes != "exhausted")
    if closes == "us":
        connection.close()
    elif closes == "peer":
        connection.process_message(InboundPlainMessage(ContentType.ALERT, CLOSE_NOTIFY), now=0.0)
    else:
        run(connection, connection.process_message(handshake(KU_REQUEST), now=0.0))
        assert connection.tx_state is HalfState.EXHAUSTED
    successor = restore_connection(snapshot_connection(connection, now=0.0), now=0.0)
    assert (successor.tx_state, successor.rx_state) == (connection.tx_state, connection.rx_state)
    assert (successor.tx_state, successor.rx_state) != (HalfState.OPEN, HalfState.OPEN)


def test_what_a_peer_has_spent_stays_spent() -> None:
    """Neither the flood budget nor the answers to renegotiation are new."""
    connection = connect(Role.CLIENT, TLS12)
    hello_request = handshake(bytes(4))
    for _ in range(16):
        assert connection.process_message(hello_request, now=0.0) != ()
    successor = restore_connection(snapshot_connection(connection, now=0.0), now=0.0)
    for _ in range(int(FloodBudget.CAPACITY) - 16):
        assert successor.process_message(hello_request, now=0.0) == ()
    with pytest.raises(RemoteProtocolError, match="too many"):
        successor.process_message(hello_request, now=0.0)


def test_a_connection_that_has_failed_has_no_state() -> None:
    connection = connect()
    connection.fail()
    with pytest.raises(LocalProtocolError, match="failed"):
        snapshot_connection(connection, now=0.0)


def test_nor_has_one_inside_a_handshake_message() -> None:
    connection = connect()
    connection.process_message(handshake(KU[:2]), now=0.0)
    with pytest.raises(LocalProtocolError, match="only a part"):
        snapshot_connection(connection, now=0.0)
    run(connection, connection.process_message(handshake(KU[2:]), now=0.0))
    assert snapshot_connection(connection, now=0.0).rx_secret is not None


@pytest.mark.parametrize("direction", Direction)
def test_nor_has_one_inside_a_key_change(direction: Direction) -> None:
    connection = connect()
    if direction is Direction.TX:
        items = connection.refresh_traffic_keys(now=0.0)
    else:
        items = connection.process_message(handshake(KU), now=0.0)
    with pytest.raises(LocalProtocolError, match="being changed"):
        snapshot_connection(connection, now=0.0)
    run(connection, items)
    assert snapshot_connection(connection, now=0.0).role is Role.CLIENT


@pytest.mark.parametrize(
    "wrong",
    [
        {"tx_secret": secret(CHACHA, b"c")},
        {"rx_secret": secret(TLS13, b"s", -1)},
        {"tx_state": HalfState.FAILED},
        {"rx_state": HalfState.FAILED},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_states_that_can_not_be(wrong: dict[str, Any]) -> None:
    snapshot = snapshot_connection(connect(), now=0.0)
    with pytest.raises(ValueError, match=r"secret|state"):
        dataclasses.replace(snapshot, **wrong)


def test_nothing_prints_the_secrets() -> None:
    shown = repr(snapshot_connection(connect(), now=0.0))
    for letter in (b"c", b"s"):
        assert (letter * 32).hex() not in shown
        assert letter.decode() * 32 not in shown
