"""Alerts, renegotiation of TLS 1.2, and all the ways in which a connection may end, both roles."""

from __future__ import annotations

import socket
import ssl
import struct

import pytest

from ktls import AlertReceived, LocalProtocolError, TruncatedError
from ktls.protocol.enums import AlertDescription, AlertLevel, ContentType, HandshakeType

from .parties import TLS12, TLS13, read_exactly
from .peers import Peers, Role
from .scripted import UPDATE, Meeting, handshake_message, meet
from .test_scripted_updates import check_both_ways

ROLES = pytest.mark.parametrize("role", ["client", "server"])
VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
#: These two do not end a connection.
_HARMLESS = (AlertDescription.CLOSE_NOTIFY, AlertDescription.USER_CANCELED)
FATAL = pytest.mark.parametrize(
    "description",
    [one for one in AlertDescription if one not in _HARMLESS],
    ids=lambda one: one.name.lower(),
)


def check_alert_ended_it(meeting: Meeting, description: int) -> None:
    """We say which alert it was, in both directions, for ever, and answer nothing."""
    for _ in range(2):
        with pytest.raises(AlertReceived) as caught:
            meeting.tls.recv(10)
        assert caught.value.description == description
        assert not caught.value.recoverable
        with pytest.raises(AlertReceived):
            meeting.tls.send(b"no")
    with pytest.raises(LocalProtocolError):
        meeting.tls.refresh_traffic_keys()
    meeting.tls.close()
    meeting.peer.expect_fin()


# --- alerts ----------------------------------------------------------------------------------------------------


@FATAL
@VERSIONS
def test_fatal_alert_to_a_client(
    peers: Peers, version: ssl.TLSVersion, description: AlertDescription
) -> None:
    meeting = meet(peers, "client", version)
    meeting.peer.send_alert(description)
    check_alert_ended_it(meeting, description)


@FATAL
@VERSIONS
def test_fatal_alert_to_a_server(
    peers: Peers, version: ssl.TLSVersion, description: AlertDescription
) -> None:
    meeting = meet(peers, "server", version)
    meeting.peer.send_alert(description)
    check_alert_ended_it(meeting, description)


