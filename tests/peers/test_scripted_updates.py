"""KeyUpdates and tickets of a peer that may do anything (TLS 1.3), both roles."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktls import KeyLimitError, LocalProtocolError, RemoteProtocolError
from ktls.protocol.enums import AlertDescription, ContentType
from ktls.protocol.limits import FloodBudget

from .parties import TLS13, can_rekey, read_exactly
from .peers import Peers, Role
from .scripted import CIPHERS, TICKET, UPDATE, UPDATE_REQUESTED, Meeting, meet

ROLES = pytest.mark.parametrize("role", ["client", "server"])
SUITES = pytest.mark.parametrize("cipher", [name for name in CIPHERS if name != "AES-128-CCM"])


def check_both_ways(meeting: Meeting, text: bytes = b"still here") -> None:
    """Data goes through in both directions, under the keys that both ends have now."""
    meeting.peer.send_data(text)
    assert read_exactly(meeting.tls, len(text)) == text
    meeting.tls.sendall(text)
    meeting.peer.expect_data(text)


@ROLES
@SUITES
def test_data_in_both_directions(peers: Peers, role: Role, cipher: str) -> None:
    meeting = meet(peers, role, TLS13, cipher)
    check_both_ways(meeting)
    meeting.tls.close()
    meeting.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    meeting.peer.expect_fin()


@ROLES
@SUITES
def test_peer_updates(peers: Peers, role: Role, cipher: str) -> None:
    meeting = meet(peers, role, TLS13, cipher)
    for _ in range(3):
        meeting.peer.send_update()
        check_both_ways(meeting)
    assert meeting.tls.key_usage.rx.generation == 3
    assert meeting.tls.key_usage.tx.generation == 0


@ROLES
@SUITES
def test_peer_asks_for_an_update(peers: Peers, role: Role, cipher: str) -> None:
    meeting = meet(peers, role, TLS13, cipher)
    meeting.peer.send_update(UPDATE_REQUESTED)
    meeting.peer.send_data(b"x")
    assert meeting.tls.recv(1) == b"x"
    if can_rekey():
        meeting.peer.expect_update()
        check_both_ways(meeting)
        assert meeting.tls.key_usage.tx.generation == 1
        return
    # The answer must come before our next data, and can't be given: no more data, but a clean end of ours, and the peer's data is read on.
    for _ in range(2):
        with pytest.raises(KeyLimitError):
            meeting.tls.send(b"no")
    meeting.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    meeting.peer.send_update()
    meeting.peer.send_data(b"more")
    assert meeting.tls.recv(10) == b"more"


@ROLES
def test_many_requests_get_one_answer_while_it_is_owed(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_raw(
        b"".join(meeting.peer.sealed_update(UPDATE_REQUESTED) for _ in range(20))
        + meeting.peer.seal(ContentType.APPLICATION_DATA, b"end")
    )
    assert meeting.tls.recv(3) == b"end"
    answers = meeting.tls.key_usage.tx.generation
    if not can_rekey():
        assert answers == 0
        return
    assert 1 <= answers <= 20
    for _ in range(answers):
        meeting.peer.expect_update()
    check_both_ways(meeting)


@ROLES
def test_our_update_with_and_without_request(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    if not can_rekey():
        with pytest.raises(LocalProtocolError):
            meeting.tls.refresh_traffic_keys()
        check_both_ways(meeting)
        return
    meeting.tls.refresh_traffic_keys()
    meeting.peer.expect_update(UPDATE)
    check_both_ways(meeting)
    meeting.tls.refresh_traffic_keys(request_peer=True)
    meeting.peer.expect_update(UPDATE_REQUESTED)
    # One request may be outstanding (RFC 9846 §4.7.3): the next is our own update only.
    meeting.tls.refresh_traffic_keys(request_peer=True)
    meeting.peer.expect_update(UPDATE)
    meeting.peer.send_update()
    check_both_ways(meeting)
    meeting.tls.refresh_traffic_keys(request_peer=True)
    meeting.peer.expect_update(UPDATE_REQUESTED)


@ROLES
def test_requests_cross(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_update(UPDATE_REQUESTED)
    if not can_rekey():
        with pytest.raises(LocalProtocolError):
            meeting.tls.refresh_traffic_keys(request_peer=True)
        return
    meeting.tls.refresh_traffic_keys(request_peer=True)
    meeting.peer.send_data(b"x")
    assert meeting.tls.recv(1) == b"x"
    meeting.peer.expect_update(UPDATE_REQUESTED)
    meeting.peer.expect_update(UPDATE)
    meeting.peer.send_update()
    check_both_ways(meeting)
    usage = meeting.tls.key_usage
    assert (usage.tx.generation, usage.rx.generation) == (2, 2)


@ROLES
def test_a_thousand_updates_in_a_row(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_raw(b"".join(meeting.peer.sealed_update() for _ in range(1000)))
    check_both_ways(meeting)
    assert meeting.tls.key_usage.rx.generation == 1000


@ROLES
def test_a_flood_of_updates_is_refused(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    # Time gives some of the budget back while we work on them: send more than the slowest kernel earns.
    count = int(FloodBudget.CAPACITY) + 600
    meeting.peer.send_raw(b"".join(meeting.peer.sealed_update() for _ in range(count)))
    with pytest.raises(RemoteProtocolError) as caught:
        meeting.tls.recv(1)
    assert caught.value.alert == AlertDescription.UNEXPECTED_MESSAGE
    meeting.peer.expect_alert(AlertDescription.UNEXPECTED_MESSAGE)


@ROLES
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
@pytest.mark.parametrize("request_update", [False, True], ids=["update", "requested"])
def test_update_split_over_two_records(
    peers: Peers, role: Role, cut: int, request_update: bool
) -> None:
    meeting = meet(peers, role, TLS13)
    message = UPDATE_REQUESTED if request_update else UPDATE
    meeting.peer.send_data(b"before")
    meeting.peer.send_handshake(message[:cut], message[cut:])
    meeting.peer.change_tx_key()
    meeting.peer.send_data(b" and after")
    assert read_exactly(meeting.tls, 16) == b"before and after"
    assert meeting.tls.key_usage.rx.generation == 1
    if request_update and can_rekey():
        meeting.peer.expect_update()
        check_both_ways(meeting)


@ROLES
def test_update_byte_by_byte(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    for _ in range(3):
        meeting.peer.send_handshake(*(UPDATE[at : at + 1] for at in range(len(UPDATE))))
        meeting.peer.change_tx_key()
    check_both_ways(meeting)
    assert meeting.tls.key_usage.rx.generation == 3


@ROLES
def test_update_in_a_padded_record(peers: Peers, role: Role) -> None:
    meeting = meet(peers, role, TLS13)
    meeting.peer.send_raw(meeting.peer.seal(ContentType.HANDSHAKE, UPDATE, padding=1000))
    meeting.peer.change_tx_key()
    check_both_ways(meeting)
    assert meeting.tls.key_usage.rx.generation == 1


def test_ticket_and_update_in_one_record(peers: Peers) -> None:
    meeting = meet(peers, "client", TLS13)
    for _ in range(2):
        meeting.peer.send_handshake(TICKET + UPDATE)
        meeting.peer.change_tx_key()
        check_both_ways(meeting)
    assert meeting.tls.key_usage.rx.generation == 2
    assert meeting.tls.session is not None
    assert meeting.tls.session.has_ticket


def test_ticket_split_over_records(peers: Peers) -> None:
    """One of the continuations begins with the byte of a KeyUpdate, which stops a kernel that can rekey."""
    meeting = meet(peers, "client", TLS13)
    ticket = TICKET.replace(b"test", b"\x18\x18\x18\x18")
    assert len(ticket) == len(TICKET)
    at = ticket.index(b"\x18\x18")
    meeting.peer.send_handshake(ticket[:at], ticket[at : at + 2], ticket[at + 2 :])
    check_both_ways(meeting)
    assert meeting.tls.key_usage.rx.generation == 0
    assert meeting.tls.session is not None
    assert meeting.tls.session.has_ticket


def test_tickets_between_data(peers: Peers) -> None:
    meeting = meet(peers, "client", TLS13)
    for number in range(20):
        meeting.peer.send_handshake(TICKET, TICKET)
        meeting.peer.send_data(b"%02d" % number)
    assert read_exactly(meeting.tls, 40) == b"".join(b"%02d" % number for number in range(20))


@ROLES
def test_key_log_has_every_generation(peers: Peers, role: Role, tmp_path: Path) -> None:
    """What is logged after updates is what the peer, on its own, derives."""
    log = tmp_path / "keys"
    meeting = meet(peers, role, TLS13, keylog=str(log))
    ours, theirs = ("CLIENT", "SERVER") if role == "client" else ("SERVER", "CLIENT")
    expected = []
    for generation in range(1, 4):
        meeting.peer.send_update()
        check_both_ways(meeting)
        expected.append((f"{theirs}_TRAFFIC_SECRET_{generation}", meeting.peer.tx_secret.secret))
        if can_rekey():
            meeting.tls.refresh_traffic_keys()
            meeting.peer.expect_update()
            check_both_ways(meeting)
            expected.append((f"{ours}_TRAFFIC_SECRET_{generation}", meeting.peer.rx_secret.secret))
    logged = [line.split() for line in log.read_text().splitlines() if line[0] != "#"]
    later = [(label, secret) for label, _, secret in logged if label[-2:] in ("_1", "_2", "_3")]
    assert later == [(label, secret.hex()) for label, secret in expected]
    assert len({client_random for _, client_random, _ in logged}) == 1
