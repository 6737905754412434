"""``KernelConnection`` against the rules of its contract, by their numbers (design, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import (
    AlertDescription,
    ContentType,
    Direction,
    KeyChangeCause,
    ProtocolVersion,
    Role,
)
from ktls.protocol.errors import AlertReceived, LocalProtocolError, RemoteProtocolError
from ktls.protocol.limits import KeyLimits
from ktls.protocol.states import (
    ApplicationData,
    Closed,
    HalfState,
    InboundPlainMessage,
    PeerClosed,
    SendMessage,
    SessionTicket,
    UpdateRxKey,
    UpdateTxKey,
)
from ktls.protocol.suites import CipherSuite

from .helpers import (
    CHACHA,
    CLOSE_NOTIFY,
    KU,
    KU_REQUEST,
    MAX_GENERATION,
    TLS12,
    TLS13,
    UNEXPECTED,
    USER_CANCELED,
    alert,
    connect,
    data,
    fatal,
    handshake,
    install,
    message,
    receive,
    secret,
    ticket,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktls.protocol.states import ConnectionState

SEND_KU = SendMessage(ContentType.HANDSHAKE, KU)
SEND_KU_REQUEST = SendMessage(ContentType.HANDSHAKE, KU_REQUEST)
SEND_CLOSE_NOTIFY = SendMessage(ContentType.ALERT, CLOSE_NOTIFY)
SEND_NO_RENEGOTIATION = SendMessage(ContentType.ALERT, b"\x01\x64")
CCM = CipherSuite.TLS_AES_128_CCM_SHA256


def tx_key(conn: KernelConnection, generation: int) -> UpdateTxKey:
    """The command that installs this generation of our key, derived anew from generation 0."""
    traffic = secret(conn.cipher_suite, b"c" if conn.role is Role.CLIENT else b"s")
    for _ in range(generation):
        traffic = traffic.next()
    return UpdateTxKey(traffic.keys(), generation)


def rx_key(conn: KernelConnection, generation: int) -> UpdateRxKey:
    """The command that installs this generation of the peer's key."""
    traffic = secret(conn.cipher_suite, b"s" if conn.role is Role.CLIENT else b"c")
    for _ in range(generation):
        traffic = traffic.next()
    return UpdateRxKey(traffic.keys(), generation)


def assert_tx_state(conn: KernelConnection, state: HalfState) -> None:
    """``conn.tx_state is state``, in a way that lets a type checker expect another state after a call."""
    assert conn.tx_state is state


def assert_failed(conn: KernelConnection, generations: tuple[int, int] = (0, 0)) -> None:
    """Both halves have failed, nothing moved, and every call behaves as documented."""
    assert conn.rx_state is conn.tx_state is HalfState.FAILED
    assert (conn.tx_generation, conn.rx_generation) == generations
    for record in (data(b"x"), handshake(KU), alert(CLOSE_NOTIFY)):
        with pytest.raises(LocalProtocolError, match="has failed"):
            receive(conn, record)
    with pytest.raises(LocalProtocolError):
        conn.refresh_traffic_keys(now=0.0)
    assert conn.record_usage(Direction.TX, 2**40, now=0.0) == ()
    assert conn.record_usage(Direction.RX, 2**40, now=0.0) == ()
    assert conn.close() == ()
    conn.fail()
    assert conn.rx_state is conn.tx_state is HalfState.FAILED


# --- construction --------------------------------------------------------------------------------------------------


def test_versions_and_their_secrets() -> None:
    c, s = secret(TLS13, b"c"), secret(TLS13, b"s")
    assert KernelConnection(Role.CLIENT, TLS13, tx_secret=c, rx_secret=s).version == 0x0304
    assert KernelConnection(Role.CLIENT, TLS12).version is ProtocolVersion.TLSv1_2


@pytest.mark.parametrize(
    ("suite", "has_tx", "has_rx"),
    [
        (TLS13, False, False),
        (TLS13, True, False),
        (TLS13, False, True),
        (TLS12, True, True),
        (TLS12, True, False),
        (TLS12, False, True),
    ],
)
def test_wrong_secrets_are_refused(suite: CipherSuite, has_tx: bool, has_rx: bool) -> None:
    with pytest.raises(ValueError, match="needs both traffic secrets"):
        KernelConnection(
            Role.CLIENT,
            suite,
            tx_secret=secret(TLS13, b"c") if has_tx else None,
            rx_secret=secret(TLS13, b"s") if has_rx else None,
        )


