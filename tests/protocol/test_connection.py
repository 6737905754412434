"""``KernelConnection`` against the rules of its contract, by their numbers (design, section 3): 1, 2, 8 and 9.

Rule 3 is in ``test_connection_messages``, 4 and 5 in ``test_connection_endings``, 6 and 7 in ``test_connection_limits``.
"""

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
from ktls.protocol.errors import LocalProtocolError, RemoteProtocolError
from ktls.protocol.limits import KeyLimits
from ktls.protocol.states import (
    ApplicationData,
    HalfState,
    InboundPlainMessage,
    SendMessage,
    SessionTicket,
    UpdateTxKey,
)
from ktls.protocol.suites import CipherSuite

from .helpers import (
    CHACHA,
    KU,
    KU_REQUEST,
    SEND_KU,
    TLS12,
    TLS13,
    UNEXPECTED,
    alert,
    assert_failed,
    connect,
    data,
    handshake,
    install,
    message,
    receive,
    rx_key,
    secret,
    ticket,
    tx_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktls.protocol.states import ConnectionState

SEND_NO_RENEGOTIATION = SendMessage(ContentType.ALERT, b"\x01\x64")


# --- construction ----------------------------------------------------------------------------------------------------


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


# --- rule 1: the order of the items is the protocol ------------------------------------------------------------------


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


# --- rule 2: a call raises and the connection has failed, or it returns everything -----------------------------------


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


# --- rule 8: what is refused -----------------------------------------------------------------------------------------


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


# --- rule 9: no time and no randomness inside ------------------------------------------------------------------------


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


# --- why a key was changed -------------------------------------------------------------------------------------------


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
