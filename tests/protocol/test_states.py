"""The tables, cell by cell: what they say is what a connection does, and what they do not say it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import pytest

from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import ContentType, Direction, HandshakeType, ProtocolVersion, Role
from ktls.protocol.errors import LocalProtocolError, RemoteProtocolError
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret
from ktls.protocol.messages import HandshakeMessage
from ktls.protocol.states import (
    HANDSHAKE_RULES,
    RX_TRANSITIONS,
    TX_TRANSITIONS,
    ApplicationData,
    Closed,
    ConnectionState,
    HalfState,
    HandshakeRule,
    InboundPlainMessage,
    PeerClosed,
    RxEvent,
    SendMessage,
    SessionTicket,
    TxEvent,
    UpdateRxKey,
    UpdateTxKey,
)
from ktls.record.aead import RecordProtection

from .helpers import (
    CLOSE_NOTIFY,
    KU,
    MAX_GENERATION,
    TLS12,
    TLS13,
    UNEXPECTED,
    alert,
    connect,
    data,
    handshake,
    install,
    message,
    receive,
    secret,
    ticket,
)

# --- the half machines ---------------------------------------------------------------------------------------------

RX_STATES = [HalfState.OPEN, HalfState.CLOSED, HalfState.FAILED]


def in_rx_state(state: HalfState) -> KernelConnection:
    conn = connect()
    if state is HalfState.CLOSED:
        receive(conn, alert(CLOSE_NOTIFY))
    elif state is HalfState.FAILED:
        conn.fail()
    assert conn.rx_state is state
    return conn


def rx_event(conn: KernelConnection, event: RxEvent) -> None:
    if event is RxEvent.FAILURE:
        conn.fail()
    else:
        receive(conn, data(b"x") if event is RxEvent.MESSAGE else alert(CLOSE_NOTIFY))


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RX_STATES, RxEvent)))
def test_every_cell_of_the_rx_table(state: HalfState, event: RxEvent) -> None:
    conn = in_rx_state(state)
    if (state, event) in RX_TRANSITIONS:
        rx_event(conn, event)
        assert conn.rx_state is RX_TRANSITIONS[state, event]
    else:
        with pytest.raises(LocalProtocolError):
            rx_event(conn, event)
        assert conn.rx_state is state


def in_tx_state(state: HalfState) -> KernelConnection:
    # At the last generation a key can't change any more, so that every state can be reached.
    generation = MAX_GENERATION if state is HalfState.EXHAUSTED else 0
    conn = connect(tx_generation=generation)
    if state is HalfState.EXHAUSTED:
        assert conn.record_usage(Direction.TX, 2**23, now=0.0) == ()
    elif state is HalfState.CLOSED:
        conn.close()
    elif state is HalfState.FAILED:
        conn.fail()
    assert conn.tx_state is state
    return conn


@pytest.mark.parametrize(("state", "event"), list(itertools.product(HalfState, TxEvent)))
def test_every_cell_of_the_tx_table(state: HalfState, event: TxEvent) -> None:
    conn = in_tx_state(state)
    after = TX_TRANSITIONS.get((state, event), state)
    if event is TxEvent.FAILURE:
        conn.fail()
    elif event is TxEvent.CLOSE_NOTIFY:
        sent = [item for item in conn.close() if isinstance(item, SendMessage)]
        legal = (state, event) in TX_TRANSITIONS
        assert sent == ([SendMessage(ContentType.ALERT, CLOSE_NOTIFY)] if legal else [])
    elif event is TxEvent.KEY_EXHAUSTED:
        if state is HalfState.OPEN:
            conn = connect(tx_key_can_change=False)
        assert conn.record_usage(Direction.TX, 2**30, now=0.0) == ()
    elif (state, event) in TX_TRANSITIONS:
        assert conn.refresh_traffic_keys(now=0.0)
    else:
        with pytest.raises(LocalProtocolError):
            conn.refresh_traffic_keys(now=0.0)
    assert conn.tx_state is after


def test_the_tables_name_no_other_state() -> None:
    assert {state for state, _ in RX_TRANSITIONS} | set(RX_TRANSITIONS.values()) == set(RX_STATES)
    assert {state for state, _ in TX_TRANSITIONS} | set(TX_TRANSITIONS.values()) == set(HalfState)


def test_failure_is_possible_everywhere_and_final() -> None:
    for state in RX_STATES:
        assert RX_TRANSITIONS[state, RxEvent.FAILURE] is HalfState.FAILED
    for state in HalfState:
        assert TX_TRANSITIONS[state, TxEvent.FAILURE] is HalfState.FAILED
    assert {after for (state, _), after in RX_TRANSITIONS.items() if state is HalfState.FAILED} == {
        HalfState.FAILED
    }


# --- handshake messages --------------------------------------------------------------------------------------------

BODIES = {
    HandshakeType.KEY_UPDATE: KU[4:],
    HandshakeType.NEW_SESSION_TICKET: ticket()[4:],
    HandshakeType.HELLO_REQUEST: b"",
}


@pytest.mark.parametrize("message_type", range(256))
@pytest.mark.parametrize(("version", "role"), list(itertools.product(ProtocolVersion, Role)))
def test_every_handshake_type(version: ProtocolVersion, role: Role, message_type: int) -> None:
    conn = connect(role, TLS13 if version is ProtocolVersion.TLSv1_3 else TLS12)
    rules = {int(known): rule for known, rule in HANDSHAKE_RULES[version, role].items()}
    known = {int(member): member for member in HandshakeType}
    body = BODIES.get(known.get(message_type, HandshakeType.FINISHED), b"anything")
    record = handshake(message(message_type, body))
    if message_type not in rules:
        with pytest.raises(RemoteProtocolError) as caught:
            receive(conn, record)
        assert caught.value.alert is UNEXPECTED
        assert conn.rx_state is conn.tx_state is HalfState.FAILED
        return
    items = receive(conn, record)
    assert conn.rx_state is conn.tx_state is HalfState.OPEN
    match rules[message_type]:
        case HandshakeRule.KEY_UPDATE:
            assert [type(item) for item in items] == [UpdateRxKey]
        case HandshakeRule.SESSION_TICKET:
            assert items == [SessionTicket(record.fragment)]
        case HandshakeRule.REFUSE_RENEGOTIATION:
            assert items == [SendMessage(ContentType.ALERT, b"\x01\x64")]


def test_the_rules_are_those_of_the_standards() -> None:
    """The table itself, so that a row can't be added without a thought."""
    flat = {
        (version.name, role.name, known.name)
        for (version, role), rules in HANDSHAKE_RULES.items()
        for known in rules
    }
    assert flat == {
        ("TLSv1_3", "CLIENT", "KEY_UPDATE"),
        ("TLSv1_3", "CLIENT", "NEW_SESSION_TICKET"),
        ("TLSv1_3", "SERVER", "KEY_UPDATE"),
        ("TLSv1_2", "CLIENT", "HELLO_REQUEST"),
        ("TLSv1_2", "SERVER", "CLIENT_HELLO"),
    }


