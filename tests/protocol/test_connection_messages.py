"""Rule 3: handshake messages over records, each case fed whole, bytewise, split everywhere, joined and with more behind."""

from __future__ import annotations

import pytest

from ktls.protocol.enums import AlertDescription, Role
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.messages import MAX_HANDSHAKE_MESSAGE
from ktls.protocol.states import (
    ApplicationData,
    ConnectionState,
    HalfState,
    InboundPlainMessage,
    SessionTicket,
    UpdateRxKey,
)
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite

from .helpers import (
    CLOSE_NOTIFY,
    KU,
    KU_REQUEST,
    LARGEST_TICKET,
    TLS12,
    TLS13,
    UNEXPECTED,
    USER_CANCELED,
    alert,
    connect,
    data,
    fatal,
    handshake,
    message,
    pieces,
    receive,
    rfc8448,
    ticket,
)

ILLEGAL, DECODE = AlertDescription.ILLEGAL_PARAMETER, AlertDescription.DECODE_ERROR
TICKET = ticket(b"t" * 20, extensions=b"\x00\x2a\x00\x04\x00\x00\x04\x00")

#: Legal messages: suite, role, bytes. A KeyUpdate ends its record, so nothing may stand behind it.
LEGAL: dict[str, tuple[CipherSuite, Role, bytes]] = {
    "ticket": (TLS13, Role.CLIENT, TICKET),
    "ticket of rfc 8448": (TLS13, Role.CLIENT, rfc8448()["new_session_ticket"]),
    "two tickets": (TLS13, Role.CLIENT, TICKET + ticket()),
    "ticket and update": (TLS13, Role.CLIENT, TICKET + KU),
    "tickets and request": (TLS13, Role.CLIENT, TICKET + ticket(b"2") + KU_REQUEST),
    "update to client": (TLS13, Role.CLIENT, KU),
    "update to server": (TLS13, Role.SERVER, KU),
    "request to server": (TLS13, Role.SERVER, KU_REQUEST),
    "hello request": (TLS12, Role.CLIENT, message(0)),
    "client hello": (TLS12, Role.SERVER, message(1, bytes(50))),
}

#: Breaches, whichever way they are cut: suite, role, bytes, alert.
ILLEGAL_ALWAYS: dict[str, tuple[CipherSuite, Role, bytes, AlertDescription]] = {
    "wrong request": (TLS13, Role.SERVER, message(24, b"\2"), ILLEGAL),
    "update without body": (TLS13, Role.SERVER, message(24), DECODE),
    "long update": (TLS13, Role.CLIENT, message(24, b"\0\0"), DECODE),
    "empty ticket": (TLS13, Role.CLIENT, ticket(b""), DECODE),
    "ticket cut short": (TLS13, Role.CLIENT, message(4, TICKET[4:-1]), DECODE),
    "ticket with more inside": (TLS13, Role.CLIENT, message(4, TICKET[4:] + b"\0"), DECODE),
    "ticket of no length": (TLS13, Role.CLIENT, message(4), DECODE),
    "ticket behind a ticket": (TLS13, Role.CLIENT, TICKET + ticket(b""), DECODE),
    "too large a ticket": (
        TLS13,
        Role.CLIENT,
        b"\x04" + (MAX_HANDSHAKE_MESSAGE + 1).to_bytes(3, "big"),
        ILLEGAL,
    ),
    "far too large an update": (TLS13, Role.SERVER, b"\x18\xff\xff\xff", ILLEGAL),
    "ticket to a server": (TLS13, Role.SERVER, TICKET, UNEXPECTED),
    "certificate request": (TLS13, Role.CLIENT, message(13, b"\0\0\0"), UNEXPECTED),
    "finished": (TLS13, Role.CLIENT, message(20, bytes(32)), UNEXPECTED),
    "ticket, finished": (TLS13, Role.CLIENT, TICKET + message(20, bytes(32)), UNEXPECTED),
    "hello request with a body": (TLS12, Role.CLIENT, message(0, b"\0"), DECODE),
    "ticket of tls 1.2": (TLS12, Role.CLIENT, TICKET, UNEXPECTED),
    "update in tls 1.2": (TLS12, Role.SERVER, KU, UNEXPECTED),
}


def whole(suite: CipherSuite, role: Role, fragment: bytes) -> list[ConnectionState]:
    items = receive(connect(role, suite), handshake(fragment))
    assert items
    return items