def test_a_new_connection_is_open_both_ways() -> None:
    conn = connect(tx_generation=3, rx_generation=4)
    assert conn.tx_state is conn.rx_state is HalfState.OPEN
    assert (conn.tx_generation, conn.rx_generation) == (3, 4)
    assert not conn.fragment_pending
    assert conn.limits == KeyLimits()


def test_generations_of_tls12_are_0() -> None:
    conn = connect(suite=TLS12)
    assert (conn.tx_generation, conn.rx_generation) == (0, 0)
    assert conn.tx_key_can_change is False


# --- rule 1: the order of the items is the protocol ----------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("suite", [TLS13, CHACHA, CipherSuite.TLS_AES_256_GCM_SHA384])
def test_rule_1_a_requested_update_is_answered_in_order(role: Role, suite: CipherSuite) -> None:
    conn = connect(role, suite)
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 1), SEND_KU, tx_key(conn, 1)]
    assert (conn.tx_generation, conn.rx_generation) == (1, 1)


def test_rule_1_an_update_without_request_is_not_answered() -> None:
    conn = connect()
    assert receive(conn, handshake(KU), handshake(KU)) == [rx_key(conn, 1), rx_key(conn, 2)]
    assert (conn.tx_generation, conn.rx_generation) == (0, 2)


def test_rule_1_answers_are_coalesced_while_one_is_owed() -> None:
    conn = connect()
    first = receive(conn, handshake(KU_REQUEST))
    assert receive(conn, handshake(KU_REQUEST), handshake(KU_REQUEST)) == [
        rx_key(conn, 2),
        rx_key(conn, 3),
    ]
    conn.tx_key_installed(0)  # an older key: still owed
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 4)]
    install(conn, first)
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 5), SEND_KU, tx_key(conn, 2)]


def test_key_changes_that_wait_do_not_pile_up() -> None:
    """Sixteen are as new as a thousand. A request to the peer still gets through."""
    conn = connect()
    for _ in range(16):
        assert conn.refresh_traffic_keys(now=0.0) != ()
    assert conn.refresh_traffic_keys(now=0.0) == ()
    assert conn.tx_generation == 16
    assert conn.refresh_traffic_keys(True, now=0.0) != ()
    for generation in range(1, 18):
        conn.tx_key_installed(generation)
    assert conn.refresh_traffic_keys(now=0.0) != ()


def test_rule_1_a_refresh_of_our_own_is_not_an_answer() -> None:
    conn = connect()
    assert conn.refresh_traffic_keys(now=0.0) == (SEND_KU, tx_key(conn, 1))
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 1), SEND_KU, tx_key(conn, 2)]


def test_rule_1_a_later_key_settles_an_owed_answer_too() -> None:
    conn = connect()
    receive(conn, handshake(KU_REQUEST))
    conn.refresh_traffic_keys(now=0.0)
    conn.tx_key_installed(2)
    assert receive(conn, handshake(KU_REQUEST)) == [rx_key(conn, 2), SEND_KU, tx_key(conn, 3)]


@pytest.mark.parametrize("role", Role)
def test_rule_1_every_new_secret_is_logged_with_its_label(role: Role) -> None:
    log: list[tuple[str, bytes]] = []
    conn = connect(role, key_log=lambda label, value: log.append((label, value)))
    receive(conn, handshake(KU_REQUEST), handshake(KU))
    ours, theirs, o, t = (
        ("CLIENT", "SERVER", b"c", b"s")
        if role is Role.CLIENT
        else ("SERVER", "CLIENT", b"s", b"c")
    )
    assert log == [
        (f"{theirs}_TRAFFIC_SECRET_1", secret(TLS13, t).next().secret),
        (f"{ours}_TRAFFIC_SECRET_1", secret(TLS13, o).next().secret),
        (f"{theirs}_TRAFFIC_SECRET_2", secret(TLS13, t).next().next().secret),
    ]


def test_rule_1_data_and_tickets_come_out_as_they_came() -> None:
    conn = connect()
    items = receive(conn, data(b"one"), handshake(ticket()), data(b"two"))
    assert items == [ApplicationData(b"one"), SessionTicket(ticket()), ApplicationData(b"two")]