# --- content types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", sorted(set(range(256)) - {21, 22, 23}))
@pytest.mark.parametrize("fragment", [b"", b"\x01"])
def test_every_other_content_type_is_unexpected(content_type: int, fragment: bytes) -> None:
    conn = connect()
    with pytest.raises(RemoteProtocolError, match=f"content type {content_type}") as caught:
        receive(conn, InboundPlainMessage(content_type, fragment))
    assert caught.value.alert is UNEXPECTED
    assert conn.rx_state is conn.tx_state is HalfState.FAILED


# --- the items -----------------------------------------------------------------------------------------------------

SECRET = b"\xc3\x28qzxj\xfe\xff\x00\x01kvwq\x80\x91ZQXJ\xa2\xb3~{}|\xd4\xe5QJ\x17\x99"
KEYS = TrafficKeys(SECRET[:16], SECRET[16:28])
ITEMS: list[ConnectionState] = [
    ApplicationData(SECRET),
    PeerClosed(),
    Closed(),
    SendMessage(ContentType.HANDSHAKE, SECRET),
    UpdateTxKey(KEYS, 3),
    UpdateRxKey(KEYS, 3),
    SessionTicket(SECRET),
]


def leaks(text: str) -> bool:
    """Whether ``text`` shows any four bytes of SECRET in a row, in any notation that Python prints."""
    windows = [SECRET[start : start + 4] for start in range(len(SECRET) - 3)]
    return any(
        shown in text
        for window in windows
        for shown in (
            window.hex(),
            window.hex().upper(),
            window.hex(" "),
            repr(window)[2:-1],
            window.decode("latin-1"),
            ", ".join(map(str, window)),
            str(int.from_bytes(window, "big")),
        )
    )


