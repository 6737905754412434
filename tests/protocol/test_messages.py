"""Messages as bytes: built, parsed and put together."""

from __future__ import annotations

import pytest

from ktls.protocol.enums import AlertDescription, AlertLevel, HandshakeType, KeyUpdateRequest
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.messages import (
    MAX_HANDSHAKE_MESSAGE,
    Alert,
    HandshakeMessage,
    HandshakeReassembler,
    build_alert,
    build_key_update,
    check_new_session_ticket,
    parse_alert,
    parse_key_update,
)

from .helpers import KU, KU_REQUEST, LARGEST_TICKET, UNEXPECTED, message, pieces, rfc8448, ticket


def accept(message_type: int) -> HandshakeType:
    if message_type == 13:
        raise RemoteProtocolError("not now", UNEXPECTED)
    return HandshakeType(message_type)


@pytest.fixture
def reassembler() -> HandshakeReassembler:
    return HandshakeReassembler(accept)


# --- KeyUpdate -----------------------------------------------------------------------------------------------------


def test_key_update_bytes() -> None:
    assert build_key_update(KeyUpdateRequest.UPDATE_NOT_REQUESTED) == KU
    assert build_key_update(KeyUpdateRequest.UPDATE_REQUESTED) == KU_REQUEST


@pytest.mark.parametrize("value", range(256))
def test_every_value_of_a_key_update(value: int) -> None:
    if value < 2:
        assert parse_key_update(bytes((value,))) == KeyUpdateRequest(value)
        return
    with pytest.raises(RemoteProtocolError) as caught:
        parse_key_update(bytes((value,)))
    assert caught.value.alert is AlertDescription.ILLEGAL_PARAMETER


