"""Rules 4 and 5 of ``KernelConnection``: alerts, and closing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ktls.protocol.enums import ContentType
from ktls.protocol.errors import AlertReceived, RemoteProtocolError
from ktls.protocol.states import (
    ApplicationData,
    Closed,
    HalfState,
    InboundPlainMessage,
    PeerClosed,
    SessionTicket,
)

from .helpers import (
    CLOSE_NOTIFY,
    KU,
    KU_REQUEST,
    SEND_CLOSE_NOTIFY,
    TLS12,
    TLS13,
    UNEXPECTED,
    USER_CANCELED,
    alert,
    assert_failed,
    connect,
    data,
    fatal,
    handshake,
    receive,
    rx_key,
    ticket,
)

if TYPE_CHECKING:
    from ktls.protocol.suites import CipherSuite


# --- rule 4: alerts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [TLS13, TLS12])
def test_rule_4_user_canceled_is_not_an_end(suite: CipherSuite) -> None:
    conn = connect(suite=suite)
    items = receive(conn, alert(USER_CANCELED), data(b"still here"), alert(CLOSE_NOTIFY))
    assert items[:2] == [ApplicationData(b"still here"), PeerClosed()]


@pytest.mark.parametrize("code", sorted(set(range(256)) - {0, 90}))
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_rule_4_any_other_alert_is_fatal_both_ways(level: int, code: int) -> None:
    conn = connect()
    with pytest.raises(AlertReceived) as caught:
        receive(conn, alert(bytes((level, code))))
    assert caught.value.description == code
    assert_failed(conn)


@pytest.mark.parametrize("code", sorted(set(range(256)) - {0, 90}))
def test_rule_4_a_warning_is_one_in_tls12(code: int) -> None:
    conn = connect(suite=TLS12)
    assert receive(conn, alert(bytes((1, code))), data(b"x")) == [ApplicationData(b"x")]
    with pytest.raises(AlertReceived):
        receive(conn, fatal(code))
    assert_failed(conn)


def test_rule_4_a_fatal_alert_inside_a_message_is_still_the_end() -> None:
    conn = connect()
    receive(conn, handshake(ticket()[:5]))
    with pytest.raises(AlertReceived):
        receive(conn, fatal(80))
    assert_failed(conn)


# --- rule 5: closing -------------------------------------------------------------------------------------------------


def test_rule_5_close_notify_closes_one_direction_in_tls13() -> None:
    conn = connect()
    assert receive(conn, alert(CLOSE_NOTIFY)) == [PeerClosed()]
    assert (conn.tx_state, conn.rx_state) == (HalfState.OPEN, HalfState.CLOSED)
    assert conn.refresh_traffic_keys(now=0.0)
    assert conn.close() == (SEND_CLOSE_NOTIFY, Closed())
    assert conn.close() == ()


def test_rule_5_we_may_close_first_and_go_on_reading() -> None:
    conn = connect()
    assert conn.close() == (SEND_CLOSE_NOTIFY,)
    assert conn.close() == ()
    assert receive(conn, data(b"late"), handshake(ticket())) == [
        ApplicationData(b"late"),
        SessionTicket(ticket()),
    ]
    # A requested update can't be answered any more, but the peer's new key is installed.
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 1)]
    assert receive(conn, alert(CLOSE_NOTIFY)) == [PeerClosed(), Closed()]


def test_rule_5_the_answer_is_immediate_in_tls12() -> None:
    conn = connect(suite=TLS12)
    assert receive(conn, alert(CLOSE_NOTIFY)) == [PeerClosed(), SEND_CLOSE_NOTIFY, Closed()]
    assert conn.tx_state is conn.rx_state is HalfState.CLOSED
    assert conn.close() == ()


def test_rule_5_no_second_close_notify_in_tls12() -> None:
    conn = connect(suite=TLS12)
    assert conn.close() == (SEND_CLOSE_NOTIFY,)
    assert receive(conn, alert(CLOSE_NOTIFY)) == [PeerClosed(), Closed()]


@pytest.mark.parametrize("level", [0, 1, 2, 255])
def test_rule_5_close_notify_has_no_level(level: int) -> None:
    conn = connect()
    assert receive(conn, alert(bytes((level, 0)))) == [PeerClosed()]


def test_rule_5_after_close_notify_everything_is_ignored() -> None:
    conn = connect()
    receive(conn, alert(CLOSE_NOTIFY))
    nonsense = [data(b"x"), handshake(b""), fatal(80), InboundPlainMessage(0, b""), handshake(KU)]
    assert receive(conn, *nonsense * 3000) == []
    assert (conn.tx_state, conn.rx_state) == (HalfState.OPEN, HalfState.CLOSED)
    assert conn.rx_generation == 0


def test_an_empty_alert_record_is_unexpected() -> None:
    conn = connect()
    with pytest.raises(RemoteProtocolError, match="empty alert") as caught:
        receive(conn, InboundPlainMessage(ContentType.ALERT, b""))
    assert caught.value.alert is UNEXPECTED