def test_rule_1_the_connection_knows_when_the_outside_has_caught_up() -> None:
    conn = connect(tx_generation=5, rx_generation=7)
    assert [conn.installed_generation(direction) for direction in Direction] == [5, 7]
    items = receive(conn, handshake(KU_REQUEST))
    assert [conn.installed_generation(direction) for direction in Direction] == [5, 7]
    conn.rx_key_installed(8)
    assert [conn.installed_generation(direction) for direction in Direction] == [5, 8]
    install(conn, items)
    assert [conn.installed_generation(direction) for direction in Direction] == [6, 8]
    assert (conn.tx_generation, conn.rx_generation) == (6, 8)


# --- rule 2: a call raises and the connection has failed, or it returns everything ---------------------------------


def test_rule_2_the_items_can_be_left_alone_and_taken_up_later() -> None:
    conn, twin = connect(), connect()
    items = conn.process_message(handshake(KU_REQUEST), now=0.0)
    next(iter(items))  # and no further
    assert (conn.tx_generation, conn.rx_generation) == (1, 1)
    assert list(items) == list(items) == receive(twin, handshake(KU_REQUEST))
    assert len(items) == 3


BREACHES: dict[
    str, tuple[Callable[[], KernelConnection], InboundPlainMessage, AlertDescription]
] = {
    "unknown content type": (connect, InboundPlainMessage(0, b""), UNEXPECTED),
    "change_cipher_spec": (
        connect,
        InboundPlainMessage(ContentType.CHANGE_CIPHER_SPEC, b"\x01"),
        UNEXPECTED,
    ),
    "short alert": (connect, alert(b"\x01"), AlertDescription.DECODE_ERROR),
    "empty handshake": (connect, handshake(b""), UNEXPECTED),
    "joined key updates": (connect, handshake(KU + KU), UNEXPECTED),
    "wrong request": (connect, handshake(message(24, b"\2")), AlertDescription.ILLEGAL_PARAMETER),
    "wrong length": (connect, handshake(message(24, b"")), AlertDescription.DECODE_ERROR),
    "bad ticket": (connect, handshake(message(4, b"x")), AlertDescription.DECODE_ERROR),
    "ticket, bad update": (
        connect,
        handshake(ticket() + message(24, b"\2")),
        AlertDescription.ILLEGAL_PARAMETER,
    ),
    "hello request with a body": (
        lambda: connect(suite=TLS12),
        handshake(message(0, b"x")),
        AlertDescription.DECODE_ERROR,
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_rule_2_after_a_breach_both_directions_have_failed(name: str) -> None:
    make, record, expected = BREACHES[name]
    conn = make()
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, record)
    assert caught.value.alert is expected
    assert not caught.value.recoverable
    assert_failed(conn)


def test_rule_2_generations_are_remembered_after_a_failure() -> None:
    conn = connect()
    receive(conn, handshake(KU_REQUEST), handshake(KU))
    with pytest.raises(RemoteProtocolError):
        receive(conn, handshake(message(24, b"\2")))
    assert_failed(conn, (1, 2))


def test_rule_2_a_local_error_changes_nothing() -> None:
    conn = connect()
    conn.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        conn.refresh_traffic_keys(now=0.0)
    assert (conn.tx_state, conn.rx_state) == (HalfState.CLOSED, HalfState.OPEN)
    assert (conn.tx_generation, conn.rx_generation) == (0, 0)
    assert receive(conn, data(b"x")) == [ApplicationData(b"x")]


def test_rule_2_a_record_layer_can_report_a_failure() -> None:
    conn = connect()
    conn.fail()
    assert_failed(conn)


# --- rule 3 is in test_connection_messages -------------------------------------------------------------------------

# --- rule 4: alerts ------------------------------------------------------------------------------------------------


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


# --- rule 5: closing -----------------------------------------------------------------------------------------------


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


# --- rule 6: key updates and limits --------------------------------------------------------------------------------


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


# --- rule 7: floods ------------------------------------------------------------------------------------------------

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


# --- rule 8: what is refused ---------------------------------------------------------------------------------------

CLIENT_HELLO = message(1, bytes(40))


def test_rule_8_tls12_has_no_key_update() -> None:
    conn = connect(suite=TLS12)
    with pytest.raises(LocalProtocolError, match=r"TLS 1\.2 has no KeyUpdate") as caught:
        conn.refresh_traffic_keys(now=0.0)
    assert caught.value.recoverable
    assert conn.tx_state is conn.rx_state is HalfState.OPEN
    assert receive(conn, data(b"x")) == [ApplicationData(b"x")]
    with pytest.raises(RemoteProtocolError) as remote:
        receive(conn, handshake(KU))
    assert remote.value.alert is UNEXPECTED


@pytest.mark.parametrize(
    ("role", "request_bytes"), [(Role.CLIENT, bytes(4)), (Role.SERVER, CLIENT_HELLO)]
)
def test_rule_8_renegotiation_is_refused_by_a_warning(role: Role, request_bytes: bytes) -> None:
    conn = connect(role, TLS12)
    assert receive(conn, handshake(request_bytes)) == [SEND_NO_RENEGOTIATION]
    assert receive(conn, data(b"x")) == [ApplicationData(b"x")]
    assert receive(conn, handshake(request_bytes * 2)) == [SEND_NO_RENEGOTIATION] * 2


def test_rule_8_refusals_do_not_pile_up() -> None:
    conn = connect(suite=TLS12)
    assert receive(conn, *[handshake(bytes(4))] * 100) == [SEND_NO_RENEGOTIATION] * 16


def test_rule_8_a_closed_side_refuses_in_silence() -> None:
    conn = connect(suite=TLS12)
    conn.close()
    assert receive(conn, handshake(bytes(4))) == []


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("suite", [TLS13, TLS12])
def test_rule_8_a_late_certificate_request_is_unexpected(role: Role, suite: CipherSuite) -> None:
    conn = connect(role, suite)
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, handshake(message(13, b"\0\0\0")))
    assert caught.value.alert is UNEXPECTED