@pytest.mark.parametrize("body", [b"", b"\0\0", b"\2\2", bytes(100)])
def test_key_update_of_a_wrong_length(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_key_update(body)
    assert caught.value.alert is AlertDescription.DECODE_ERROR


# --- alerts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("description", AlertDescription)
@pytest.mark.parametrize("level", AlertLevel)
def test_alerts_have_the_level_of_the_standard(
    description: AlertDescription, level: AlertLevel
) -> None:
    warnings = {0, 90, 100}  # close_notify, user_canceled, no_renegotiation
    expected = 1 if description in warnings else int(level)
    assert build_alert(description, level) == bytes((expected, description))


def test_alerts_are_fatal_unless_something_else_is_said() -> None:
    assert build_alert(AlertDescription.INTERNAL_ERROR) == b"\x02\x50"


@pytest.mark.parametrize("code", range(256))
def test_every_alert_code_is_read(code: int) -> None:
    known = {int(description) for description in AlertDescription}
    alert = parse_alert(bytes((code, code)))
    assert alert == Alert(code, code)
    assert isinstance(alert.description, AlertDescription) is (code in known)


@pytest.mark.parametrize("fragment", [b"", b"\2", b"\2\x28\2", b"\1\0\1\0"])
def test_an_alert_record_holds_exactly_one_alert(fragment: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_alert(fragment)
    assert caught.value.alert is AlertDescription.DECODE_ERROR


# --- NewSessionTicket ----------------------------------------------------------------------------------------------

GREASE = b"\x0a\x0a\x00\x00"
MAX_EARLY_DATA = b"\x00\x2a\x00\x04\xff\xff\xff\xff"


@pytest.mark.parametrize(
    "whole",
    [
        ticket(),
        ticket(nonce=b""),
        ticket(b"t"),
        ticket(extensions=GREASE),
        ticket(extensions=GREASE + MAX_EARLY_DATA),
        rfc8448()["new_session_ticket"],
        LARGEST_TICKET,
    ],
    ids=lambda whole: f"{len(whole)} bytes",
)
def test_legal_tickets(whole: bytes) -> None:
    check_new_session_ticket(whole[4:])


@pytest.mark.parametrize("whole", [ticket(extensions=GREASE), rfc8448()["new_session_ticket"]])
def test_a_ticket_cut_short_anywhere_or_with_more_behind_is_malformed(whole: bytes) -> None:
    body = whole[4:]
    for bad in [body[:end] for end in range(len(body))] + [body + b"\0"]:
        with pytest.raises(RemoteProtocolError) as caught:
            check_new_session_ticket(bad)
        assert caught.value.alert is AlertDescription.DECODE_ERROR


@pytest.mark.parametrize(
    ("extensions", "reason"),
    [
        (b"\0", "ends too early"),
        (b"\0\x2a\0", "ends too early"),
        (b"\0\x2a\0\1", "ends too early"),
        (GREASE + b"\0\x2a\0\5\0\0\0\0", "ends too early"),
    ],
)
def test_malformed_extensions_of_a_ticket(extensions: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason) as caught:
        check_new_session_ticket(ticket(extensions=extensions)[4:])
    assert caught.value.alert is AlertDescription.DECODE_ERROR


def test_a_ticket_may_not_be_empty() -> None:
    with pytest.raises(RemoteProtocolError, match="empty session ticket") as caught:
        check_new_session_ticket(ticket(b"")[4:])
    assert caught.value.alert is AlertDescription.DECODE_ERROR


# --- reassembly ----------------------------------------------------------------------------------------------------

FINISHED = HandshakeMessage(HandshakeType.FINISHED, b"verify data")
HELLO = HandshakeMessage(HandshakeType.HELLO_REQUEST, b"")


def test_encode() -> None:
    assert FINISHED.encode() == message(20, b"verify data")
    assert HELLO.encode() == bytes(4)


def test_the_largest_legal_ticket_is_the_largest_message(
    reassembler: HandshakeReassembler,
) -> None:
    assert len(LARGEST_TICKET) - 4 == MAX_HANDSHAKE_MESSAGE
    (whole,) = reassembler.feed(LARGEST_TICKET)
    assert whole.encode() == LARGEST_TICKET


@pytest.mark.parametrize("length", [MAX_HANDSHAKE_MESSAGE + 1, 2**24 - 1])
def test_a_larger_announcement_is_refused_at_once(
    reassembler: HandshakeReassembler, length: int
) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        reassembler.feed(b"\x04" + length.to_bytes(3, "big"))
    assert caught.value.alert is AlertDescription.ILLEGAL_PARAMETER


def test_a_type_that_may_not_come_is_refused_by_its_first_byte(
    reassembler: HandshakeReassembler,
) -> None:
    with pytest.raises(RemoteProtocolError, match="not now"):
        reassembler.feed(b"\x0d")


def test_a_type_that_may_not_come_is_refused_behind_another_message(
    reassembler: HandshakeReassembler,
) -> None:
    with pytest.raises(RemoteProtocolError, match="not now"):
        reassembler.feed(FINISHED.encode() + b"\x0d")


def test_split_at_every_point(reassembler: HandshakeReassembler) -> None:
    whole = FINISHED.encode()
    for cut in range(1, len(whole)):
        first, second = pieces(whole, cut)
        assert reassembler.feed(first) == []
        assert reassembler.pending
        assert reassembler.feed(second) == [FINISHED]
        assert not reassembler.pending


def test_bytewise(reassembler: HandshakeReassembler) -> None:
    whole = FINISHED.encode()
    results = [reassembler.feed(bytes((byte,))) for byte in whole]
    assert results == [[]] * (len(whole) - 1) + [[FINISHED]]


def test_joined_and_with_trailing_bytes(reassembler: HandshakeReassembler) -> None:
    joined = FINISHED.encode() + HELLO.encode() + FINISHED.encode()
    assert reassembler.feed(joined + b"\x14\x00") == [FINISHED, HELLO, FINISHED]
    assert reassembler.pending
    assert reassembler.feed(FINISHED.encode()[2:]) == [FINISHED]
    assert not reassembler.pending


def test_nothing_fed_is_nothing_pending(reassembler: HandshakeReassembler) -> None:
    assert reassembler.feed(b"") == []
    assert not reassembler.pending


def test_repr_of_a_message_does_not_show_its_body() -> None:
    assert "verify" not in repr(FINISHED)