def test_the_leak_detector_detects() -> None:
    shown = [
        SECRET.hex(),
        repr(SECRET),
        repr(bytearray(SECRET)),
        str(list(SECRET)),
        SECRET.hex(" "),
    ]
    assert all(map(leaks, shown))
    assert not leaks("<TrafficKeys of 128 bits, redacted>")


def test_every_item_of_the_union_is_here() -> None:
    assert {type(item) for item in ITEMS} == set(typing.get_args(ConnectionState))


SECRET_BEARERS: list[object] = [
    *ITEMS,
    KEYS,
    TrafficSecret(TLS13, SECRET),
    InboundPlainMessage(ContentType.APPLICATION_DATA, SECRET),
    HandshakeMessage(HandshakeType.NEW_SESSION_TICKET, SECRET),
    RecordProtection(TLS13, KEYS),
    KernelConnection(
        Role.CLIENT,
        TLS13,
        tx_secret=TrafficSecret(TLS13, SECRET),
        rx_secret=TrafficSecret(TLS13, SECRET),
    ),
]


@pytest.mark.parametrize("bearer", SECRET_BEARERS, ids=lambda bearer: type(bearer).__name__)
def test_nothing_secret_is_printed(bearer: object) -> None:
    texts = [repr(bearer), str(bearer), f"{bearer}", f"{bearer!r:>300}", "%s %r" % (bearer, bearer)]  # noqa: UP031  # all ways to print
    texts += [repr([bearer]), repr((bearer,)), repr({"key": bearer}), ascii(bearer)]
    assert not any(map(leaks, texts))


def test_nothing_secret_is_in_a_failed_comparison() -> None:
    ours, theirs = TrafficSecret(TLS13, SECRET), secret(TLS13, b"x")
    with pytest.raises(AssertionError) as caught:
        assert [ours, ours.keys(), UpdateTxKey(KEYS, 1)] == [theirs, theirs.keys(), PeerClosed()]
    assert "redacted" in str(caught.value)
    assert not leaks(str(caught.value))


def test_nothing_secret_is_in_what_errors_say() -> None:
    conn = connect()
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, handshake(b"\x18" + SECRET))
    assert not leaks(f"{caught.value} {caught.value!r} {vars(caught.value)}")


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: type(item).__name__)
def test_items_can_not_be_changed(item: ConnectionState) -> None:
    for field in dataclasses.fields(item):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item, field.name, None)
    assert item == dataclasses.replace(item)


def test_a_repr_says_where_a_connection_stands() -> None:
    conn = connect(Role.SERVER)
    install(conn, conn.refresh_traffic_keys(now=0.0))
    receive(conn, alert(CLOSE_NOTIFY))
    assert repr(conn) == "<KernelConnection server TLS_AES_128_GCM_SHA256 tx=open/1 rx=closed/0>"