def test_rule_8_a_ticket_to_a_server_is_unexpected() -> None:
    conn = connect(Role.SERVER)
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, handshake(ticket()))
    assert caught.value.alert is UNEXPECTED


@pytest.mark.parametrize(
    ("role", "request_bytes"), [(Role.CLIENT, CLIENT_HELLO), (Role.SERVER, bytes(4))]
)
def test_rule_8_hellos_go_one_way(role: Role, request_bytes: bytes) -> None:
    conn = connect(role, TLS12)
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, handshake(request_bytes))
    assert caught.value.alert is UNEXPECTED


# --- rule 9: no time and no randomness inside ----------------------------------------------------------------------


def test_rule_9_the_same_calls_give_the_same_items() -> None:
    def run(origin: float) -> list[object]:
        conn = connect(limits=KeyLimits(age=60.0), now=origin)
        return [
            *receive(conn, handshake(ticket()), handshake(KU_REQUEST), now=origin + 1),
            *conn.refresh_traffic_keys(True, now=origin + 2),
            *conn.record_usage(Direction.TX, 1, now=origin + 100),
            *conn.close(),
        ]

    assert run(0.0) == run(0.0) == run(-5000.0) == run(1e6)


def test_rule_7_messages_are_counted_not_records() -> None:
    conn = connect()
    joined = ticket() * 64
    receive(conn, *[handshake(joined)] * (2048 // 64))
    with pytest.raises(RemoteProtocolError, match="too many"):
        receive(conn, handshake(ticket()))


def test_an_empty_alert_record_is_unexpected() -> None:
    conn = connect()
    with pytest.raises(RemoteProtocolError, match="empty alert") as caught:
        receive(conn, InboundPlainMessage(ContentType.ALERT, b""))
    assert caught.value.alert is UNEXPECTED


# --- why a key was changed ----------------------------------------------------------------------------------------


def cause_of(items: Sequence[ConnectionState]) -> KeyChangeCause:
    (update,) = (item for item in items if isinstance(item, UpdateTxKey))
    return update.cause


def test_the_cause_of_a_change_is_told() -> None:
    conn = connect()
    assert cause_of(conn.refresh_traffic_keys(now=0.0)) is KeyChangeCause.APPLICATION
    conn.tx_key_installed(1)
    assert cause_of(receive(conn, handshake(KU_REQUEST))) is KeyChangeCause.PEER_REQUEST
    conn.tx_key_installed(2)
    for direction in Direction:
        items = conn.record_usage(direction, 2**23, now=0.0)
        assert cause_of(items) is KeyChangeCause.LIMIT
        conn.tx_key_installed(conn.tx_generation)
