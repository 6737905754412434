"""Rules 6 and 7 of ``KernelConnection``: key updates, limits of keys, and floods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ktls.protocol.enums import Direction, Role
from ktls.protocol.errors import LocalProtocolError, RemoteProtocolError
from ktls.protocol.limits import KeyLimits
from ktls.protocol.states import (
    ApplicationData,
    Closed,
    HalfState,
    InboundPlainMessage,
    PeerClosed,
    UpdateRxKey,
    UpdateTxKey,
)

from .helpers import (
    CCM,
    CHACHA,
    CLOSE_NOTIFY,
    KU,
    KU_REQUEST,
    MAX_GENERATION,
    SEND_CLOSE_NOTIFY,
    SEND_KU,
    SEND_KU_REQUEST,
    TLS12,
    TLS13,
    UNEXPECTED,
    USER_CANCELED,
    alert,
    assert_failed,
    assert_tx_state,
    connect,
    data,
    handshake,
    install,
    message,
    receive,
    rx_key,
    ticket,
    tx_key,
)

if TYPE_CHECKING:
    from ktls.protocol.suites import CipherSuite


# --- rule 6: key updates and limits ----------------------------------------------------------------------------------


def test_rule_6_at_most_one_request_is_outstanding() -> None:
    conn = connect()
    assert conn.refresh_traffic_keys(True, now=0.0) == (SEND_KU_REQUEST, tx_key(conn, 1))
    assert conn.refresh_traffic_keys(True, now=0.0) == (SEND_KU, tx_key(conn, 2))
    install(conn, [tx_key(conn, 2)])
    assert conn.refresh_traffic_keys(True, now=0.0) == (SEND_KU, tx_key(conn, 3))
    assert receive(conn, handshake(KU)) == [rx_key(conn, 1)]
    assert conn.refresh_traffic_keys(True, now=0.0) == (SEND_KU_REQUEST, tx_key(conn, 4))


def test_rule_6_any_update_of_the_peer_answers_our_request() -> None:
    conn = connect()
    conn.refresh_traffic_keys(True, now=0.0)
    receive(conn, handshake(KU_REQUEST))
    assert conn.refresh_traffic_keys(True, now=0.0)[0] == SEND_KU_REQUEST


def test_rule_6_crossing_requests_bring_both_sides_two_generations_further() -> None:
    client, server = connect(Role.CLIENT), connect(Role.SERVER)
    assert client.refresh_traffic_keys(True, now=0.0)[0] == SEND_KU_REQUEST
    assert server.refresh_traffic_keys(True, now=0.0)[0] == SEND_KU_REQUEST
    assert receive(client, handshake(KU_REQUEST)) == [rx_key(client, 1), SEND_KU, tx_key(client, 2)]
    assert receive(server, handshake(KU_REQUEST)) == [rx_key(server, 1), SEND_KU, tx_key(server, 2)]
    assert receive(client, handshake(KU)) == [rx_key(client, 2)]
    assert receive(server, handshake(KU)) == [rx_key(server, 2)]
    assert client.tx_generation == client.rx_generation == 2
    assert server.tx_generation == server.rx_generation == 2


def test_rule_6_never_more_than_2_48_minus_1_updates() -> None:
    conn = connect(tx_generation=MAX_GENERATION - 1)
    items = install(conn, conn.refresh_traffic_keys(now=0.0))
    assert isinstance(items[-1], UpdateTxKey)
    assert items[-1].generation == conn.tx_generation == MAX_GENERATION
    with pytest.raises(LocalProtocolError):
        conn.refresh_traffic_keys(now=0.0)
    assert (conn.tx_state, conn.tx_generation) == (HalfState.OPEN, MAX_GENERATION)


def test_rule_6_a_request_is_ignored_at_the_last_generation() -> None:
    conn = connect(tx_generation=MAX_GENERATION)
    (item,) = receive(conn, handshake(KU_REQUEST))
    assert item == rx_key(conn, 1)
    assert_tx_state(conn, HalfState.OPEN)
    assert conn.record_usage(Direction.TX, 2**23, now=0.0) == ()
    assert_tx_state(conn, HalfState.EXHAUSTED)


def test_rule_6_a_receiver_does_not_enforce_that_limit() -> None:
    conn = connect(rx_generation=MAX_GENERATION)
    (item,) = receive(conn, handshake(KU))
    assert isinstance(item, UpdateRxKey)
    assert item.generation == conn.rx_generation == 2**48


# what a record layer that can't change the sending key means
def test_rule_6_a_key_that_can_not_change_is_exhausted_by_a_request() -> None:
    conn = connect(tx_key_can_change=False)
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 1)]
    assert (conn.tx_state, conn.rx_state) == (HalfState.EXHAUSTED, HalfState.OPEN)
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 2)]
    with pytest.raises(LocalProtocolError, match="exhausted"):
        conn.refresh_traffic_keys(now=0.0)
    assert receive(conn, data(b"x"), alert(CLOSE_NOTIFY)) == [ApplicationData(b"x"), PeerClosed()]
    assert conn.close() == (SEND_CLOSE_NOTIFY, Closed())


def test_rule_6_a_key_that_can_not_change_survives_updates_of_the_peer() -> None:
    conn = connect(tx_key_can_change=False)
    assert receive(conn, handshake(KU)) == [rx_key(conn, 1)]
    with pytest.raises(LocalProtocolError, match="can't be changed"):
        conn.refresh_traffic_keys(now=0.0)
    assert conn.tx_state is HalfState.OPEN


@pytest.mark.parametrize("suite", [TLS13, TLS12])
def test_rule_6_a_key_that_can_not_change_ends_at_the_aead_limit(suite: CipherSuite) -> None:
    conn = connect(suite=suite, tx_key_can_change=False)
    assert conn.record_limit(Direction.TX) == 23726566
    assert conn.record_usage(Direction.TX, 23726565, now=0.0) == ()
    assert_tx_state(conn, HalfState.OPEN)
    assert conn.record_usage(Direction.TX, 23726566, now=0.0) == ()
    assert_tx_state(conn, HalfState.EXHAUSTED)
    assert conn.record_usage(Direction.TX, 23726567, now=0.0) == ()
    assert conn.close() == (SEND_CLOSE_NOTIFY,)


def test_rule_6_an_exhausted_side_of_tls12_closes_cleanly() -> None:
    conn = connect(suite=TLS12, limits=KeyLimits(records=10))
    conn.record_usage(Direction.TX, 10, now=0.0)
    assert conn.tx_state is HalfState.EXHAUSTED
    assert receive(conn, handshake(message(0)), data(b"x")) == [ApplicationData(b"x")]
    assert receive(conn, alert(CLOSE_NOTIFY)) == [PeerClosed(), SEND_CLOSE_NOTIFY, Closed()]


# limits, by direction
@pytest.mark.parametrize(
    ("suite", "expected"),
    [(TLS13, 2**23), (CCM, 2**22), (CHACHA, None)],
    ids=["gcm", "ccm", "chacha"],
)
@pytest.mark.parametrize("direction", Direction)
def test_rule_6_the_default_record_limits(
    suite: CipherSuite, expected: int | None, direction: Direction
) -> None:
    conn = connect(suite=suite)
    assert conn.record_limit(direction) == expected
    if expected is None:
        assert conn.record_usage(direction, 2**63, octets=2**63, now=1e9) == ()
        return
    assert conn.record_usage(direction, expected - 1, octets=2**63, now=1e9) == ()
    assert conn.record_usage(direction, expected, now=0.0) != ()


def test_rule_6_there_is_no_receiving_limit_where_nobody_can_be_asked() -> None:
    for suite in (TLS13, TLS12):
        conn = connect(suite=suite, tx_key_can_change=False, limits=KeyLimits(records=10))
        assert conn.record_limit(Direction.TX) == 10
        assert conn.record_limit(Direction.RX) is None


LIMITS: dict[str, tuple[KeyLimits, tuple[int, int, float], tuple[int, int, float]]] = {
    # name: limits, last (records, octets, now) that is fine, first that is not
    "records": (KeyLimits(records=100), (99, 2**40, 1e9), (100, 0, 0.0)),
    "octets": (KeyLimits(octets=1000), (2**22, 999, 1e9), (0, 1000, 0.0)),
    "age": (KeyLimits(age=60.0), (2**22, 2**40, 59.9), (0, 0, 60.0)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_rule_6_our_key_is_refreshed_at_its_limit(name: str) -> None:
    limits, fine, due = LIMITS[name]
    conn = connect(limits=limits)
    assert conn.record_usage(Direction.TX, fine[0], octets=fine[1], now=fine[2]) == ()
    items = conn.record_usage(Direction.TX, due[0], octets=due[1], now=due[2])
    assert items == (SEND_KU, tx_key(conn, 1))


@pytest.mark.parametrize("name", LIMITS)
def test_rule_6_the_peer_is_asked_for_a_new_key_at_its_limit(name: str) -> None:
    limits, fine, due = LIMITS[name]
    conn = connect(limits=limits)
    assert conn.record_usage(Direction.RX, fine[0], octets=fine[1], now=fine[2]) == ()
    items = conn.record_usage(Direction.RX, due[0], octets=due[1], now=due[2])
    assert items == (SEND_KU_REQUEST, tx_key(conn, 1))
    install(conn, items)
    # Asked once; the peer may take its time.
    assert conn.record_usage(Direction.RX, due[0] + 1, octets=due[1] + 1, now=due[2]) == ()


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("suite", [TLS13, TLS12])
def test_rule_6_a_limit_ends_the_sending_side_where_the_key_can_not_change(
    name: str, suite: CipherSuite
) -> None:
    limits, fine, due = LIMITS[name]
    conn = connect(suite=suite, limits=limits, tx_key_can_change=False)
    assert conn.record_usage(Direction.TX, fine[0], octets=fine[1], now=fine[2]) == ()
    assert_tx_state(conn, HalfState.OPEN)
    assert conn.record_usage(Direction.TX, due[0], octets=due[1], now=due[2]) == ()
    assert_tx_state(conn, HalfState.EXHAUSTED)


def test_rule_6_nothing_is_asked_where_our_own_key_can_not_change() -> None:
    conn = connect(tx_key_can_change=False)
    assert conn.record_usage(Direction.RX, 2**30, now=0.0) == ()
    assert conn.tx_state is conn.rx_state is HalfState.OPEN


def test_rule_6_usage_is_not_judged_while_an_update_is_under_way() -> None:
    conn = connect(limits=KeyLimits(records=10))
    items = conn.record_usage(Direction.TX, 10, now=0.0)
    assert conn.record_usage(Direction.TX, 11, now=0.0) == ()
    assert conn.record_usage(Direction.RX, 10, now=0.0) == ()
    install(conn, items)
    assert conn.record_usage(Direction.TX, 9, now=0.0) == ()
    assert conn.record_usage(Direction.TX, 10, now=0.0) == (SEND_KU, tx_key(conn, 2))


def test_rule_6_age_starts_anew_with_every_key() -> None:
    conn = connect(limits=KeyLimits(age=60.0), now=1000.0)
    assert conn.record_usage(Direction.TX, 1, now=1059.0) == ()
    install(conn, conn.record_usage(Direction.TX, 1, now=1060.0))
    assert conn.tx_generation == 1
    assert conn.record_usage(Direction.TX, 1, now=1119.0) == ()
    receive(conn, handshake(KU), now=1100.0)
    assert conn.record_usage(Direction.RX, 1, now=1159.0) == ()
    assert conn.record_usage(Direction.RX, 1, now=1160.0)[0] == SEND_KU_REQUEST


def test_rule_6_closed_directions_are_not_metered() -> None:
    conn = connect(limits=KeyLimits(records=1))
    receive(conn, alert(CLOSE_NOTIFY))
    assert conn.record_usage(Direction.RX, 5, now=0.0) == ()
    conn.close()
    assert conn.record_usage(Direction.TX, 5, now=0.0) == ()


# --- rule 7: floods --------------------------------------------------------------------------------------------------


FLOODS: dict[str, tuple[CipherSuite, InboundPlainMessage]] = {
    "key updates": (TLS13, handshake(KU)),
    "requested updates": (TLS13, handshake(KU_REQUEST)),
    "tickets": (TLS13, handshake(ticket())),
    "empty records": (TLS13, data(b"")),
    "cancelled": (TLS13, alert(USER_CANCELED)),
    "warnings": (TLS12, alert(b"\x01\x6e")),
    "hello requests": (TLS12, handshake(message(0))),
    "empty records of tls 1.2": (TLS12, data(b"")),
}


@pytest.mark.parametrize("name", FLOODS)
def test_rule_7_a_burst_of_2048_is_fine_and_no_more(name: str) -> None:
    suite, record = FLOODS[name]
    conn = connect(suite=suite)
    receive(conn, *[record] * 2048)
    generations = (conn.tx_generation, conn.rx_generation)
    with pytest.raises(RemoteProtocolError, match="too many") as caught:
        receive(conn, record)
    assert caught.value.alert is UNEXPECTED
    assert_failed(conn, generations)


@pytest.mark.parametrize("name", FLOODS)
def test_rule_7_time_refills_the_budget(name: str) -> None:
    suite, record = FLOODS[name]
    conn = connect(suite=suite)
    receive(conn, *[record] * 2048, now=0.0)
    receive(conn, *[record] * 16, now=1.0)
    with pytest.raises(RemoteProtocolError, match="too many"):
        receive(conn, record, now=1.0)


@pytest.mark.parametrize("through", ["process_message", "received_data"])
def test_rule_7_application_data_refills_the_budget(through: str) -> None:
    conn = connect()
    receive(conn, *[handshake(KU)] * 2048)
    if through == "received_data":
        conn.received_data(2 * 4096)
    else:
        receive(conn, data(bytes(4096)), data(bytes(4096)))
    receive(conn, *[handshake(KU)] * 2)
    with pytest.raises(RemoteProtocolError, match="too many"):
        receive(conn, handshake(KU))


def test_rule_7_application_data_costs_nothing() -> None:
    conn = connect()
    receive(conn, *[handshake(KU)] * 2048)
    assert len(receive(conn, *[data(b"x")] * 3000)) == 3000


def test_rule_7_a_peer_that_rekeys_once_a_minute_for_three_weeks_is_fine() -> None:
    conn = connect()
    minutes = 3 * 7 * 24 * 60
    for minute in range(minutes):
        install(conn, receive(conn, handshake(KU_REQUEST), now=60.0 * minute))
    assert conn.tx_generation == conn.rx_generation == minutes


def test_rule_7_a_thousand_updates_in_a_row_are_fine() -> None:
    conn = connect()
    for _ in range(1000):
        install(conn, receive(conn, handshake(KU_REQUEST)))
    assert conn.tx_generation == conn.rx_generation == 1000


def test_rule_7_messages_are_counted_not_records() -> None:
    conn = connect()
    joined = ticket() * 64
    receive(conn, *[handshake(joined)] * (2048 // 64))
    with pytest.raises(RemoteProtocolError, match="too many"):
        receive(conn, handshake(ticket()))