@pytest.mark.parametrize("name", LEGAL)
def test_rule_3_bytewise(name: str) -> None:
    suite, role, fragment = LEGAL[name]
    conn = connect(role, suite)
    records = [handshake(bytes((byte,))) for byte in fragment]
    assert receive(conn, *records) == whole(suite, role, fragment)
    assert not conn.fragment_pending


@pytest.mark.parametrize("name", LEGAL)
def test_rule_3_split_at_every_point(name: str) -> None:
    suite, role, fragment = LEGAL[name]
    expected = whole(suite, role, fragment)
    for cut in range(1, len(fragment)):
        conn = connect(role, suite)
        first, second = pieces(fragment, cut)
        items = receive(conn, handshake(first))
        assert conn.fragment_pending is (fragment[:cut] != b"".join(map(message_of, items)))
        items += receive(conn, handshake(second))
        assert items == expected
        assert not conn.fragment_pending


def message_of(item: ConnectionState) -> bytes:
    """The bytes that an item came from, for those that come before others in LEGAL."""
    return item.message if isinstance(item, SessionTicket) else b""


@pytest.mark.parametrize("name", LEGAL)
def test_rule_3_joined_behind_tickets(name: str) -> None:
    suite, role, fragment = LEGAL[name]
    if (suite, role) != (TLS13, Role.CLIENT):
        # Nothing may stand in front of these but themselves; an update may not.
        joined = fragment * 2
        if suite is TLS12:
            assert whole(suite, role, joined) == whole(suite, role, fragment) * 2
        else:
            with pytest.raises(RemoteProtocolError):
                receive(connect(role, suite), handshake(joined))
        return
    front = ticket(b"in front")
    assert whole(suite, role, front + fragment) == [
        SessionTicket(front),
        *whole(suite, role, fragment),
    ]


@pytest.mark.parametrize("name", LEGAL)
@pytest.mark.parametrize("trailing", [b"\x18", b"\x04", b"\x00", b"\x01", b"\xff", KU, b"\x04\0\0"])
def test_rule_3_with_trailing_bytes(name: str, trailing: bytes) -> None:
    suite, role, fragment = LEGAL[name]
    conn = connect(role, suite)
    may_begin = {
        (TLS13, Role.CLIENT): {4, 24},
        (TLS13, Role.SERVER): {24},
        (TLS12, Role.CLIENT): {0},
        (TLS12, Role.SERVER): {1},
    }[suite, role]
    ends_in_update = fragment.endswith((KU, KU_REQUEST))
    if ends_in_update or trailing[0] not in may_begin:
        with pytest.raises(RemoteProtocolError) as caught:
            receive(conn, handshake(fragment + trailing))
        assert caught.value.alert is UNEXPECTED
        assert conn.rx_state is HalfState.FAILED
        assert (conn.rx_generation, conn.tx_generation) == (0, 0)
        return
    items = receive(conn, handshake(fragment + trailing))
    expected = whole(suite, role, fragment)
    if trailing == KU:
        assert items[:-1] == expected
        assert isinstance(items[-1], UpdateRxKey)
    else:
        assert items == expected
    assert conn.fragment_pending is (trailing != KU)


@pytest.mark.parametrize("name", ILLEGAL_ALWAYS)
def test_rule_3_breaches_are_found_however_they_are_cut(name: str) -> None:
    suite, role, fragment, expected = ILLEGAL_ALWAYS[name]
    ways = [[fragment], [bytes((byte,)) for byte in fragment]]
    ways += [pieces(fragment, cut) for cut in range(1, len(fragment))]
    for way in ways:
        conn = connect(role, suite)
        with pytest.raises(RemoteProtocolError) as caught:
            receive(conn, *map(handshake, way))
        assert caught.value.alert is expected
        assert conn.rx_state is conn.tx_state is HalfState.FAILED


@pytest.mark.parametrize("name", ILLEGAL_ALWAYS)
def test_rule_3_breaches_are_found_with_trailing_bytes(name: str) -> None:
    suite, role, fragment, _ = ILLEGAL_ALWAYS[name]
    conn = connect(role, suite)
    with pytest.raises(RemoteProtocolError):
        receive(conn, handshake(fragment + b"\xff"))
    assert conn.rx_state is HalfState.FAILED


# --- KeyUpdate and its record --------------------------------------------------------------------------------------


def test_rule_3_a_ticket_and_an_update_may_share_a_record() -> None:
    conn = connect()
    ticket_item, update = receive(conn, handshake(TICKET + KU))
    assert ticket_item == SessionTicket(TICKET)
    assert isinstance(update, UpdateRxKey)