@ROLES
@VERSIONS
def test_alert_without_a_name(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    meeting = meet(peers, role, version)
    meeting.peer.send_alert(200)
    check_alert_ended_it(meeting, 200)


@ROLES
def test_level_means_nothing_in_tls_13(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_alert(AlertDescription.NO_RENEGOTIATION, AlertLevel.WARNING)
    check_alert_ended_it(meeting, AlertDescription.NO_RENEGOTIATION)


@ROLES
@pytest.mark.parametrize(
    "description",
    [
        AlertDescription.USER_CANCELED,
        AlertDescription.NO_RENEGOTIATION,
        AlertDescription.UNRECOGNIZED_NAME,
        AlertDescription.BAD_CERTIFICATE,
    ],
    ids=lambda one: one.name.lower(),
)
def test_warnings_of_tls_12_change_nothing(
    peers: Peers, role: Role, description: AlertDescription
) -> None:
    meeting = meet(peers, role, TLS12)
    for _ in range(3):
        meeting.peer.send_alert(description, AlertLevel.WARNING)
        check_both_ways(meeting)


@ROLES
@pytest.mark.parametrize("level", list(AlertLevel), ids=["warning", "fatal"])
def test_user_canceled_is_no_end_in_tls_13(peers: Peers, role: Role, level: AlertLevel) -> None:
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_alert(AlertDescription.USER_CANCELED, level)
    check_both_ways(meeting)
    meeting.peer.send_alert(AlertDescription.USER_CANCELED, level)
    meeting.peer.close_notify()
    assert meeting.tls.recv(10) == b""


# --- renegotiation (TLS 1.2) -----------------------------------------------------------------------------------


def test_hello_request_is_declined(peers: Peers) -> None:
    meeting = meet(peers, "client", TLS12)
    for _ in range(3):
        meeting.peer.send_handshake(handshake_message(HandshakeType.HELLO_REQUEST))
        meeting.peer.send_data(b"go on")
        assert read_exactly(meeting.tls, 5) == b"go on"
        meeting.peer.expect_alert(AlertDescription.NO_RENEGOTIATION)
        check_both_ways(meeting)


def test_client_hello_to_a_server_is_declined(peers: Peers) -> None:
    meeting = meet(peers, "server", TLS12)
    hello = handshake_message(HandshakeType.CLIENT_HELLO, b"\x03\x03" + bytes(200))
    for _ in range(3):
        meeting.peer.send_handshake(hello)
        meeting.peer.send_data(b"go on")
        assert read_exactly(meeting.tls, 5) == b"go on"
        meeting.peer.expect_alert(AlertDescription.NO_RENEGOTIATION)
        check_both_ways(meeting)


def test_answers_to_hello_requests_do_not_pile_up(peers: Peers) -> None:
    """RFC 5246 §7.4.1.1 allows to ignore them."""
    meeting = meet(peers, "client", TLS12)
    meeting.peer.send_handshake(*[handshake_message(HandshakeType.HELLO_REQUEST)] * 100)
    meeting.peer.send_data(b"x")
    assert meeting.tls.recv(1) == b"x"
    meeting.tls.sendall(b"end")
    answers = 0
    while (record := meeting.peer.read()) != (ContentType.APPLICATION_DATA, b"end"):
        assert record == (ContentType.ALERT, b"\x01\x64")
        answers += 1
    assert 1 <= answers <= 16


# --- close_notify ----------------------------------------------------------------------------------------------


@ROLES
@VERSIONS
def test_peer_closes(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    meeting = meet(peers, role, version)
    meeting.peer.send_data(b"last words")
    meeting.peer.close_notify()
    assert read_exactly(meeting.tls, 100) == b"last words"
    assert meeting.tls.recv(10) == b""
    if version == TLS13:  # one direction only
        meeting.tls.sendall(b"I go on")
        meeting.peer.expect_data(b"I go on")
        meeting.tls.close()
        meeting.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    else:  # the answer is immediate
        meeting.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
        with pytest.raises(LocalProtocolError):
            meeting.tls.send(b"no")
        meeting.tls.close()
    meeting.peer.expect_fin()


@ROLES
@VERSIONS
def test_data_after_close_notify_is_ignored(
    peers: Peers, version: ssl.TLSVersion, role: Role
) -> None:
    meeting = meet(peers, role, version)
    meeting.peer.send_data(b"before")
    meeting.peer.close_notify()
    meeting.peer.send_data(b"after")
    if version == TLS13:
        meeting.peer.send_update()
    meeting.peer.send_alert(AlertDescription.INTERNAL_ERROR)
    meeting.peer.sock.shutdown(socket.SHUT_WR)
    assert read_exactly(meeting.tls, 100) == b"before"
    for _ in range(3):
        assert meeting.tls.recv(10) == b""


@ROLES
@VERSIONS
def test_we_close_one_direction(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    meeting = meet(peers, role, version)
    meeting.tls.sendall(b"all of it")
    meeting.tls.shutdown(socket.SHUT_WR)
    meeting.peer.expect_data(b"all of it")
    meeting.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    meeting.peer.expect_fin()
    with pytest.raises(OSError):  # LocalProtocolError or the network's EPIPE
        meeting.tls.send(b"no")
    meeting.peer.send_data(b"still yours")
    meeting.peer.close_notify()
    assert read_exactly(meeting.tls, 100) == b"still yours"


@ROLES
@VERSIONS
def test_unwrap_waits_for_the_peer(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    meeting = meet(peers, role, version)
    meeting.peer.send_data(b"dropped")
    meeting.peer.close_notify()
    plain = peers.stack.enter_context(meeting.tls.unwrap())
    meeting.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    if plain is not meeting.tls:  # user space gives the socket back
        plain.sendall(b"plain")
        assert meeting.peer.sock.recv(10) == b"plain"


@ROLES
def test_update_and_request_after_our_close(peers: Peers, role: Role) -> None:
    """Nothing more is sent, so nothing is owed."""
    meeting = meet(peers, role, TLS13)
    meeting.tls.shutdown(socket.SHUT_WR)
    meeting.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    meeting.peer.send_update(UPDATE[:-1] + b"\x01")
    meeting.peer.send_data(b"x")
    assert meeting.tls.recv(1) == b"x"
    meeting.peer.expect_fin()


# --- truncation ------------------------------------------------------------------------------------------------

TRUNCATIONS = {
    "between-records": b"",
    "inside-a-header": b"\x17\x03",
    "after-a-header": b"\x17\x03\x03\x01\x00",
    "inside-a-record": b"\x17\x03\x03\x01\x00" + bytes(100),
}


@ROLES
@VERSIONS
@pytest.mark.parametrize("ragged", [False, True], ids=["strict", "ragged-allowed"])
@pytest.mark.parametrize("rest", TRUNCATIONS.values(), ids=TRUNCATIONS)
def test_fin_without_close_notify(
    peers: Peers, version: ssl.TLSVersion, role: Role, ragged: bool, rest: bytes
) -> None:
    meeting = meet(peers, role, version, ragged=ragged)
    meeting.peer.send_data(b"so far")
    meeting.peer.send_raw(rest)
    meeting.peer.sock.shutdown(socket.SHUT_WR)
    assert read_exactly(meeting.tls, 6) == b"so far"
    for _ in range(2):
        if ragged:
            assert meeting.tls.recv(10) == b""
        else:
            with pytest.raises(TruncatedError) as caught:
                meeting.tls.recv(10)
            assert isinstance(caught.value, ssl.SSLEOFError)
    meeting.tls.sendall(b"sending still works")
    meeting.peer.expect_data(b"sending still works")


@ROLES
def test_fin_inside_a_handshake_message(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_handshake(UPDATE[:2])
    meeting.peer.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(TruncatedError):
        meeting.tls.recv(10)


@ROLES
def test_fin_after_an_update(peers: Peers, role: Role) -> None:
    """The kernel waits for a key, and the end comes: it must be seen all the same."""
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_update()
    meeting.peer.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(TruncatedError):
        meeting.tls.recv(10)


@ROLES
@VERSIONS
def test_reset(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    meeting = meet(peers, role, version)
    meeting.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    meeting.peer.sock.close()
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            meeting.tls.recv(10)
    for _ in range(3):  # for ever: a kernel would report it once and then pretend to send
        with pytest.raises(ConnectionError):
            meeting.tls.send(b"no")
