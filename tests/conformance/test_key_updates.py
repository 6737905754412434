"""KeyUpdate of TLS 1.3: from each side, crossing, in floods, split, joined, wrong."""

from __future__ import annotations

import socket
from typing import Any, Final

import pytest

from ktls import KeyLimitError, TruncatedError
from ktls.protocol.enums import AlertDescription, ContentType, HandshakeType
from ktls.protocol.limits import FloodBudget
from ktls.protocol.suites import MAX_FRAGMENT

from ..peers.scripted import TICKET, UPDATE, UPDATE_REQUESTED, handshake_message
from .matrix import Mark, Row, behaviour, behaviours
from .scene import NO_TX_REKEY, Scene

_GROUP: Final = "KeyUpdate, from the peer"
_FOLLOW: Final = "follows; data goes both ways"
_DATA: Final = ContentType.APPLICATION_DATA


def _follows(scene: Scene, rx: int, tx: int = 0) -> None:
    """We have followed the peer to generation ``rx``, and are at ``tx`` ourselves; where the kernel can't follow, we say so."""
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    scene.both_ways()
    assert scene.generations() == (tx, rx)


def _no_answer_possible(scene: Scene) -> None:
    """The peer asked for our key, which this kernel can't change."""
    scene.differs(NO_TX_REKEY)
    for _ in range(2):
        with pytest.raises(KeyLimitError):
            scene.tls.send(b"no")
    scene.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    scene.peer.send_update()
    scene.peer.send_data(b"more")
    scene.reads(b"more")


def _answers(scene: Scene, rx: int) -> None:
    """The peer has updated ``rx`` times, and asked for our key once: it gets it."""
    scene.peer.send_data(b"x")
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    scene.reads(b"x")
    if not scene.can_change_tx:
        _no_answer_possible(scene)
        return
    scene.peer.expect_update()
    _follows(scene, rx, tx=1)


def _followed_and_refused(scene: Scene, alert: AlertDescription, *, silent: bool = False) -> None:
    """We have followed an update, and then refuse what comes; where the kernel can't follow, we say so."""
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    scene.refused(alert, silent=silent)


def _from_peer(name: str, expected: str, **options: Any) -> Mark:
    return behaviour(_GROUP, name, expected, versions=("1.3",), **options)


# --- honest updates of the peer ----------------------------------------------------------------------------------


@_from_peer("updates its key, three times", _FOLLOW)
def test_peer_updates(scene: Scene) -> None:
    for number in range(1, 4):
        scene.peer.send_update()
        _follows(scene, number)
        if not scene.can_change_rx:
            return


@_from_peer("updates its key and asks for ours", "answers with its own update; data goes both ways")
def test_peer_asks(scene: Scene) -> None:
    scene.peer.send_update(UPDATE_REQUESTED)
    _answers(scene, 1)


@_from_peer("asks for our key 20 times at once", "one answer at least, 20 at most")
def test_peer_asks_often(scene: Scene) -> None:
    peer = scene.peer
    updates = [peer.sealed_update(UPDATE_REQUESTED) for _ in range(20)]
    peer.send_raw(b"".join(updates) + peer.seal(_DATA, b"end"))
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    scene.reads(b"end")
    if not scene.can_change_tx:
        _no_answer_possible(scene)
        return
    answers, _ = scene.generations()
    assert 1 <= answers <= 20
    for _ in range(answers):
        peer.expect_update()
    _follows(scene, 20, tx=answers)


@_from_peer("asks for our key after we have closed our side", "owes nothing; reading goes on")
def test_peer_asks_after_our_close(scene: Scene) -> None:
    scene.tls.shutdown(socket.SHUT_WR)
    scene.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
    scene.peer.send_update(UPDATE_REQUESTED)
    scene.peer.send_data(b"x")
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    scene.reads(b"x")
    scene.peer.expect_fin()


@_from_peer("updates its key, in a record padded to the limit", _FOLLOW)
def test_padded_update(scene: Scene) -> None:
    for padding in (1, MAX_FRAGMENT - len(UPDATE)):
        scene.peer.send_raw(scene.peer.seal(ContentType.HANDSHAKE, UPDATE, padding))
        scene.peer.change_tx_key()
        if not scene.can_change_rx:
            break
    _follows(scene, 2)


@_from_peer("data, an update and data under the new key, in one TCP segment", "all data, in order")
def test_update_amid_data(scene: Scene) -> None:
    peer = scene.peer
    before = peer.seal(_DATA, b"before, ")
    peer.send_raw(before + peer.sealed_update() + peer.seal(_DATA, b"after"))
    scene.reads(b"before, ")
    if scene.can_change_rx:
        scene.reads(b"after")
    _follows(scene, 1)