@pytest.mark.parametrize(
    "behind", [KU, KU_REQUEST, TICKET, TICKET[:1], TICKET[:-1], KU[:1], KU[:4]]
)
@pytest.mark.parametrize("update", [KU, KU_REQUEST])
@pytest.mark.parametrize("front", [b"", TICKET])
def test_rule_3_an_update_must_end_its_record(front: bytes, update: bytes, behind: bytes) -> None:
    conn = connect()
    with pytest.raises(RemoteProtocolError, match="not the last message") as caught:
        receive(conn, handshake(front + update + behind))
    assert caught.value.alert is UNEXPECTED
    assert (conn.rx_generation, conn.tx_generation) == (0, 0)


def test_rule_3_an_update_must_end_its_record_also_when_it_was_split() -> None:
    for cut in range(1, len(KU)):
        conn = connect()
        first, second = pieces(KU, cut)
        with pytest.raises(RemoteProtocolError, match="not the last message"):
            receive(conn, handshake(first), handshake(second + TICKET[:3]))
        assert conn.rx_generation == 0


def test_rule_3_an_update_split_over_two_records_is_legal() -> None:
    for cut in range(1, len(KU)):
        first, second = pieces(KU, cut)
        (item,) = receive(connect(), handshake(first), handshake(second))
        assert isinstance(item, UpdateRxKey)


# --- what may not stand between fragments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "between",
    [
        data(b"x"),
        data(b""),
        alert(CLOSE_NOTIFY),
        alert(USER_CANCELED),
        InboundPlainMessage(20, b"\1"),
    ],
    ids=["data", "empty data", "close_notify", "user_canceled", "change_cipher_spec"],
)
@pytest.mark.parametrize("cut", [1, 3, 4, 5, len(TICKET) - 1])
def test_rule_3_fragments_may_not_be_interleaved(between: InboundPlainMessage, cut: int) -> None:
    conn = connect()
    assert receive(conn, handshake(TICKET[:cut])) == []
    assert conn.fragment_pending
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, between)
    assert caught.value.alert is UNEXPECTED
    assert conn.rx_state is conn.tx_state is HalfState.FAILED


def test_rule_3_a_warning_of_tls12_may_not_stand_between_either() -> None:
    conn = connect(suite=TLS12)
    receive(conn, handshake(b"\0"))
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, alert(b"\x01\x6e"))
    assert caught.value.alert is UNEXPECTED


def test_rule_3_an_empty_handshake_record_is_unexpected() -> None:
    for before in (b"", TICKET[:7]):
        conn = connect()
        if before:
            receive(conn, handshake(before))
        with pytest.raises(RemoteProtocolError, match="empty handshake record") as caught:
            receive(conn, handshake(b""))
        assert caught.value.alert is UNEXPECTED


def test_rule_3_other_records_are_fine_between_messages() -> None:
    conn = connect()
    records = [handshake(TICKET), data(b"x"), alert(USER_CANCELED), handshake(TICKET), data(b"y")]
    assert receive(conn, *records) == [
        SessionTicket(TICKET),
        ApplicationData(b"x"),
        SessionTicket(TICKET),
        ApplicationData(b"y"),
    ]


# --- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MAX_FRAGMENT, 1000])
def test_rule_3_the_largest_ticket_arrives(size: int) -> None:
    conn = connect()
    records = [
        handshake(LARGEST_TICKET[start : start + size])
        for start in range(0, len(LARGEST_TICKET), size)
    ]
    assert receive(conn, *records) == [SessionTicket(LARGEST_TICKET)]


def test_rule_3_a_larger_one_is_refused_before_it_arrives() -> None:
    conn = connect()
    assert receive(conn, handshake(b"\x04\x02\x01")) == []
    with pytest.raises(RemoteProtocolError) as caught:
        receive(conn, handshake(b"\xff"))
    assert caught.value.alert is ILLEGAL


def test_rule_3_a_full_record_of_small_tickets() -> None:
    conn = connect()
    count = MAX_FRAGMENT // len(TICKET)
    assert receive(conn, handshake(TICKET * count)) == [SessionTicket(TICKET)] * count


def test_a_fatal_alert_between_fragments_is_the_peers_last_word() -> None:
    conn = connect()
    receive(conn, handshake(TICKET[:3]))
    with pytest.raises(OSError, match="internal_error"):
        receive(conn, fatal(80))
