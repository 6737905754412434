"""Peers that break the rules, both roles: which error we raise, which alert they get, what is left of the connection."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from ktls import KTLSSocket, LocalProtocolError, RemoteProtocolError
from ktls.protocol.enums import AlertDescription, ContentType, HandshakeType
from ktls.protocol.limits import FloodBudget

from .parties import IS_LAB, TLS12, TLS13, read_exactly
from .peers import Peers, Role
from .scripted import TICKET, UPDATE, Meeting, ScriptedPeer, handshake_message, meet

_DATA = ContentType.APPLICATION_DATA
_HANDSHAKE = ContentType.HANDSHAKE
_ALERT = ContentType.ALERT


@dataclass(frozen=True)
class Wrong:
    """Something that a peer must not send, and the alert for it."""

    name: str
    send: Callable[[ScriptedPeer], None]
    alert: AlertDescription
    #: Where the kernel, which opens the records, says less about what was wrong.
    kernel_alert: AlertDescription | None = None
    roles: tuple[Role, ...] = ("client", "server")
    #: Whether the kernel's counter of records that it could not open grows.
    undecryptable: bool = False


def _message(kind: int, body: bytes = b"") -> Callable[[ScriptedPeer], None]:
    return lambda peer: peer.send_handshake(handshake_message(kind, body))


def _handshake(*fragments: bytes) -> Callable[[ScriptedPeer], None]:
    return lambda peer: peer.send_handshake(*fragments)


def _record(kind: int, fragment: bytes) -> Callable[[ScriptedPeer], None]:
    return lambda peer: peer.send(kind, fragment)


def _raw(data: bytes) -> Callable[[ScriptedPeer], None]:
    return lambda peer: peer.send_raw(data)


def _bad_mac(peer: ScriptedPeer) -> None:
    record = bytearray(peer.seal(_DATA, b"one bit is wrong"))
    record[-1] ^= 1
    peer.send_raw(bytes(record))


def _replay(peer: ScriptedPeer) -> None:
    record = peer.seal(_DATA, b"")
    peer.send_raw(record + record)


def _data_in_message(peer: ScriptedPeer) -> None:
    peer.send_handshake(UPDATE[:3])
    peer.send_data(b"in between")


def _close_in_message(peer: ScriptedPeer) -> None:
    peer.send_handshake(TICKET[:3])
    peer.close_notify()


def _old_key(peer: ScriptedPeer) -> None:
    peer.send_handshake(UPDATE)
    peer.send_data(b"under the old key")


_UNEXPECTED = AlertDescription.UNEXPECTED_MESSAGE
_DECODE = AlertDescription.DECODE_ERROR
_ILLEGAL = AlertDescription.ILLEGAL_PARAMETER
_MAC = AlertDescription.BAD_RECORD_MAC
_OVERFLOW = AlertDescription.RECORD_OVERFLOW
_VERSION = AlertDescription.PROTOCOL_VERSION

WRONG_13 = [
    # KeyUpdate (RFC 9846 §4.7.3, §5.1)
    Wrong("update-then-update-in-one-record", _handshake(UPDATE + UPDATE), _UNEXPECTED),
    Wrong("update-then-part-of-update", _handshake(UPDATE + UPDATE[:2]), _UNEXPECTED),
    Wrong(
        "update-then-ticket-in-one-record",
        _handshake(UPDATE + TICKET),
        _UNEXPECTED,
        roles=("client",),
    ),
    Wrong("update-with-request-2", _message(HandshakeType.KEY_UPDATE, b"\x02"), _ILLEGAL),
    Wrong("update-with-request-255", _message(HandshakeType.KEY_UPDATE, b"\xff"), _ILLEGAL),
    Wrong("update-without-request", _message(HandshakeType.KEY_UPDATE), _DECODE),
    Wrong("update-too-long", _message(HandshakeType.KEY_UPDATE, b"\0\0"), _DECODE),
    Wrong("data-under-the-old-key", _old_key, _MAC, undecryptable=True),
    Wrong("data-inside-an-update", _data_in_message, _UNEXPECTED),
    # other handshake messages
    Wrong(
        "certificate-request",
        _message(HandshakeType.CERTIFICATE_REQUEST, bytes.fromhex("00 0008 000d 0004 0002 0403")),
        _UNEXPECTED,
    ),
    Wrong("ticket-to-a-server", _handshake(TICKET), _UNEXPECTED, roles=("server",)),
    Wrong("client-hello", _message(HandshakeType.CLIENT_HELLO, bytes(50)), _UNEXPECTED),
    Wrong("server-hello", _message(HandshakeType.SERVER_HELLO, bytes(50)), _UNEXPECTED),
    Wrong("hello-request", _message(HandshakeType.HELLO_REQUEST), _UNEXPECTED),
    Wrong("certificate", _message(HandshakeType.CERTIFICATE, bytes(4)), _UNEXPECTED),
    Wrong("finished", _message(HandshakeType.FINISHED, bytes(32)), _UNEXPECTED),
    Wrong("end-of-early-data", _message(HandshakeType.END_OF_EARLY_DATA), _UNEXPECTED),
    Wrong("handshake-type-99", _message(99, b"?"), _UNEXPECTED),
    Wrong("handshake-message-of-16-megabytes", _handshake(b"\x18\xff\xff\xff"), _ILLEGAL),
    Wrong(
        "ticket-cut-short",
        _message(HandshakeType.NEW_SESSION_TICKET, bytes(5)),
        _DECODE,
        roles=("client",),
    ),
    Wrong("close-notify-inside-a-message", _close_in_message, _UNEXPECTED, roles=("client",)),
    # records (RFC 9846 §5)
    Wrong("empty-handshake-record", _record(_HANDSHAKE, b""), _UNEXPECTED),
    Wrong("empty-alert-record", _record(_ALERT, b""), _UNEXPECTED),
    Wrong("half-an-alert", _record(_ALERT, b"\x01"), _DECODE),
    Wrong("two-alerts-in-one-record", _record(_ALERT, b"\x01\x00\x01\x00"), _DECODE),
    Wrong(
        "change-cipher-spec-protected",
        _record(ContentType.CHANGE_CIPHER_SPEC, b"\x01"),
        _UNEXPECTED,
    ),
    Wrong("heartbeat", _record(24, b"\x01\x00\x01?"), _UNEXPECTED),
    Wrong("content-type-99", _record(99, b"?"), _UNEXPECTED),
    Wrong("nothing-but-zeros", _record(0, bytes(20)), _UNEXPECTED, kernel_alert=_MAC),
    Wrong("bad-mac", _bad_mac, _MAC, undecryptable=True),
    Wrong("replay", _replay, _MAC, undecryptable=True),
    Wrong("data-too-long", _record(_DATA, bytes(2**14 + 1)), _OVERFLOW),
    Wrong("header-with-a-length-too-long", _raw(b"\x17\x03\x03\x50\x00"), _OVERFLOW),
    Wrong("record-shorter-than-its-tag", _raw(b"\x17\x03\x03\x00\x05short"), _MAC),
    # plain text
    Wrong("plain-http", _raw(b"GET / HTTP/1.1\r\n\r\n"), _UNEXPECTED, kernel_alert=_VERSION),
    Wrong(
        "plain-change-cipher-spec",
        _raw(b"\x14\x03\x03\x00\x01\x01"),
        _UNEXPECTED,
        kernel_alert=_MAC,
    ),
    Wrong("plain-alert", _raw(b"\x15\x03\x03\x00\x02\x02\x28"), _UNEXPECTED, kernel_alert=_MAC),
    Wrong(
        "plain-handshake", _raw(b"\x16\x03\x03\x00\x05" + UPDATE), _UNEXPECTED, kernel_alert=_MAC
    ),
]

WRONG_12 = [
    Wrong("key-update", _handshake(UPDATE), _UNEXPECTED),
    Wrong("ticket", _handshake(TICKET), _UNEXPECTED),
    Wrong("hello-request-to-a-server", _message(0), _UNEXPECTED, roles=("server",)),
    Wrong("hello-request-with-a-body", _message(0, b"?"), _DECODE, roles=("client",)),
    Wrong("client-hello-to-a-client", _message(1, bytes(50)), _UNEXPECTED, roles=("client",)),
    Wrong("server-hello", _message(HandshakeType.SERVER_HELLO, bytes(50)), _UNEXPECTED),
    Wrong("finished", _message(HandshakeType.FINISHED, bytes(12)), _UNEXPECTED),
    Wrong("change-cipher-spec", _record(ContentType.CHANGE_CIPHER_SPEC, b"\x01"), _UNEXPECTED),
    Wrong("empty-handshake-record", _record(_HANDSHAKE, b""), _UNEXPECTED),
    Wrong("half-an-alert", _record(_ALERT, b"\x01"), _DECODE),
    Wrong("content-type-99", _record(99, b"?"), _UNEXPECTED),
    Wrong("bad-mac", _bad_mac, _MAC, undecryptable=True),
    Wrong("replay", _replay, _MAC, undecryptable=True),
    Wrong("data-too-long", _record(_DATA, bytes(2**14 + 1)), _OVERFLOW),
    Wrong("header-with-a-length-too-long", _raw(b"\x17\x03\x03\x50\x00" + bytes(8)), _OVERFLOW),
    Wrong("plain-http", _raw(b"GET / HTTP/1.1\r\n\r\n"), _UNEXPECTED, kernel_alert=_VERSION),
]

CASES = [
    pytest.param(version, role, wrong, id=f"{name}-{role}-{wrong.name}")
    for version, name, table in ((TLS13, "1.3", WRONG_13), (TLS12, "1.2", WRONG_12))
    for wrong in table
    for role in wrong.roles
]


def check_failed(tls: KTLSSocket, error: RemoteProtocolError) -> None:
    """The connection has failed, for good, in both directions, and says so each time."""
    assert not error.recoverable
    for _ in range(2):
        with pytest.raises(RemoteProtocolError) as again:
            tls.recv(100)
        assert (again.value.alert, str(again.value)) == (error.alert, str(error))
        with pytest.raises(RemoteProtocolError) as sending:
            tls.send(b"no")
        assert sending.value.alert == error.alert
    with pytest.raises(LocalProtocolError):
        tls.refresh_traffic_keys()


@pytest.mark.parametrize(("version", "role", "wrong"), CASES)
def test_what_is_wrong_is_refused(
    peers: Peers, version: ssl.TLSVersion, role: Role, wrong: Wrong
) -> None:
    meeting = meet(peers, role, version)
    tls, peer = meeting.tls, meeting.peer
    in_kernel = tls.offload.rx == "kernel"
    alert = wrong.kernel_alert if in_kernel and wrong.kernel_alert is not None else wrong.alert
    peers.counters.may_fail_to_decrypt = wrong.undecryptable or wrong.kernel_alert is not None
    peer.send_data(b"this was good")
    assert read_exactly(tls, 13) == b"this was good"
    wrong.send(peer)
    with pytest.raises(RemoteProtocolError) as caught:
        tls.recv(100)
    assert caught.value.alert.name == alert.name
    check_failed(tls, caught.value)
    peer.expect_alert(alert)
    if wrong.undecryptable and IS_LAB and in_kernel:
        assert peers.counters.grown("TlsDecryptError") > 0
    tls.close()
    peer.expect_fin()


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_what_is_good_before_it_is_delivered(
    peers: Peers, version: ssl.TLSVersion, role: Role
) -> None:
    meeting = meet(peers, role, version)
    peers.counters.may_fail_to_decrypt = True
    good = [b"%05d" % number for number in range(10)]
    records = [meeting.peer.seal(_DATA, text) for text in good]
    bad = bytearray(meeting.peer.seal(_DATA, b"bad"))
    bad[7] ^= 0x80
    meeting.peer.send_raw(b"".join(records) + bytes(bad))
    assert read_exactly(meeting.tls, 50) == b"".join(good)
    with pytest.raises(RemoteProtocolError):
        meeting.tls.recv(10)
    meeting.peer.expect_alert(AlertDescription.BAD_RECORD_MAC)


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_empty_records_are_no_end(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    meeting = meet(peers, role, version)
    meeting.peer.send_data(b"", b"", b"one", b"", b"two", b"", b"")
    assert read_exactly(meeting.tls, 6) == b"onetwo"
    meeting.peer.send_data(b"", b"three")
    assert read_exactly(meeting.tls, 5) == b"three"
    meeting.peer.close_notify()
    assert meeting.tls.recv(10) == b""


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_a_flood_of_empty_records(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    """Refused where we see them. The kernel swallows empty data records by itself, and its work is the peer's work."""
    meeting = meet(peers, role, version)
    count = int(FloodBudget.CAPACITY) + 600
    meeting.peer.send_data(*[b""] * count, b"end")
    if meeting.tls.offload.rx == "kernel":
        assert meeting.tls.recv(10) == b"end"
        return
    with pytest.raises(RemoteProtocolError):
        meeting.tls.recv(10)
    meeting.peer.expect_alert(AlertDescription.UNEXPECTED_MESSAGE)


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("padding", [1, 255, 16000], ids=lambda size: f"{size}-zeros")
def test_padding_is_removed(peers: Peers, role: Role, padding: int) -> None:
    meeting = meet(peers, role, TLS13)
    seal = meeting.peer.seal
    meeting.peer.send_raw(
        seal(_DATA, b"zeros at its end\0\0", padding)
        + seal(_DATA, b"", padding)
        + seal(_DATA, b"!")
    )
    assert read_exactly(meeting.tls, 19) == b"zeros at its end\0\0!"
    meeting.peer.send_raw(seal(_ALERT, b"\x01\x00", padding))
    assert meeting.tls.recv(10) == b""


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_largest_records(peers: Peers, version: ssl.TLSVersion, role: Role) -> None:
    meeting: Meeting = meet(peers, role, version)
    data = bytes(range(256)) * 64
    meeting.peer.send_data(data, data)
    assert read_exactly(meeting.tls, 2**15) == data * 2
    meeting.tls.sendall(data * 2 + b"!")
    assert [meeting.peer.read() for _ in range(3)] == [(23, data), (23, data), (23, b"!")]