@_from_peer("data that reads like an update", "is data")
def test_update_as_data(scene: Scene) -> None:
    scene.peer.send_data(UPDATE)
    scene.reads(UPDATE)
    scene.both_ways(UPDATE_REQUESTED)
    assert scene.generations() == (0, 0)


# --- how many ------------------------------------------------------------------------------------------------------


@_from_peer("1000 updates in a row", _FOLLOW)
def test_thousand_updates(scene: Scene) -> None:
    scene.peer.send_raw(b"".join(scene.peer.sealed_update() for _ in range(1000)))
    _follows(scene, 1000)


@_from_peer("2500 updates with 4096 bytes of data behind each", _FOLLOW, suites=("AES-128-GCM",))
def test_updates_with_data(scene: Scene) -> None:
    """More than the budget for what brings no data, but it does."""
    peer = scene.peer
    for _ in range(25 if scene.can_change_rx else 1):
        pieces = [peer.sealed_update() + peer.seal(_DATA, bytes(4096)) for _ in range(100)]
        peer.send_raw(b"".join(pieces))
        if scene.can_change_rx:
            scene.reads(bytes(100 * 4096))
    _follows(scene, 2500)


@_from_peer("a flood of updates", "unexpected_message", suites=("AES-128-GCM",))
def test_flood_of_updates(scene: Scene) -> None:
    # Time gives some of the budget back while we work on them: send more than the slowest kernel earns.
    count = int(FloodBudget.CAPACITY) + 600
    scene.peer.send_raw(b"".join(scene.peer.sealed_update() for _ in range(count)))
    _followed_and_refused(scene, AlertDescription.UNEXPECTED_MESSAGE, silent=True)


# --- split and joined ----------------------------------------------------------------------------------------------


@_from_peer("an update split over two records, at each place", _FOLLOW)
def test_split_update(scene: Scene) -> None:
    cuts = range(1, len(UPDATE))
    for cut in cuts if scene.can_change_rx else cuts[-1:]:
        scene.peer.send_handshake(UPDATE[:cut], UPDATE[cut:])
        scene.peer.change_tx_key()
        _follows(scene, cut)


@_from_peer("a request for our key, byte by byte", "answers with its own update")
def test_update_byte_by_byte(scene: Scene) -> None:
    message = UPDATE_REQUESTED
    scene.peer.send_handshake(*(message[at : at + 1] for at in range(len(message))))
    scene.peer.change_tx_key()
    _answers(scene, 1)


@_from_peer("a ticket and an update in one record", _FOLLOW, roles=("client",))
def test_ticket_and_update(scene: Scene) -> None:
    scene.peer.send_handshake(TICKET + UPDATE)
    scene.peer.change_tx_key()
    _follows(scene, 1)
    assert scene.tls.session is not None
    assert scene.tls.session.has_ticket


@_from_peer("a ticket and half an update in a record, the other half in the next", _FOLLOW, roles=("client",))  # fmt: skip
def test_ticket_and_half_an_update(scene: Scene) -> None:
    scene.peer.send_handshake(TICKET + UPDATE[:2], UPDATE[2:])
    scene.peer.change_tx_key()
    _follows(scene, 1)


# --- endings -------------------------------------------------------------------------------------------------------


@_from_peer("an update, then close_notify under the new key", "the end, in order")
def test_update_then_close(scene: Scene) -> None:
    scene.peer.send_update()
    scene.peer.close_notify()
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    assert scene.tls.recv(10) == b""
    scene.tls.sendall(b"our side goes on")
    scene.peer.expect_data(b"our side goes on")
    scene.closes()


@_from_peer("an update, then FIN", "`TruncatedError`")
def test_update_then_fin(scene: Scene) -> None:
    scene.peer.send_update()
    scene.peer.sock.shutdown(socket.SHUT_WR)
    if not scene.can_change_rx:
        scene.cannot_follow()
        return
    with pytest.raises(TruncatedError):
        scene.tls.recv(10)


@_from_peer("half an update, then FIN", "`TruncatedError`")
def test_half_an_update_then_fin(scene: Scene) -> None:
    scene.peer.send_handshake(UPDATE[:2])
    scene.peer.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(TruncatedError):
        scene.tls.recv(10)


# --- against the rules ---------------------------------------------------------------------------------------------

_UNEXPECTED = AlertDescription.UNEXPECTED_MESSAGE
_DECODE = AlertDescription.DECODE_ERROR
_ILLEGAL = AlertDescription.ILLEGAL_PARAMETER


def _update(body: bytes) -> bytes:
    return handshake_message(HandshakeType.KEY_UPDATE, body)


#: What the handshake records hold, the alert for it.
_WRONG: Final = (
    ("two updates in one record", (UPDATE + UPDATE,), _UNEXPECTED),
    ("an update and the beginning of another in one record", (UPDATE + UPDATE[:2],), _UNEXPECTED),
    ("an update and one more byte in its record", (UPDATE + b"\0",), _UNEXPECTED),
    ("an update whose second record has more behind it", (UPDATE[:3], UPDATE[3:] + b"\x18"), _UNEXPECTED),
    ("an update with request value 2", (_update(b"\x02"),), _ILLEGAL),
    ("an update with request value 255", (_update(b"\xff"),), _ILLEGAL),
    ("an update without a body", (_update(b""),), _DECODE),
    ("an update of two bytes", (_update(b"\0\0"),), _DECODE),
    ("an update that announces 16 megabytes", (b"\x18\xff\xff\xff",), _ILLEGAL),
)  # fmt: skip


@behaviours(
    *(
        Row(_GROUP, name, f"`{alert.name.lower()}`", versions=("1.3",), case=(fragments, alert))
        for name, fragments, alert in _WRONG
    )
)
def test_wrong_update(scene: Scene) -> None:
    fragments, alert = scene.cell.row.case
    scene.peer.send_handshake(*fragments)
    scene.refused(alert)


@_from_peer("an update and a ticket in one record", "`unexpected_message`", roles=("client",))
def test_update_then_ticket(scene: Scene) -> None:
    scene.peer.send_handshake(UPDATE + TICKET)
    scene.refused(_UNEXPECTED)


@_from_peer("an update where the rest of a ticket is due", "`decode_error`", roles=("client",))
def test_update_inside_ticket(scene: Scene) -> None:
    """It is taken for the rest of the ticket, whose lengths then make no sense."""
    cut = len(TICKET) - len(UPDATE)
    scene.peer.send_handshake(TICKET[:cut], UPDATE)
    scene.refused(_DECODE)


@_from_peer("data amid an update", "`unexpected_message`")
def test_data_inside_update(scene: Scene) -> None:
    scene.peer.send_handshake(UPDATE[:3])
    scene.peer.send_data(b"in between")
    scene.refused(_UNEXPECTED)


@_from_peer("an empty record of data amid an update", "`unexpected_message`")
def test_empty_data_inside_update(scene: Scene) -> None:
    peer = scene.peer
    peer.send_handshake(UPDATE[:3])
    peer.send_data(b"")
    peer.send_handshake(UPDATE[3:])
    scene.refused(_UNEXPECTED)


@_from_peer("close_notify amid an update", "`unexpected_message`")
def test_close_inside_update(scene: Scene) -> None:
    scene.peer.send_handshake(UPDATE[:1])
    scene.peer.close_notify()
    scene.refused(_UNEXPECTED)


@_from_peer("the second half of an update under the new key", "`bad_record_mac`")
def test_half_under_new_key(scene: Scene) -> None:
    scene.may_fail_to_decrypt()
    scene.peer.send_handshake(UPDATE[:2])
    scene.peer.change_tx_key()
    scene.peer.send_handshake(UPDATE[2:])
    scene.refused(AlertDescription.BAD_RECORD_MAC)


@_from_peer("data under the old key after an update", "`bad_record_mac`")
def test_old_key(scene: Scene) -> None:
    scene.may_fail_to_decrypt()
    scene.peer.send_handshake(UPDATE)
    scene.peer.send_data(b"under the old key")
    _followed_and_refused(scene, AlertDescription.BAD_RECORD_MAC)


@_from_peer("data under a key one generation too far", "`bad_record_mac`")
def test_generation_left_out(scene: Scene) -> None:
    scene.may_fail_to_decrypt()
    scene.peer.send_update()
    scene.peer.change_tx_key()
    scene.peer.send_data(b"too far")
    _followed_and_refused(scene, AlertDescription.BAD_RECORD_MAC)


@_from_peer("a new key without an update", "`bad_record_mac`")
def test_new_key_without_update(scene: Scene) -> None:
    scene.may_fail_to_decrypt()
    scene.peer.change_tx_key()
    scene.peer.send_data(b"too early")
    scene.refused(AlertDescription.BAD_RECORD_MAC)


@behaviours(
    Row(_GROUP, "an update in TLS 1.2", "`unexpected_message`", versions=("1.2",), case=(UPDATE,)),
    Row(
        _GROUP,
        "an update in TLS 1.2, byte by byte",
        "`unexpected_message`",
        versions=("1.2",),
        case=tuple(UPDATE[at : at + 1] for at in range(len(UPDATE))),
    ),
)
def test_update_in_tls12(scene: Scene) -> None:
    scene.peer.send_handshake(*scene.cell.row.case)
    scene.refused(_UNEXPECTED)
