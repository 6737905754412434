"""Handshake messages that may not come after the handshake, what may not be inside of one, and renegotiation."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import pytest

from ktls.protocol.enums import AlertDescription, AlertLevel, ContentType, HandshakeType
from ktls.protocol.limits import FloodBudget
from ktls.testing.peers import turns

from ..peers.peers import Role
from ..peers.scripted import UPDATE, handshake_message
from .craft import DATA
from .matrix import KERNEL, Version, behaviours
from .outcomes import (
    UNEXPECTED,
    Alerted,
    Closed,
    Event,
    GoesOn,
    Outcome,
    Refused,
    play,
    rows,
    short_timeout,
)
from .scene import Scene

_REGISTRY: Final = Path(__file__).parent.parent / "data" / "tls_handshake_types.csv"
_ALERT: Final = ContentType.ALERT
_HANDSHAKE: Final = ContentType.HANDSHAKE
_HELLO_REQUEST: Final = handshake_message(HandshakeType.HELLO_REQUEST)
#: An honest ClientHello. None of its bytes is that of KeyUpdate: see ``Paused``.
_CLIENT_HELLO: Final = handshake_message(
    HandshakeType.CLIENT_HELLO,
    b"\x03\x03" + bytes(32) + b"\0" + b"\x00\x02\xc0\x2b" + b"\x01\x00",
)
_13: Final[tuple[Version, ...]] = ("1.3",)
_12: Final[tuple[Version, ...]] = ("1.2",)


def _send(*fragments: bytes) -> Callable[[Scene], None]:
    return lambda scene: scene.peer.send_handshake(*fragments)


# --- messages ------------------------------------------------------------------------------------------------------

#: What has tables of its own: tickets, updates.
_ELSEWHERE: Final = (HandshakeType.NEW_SESSION_TICKET, HandshakeType.KEY_UPDATE)
#: Asks for renegotiation: see below.
_DECLINED: Final[dict[Role, int]] = {
    "client": HandshakeType.HELLO_REQUEST,
    "server": HandshakeType.CLIENT_HELLO,
}


def _types() -> Iterator[tuple[int, str]]:
    with _REGISTRY.open() as file:
        for row in csv.DictReader(line for line in file if line[0] != "#"):
            yield int(row["value"]), row["name"].removesuffix("_RESERVED")
    yield 99, "unassigned"
    yield 255, "unassigned"


def _messages() -> Iterator[Event]:
    for value, name in _types():
        if value in _ELSEWHERE:
            continue
        do = _send(handshake_message(value, bytes(50)))
        yield Event(f"{value} {name}", do, UNEXPECTED, versions=_13, many=True)
        roles = tuple(role for role, declined in _DECLINED.items() if declined != value)
        yield Event(f"{value} {name}", do, UNEXPECTED, versions=_12, roles=roles, many=True)
    yield Event("the first byte of finished, and no more", _send(b"\x14"), UNEXPECTED)
    yield Event("an empty handshake record", _send(b""), UNEXPECTED)
    yield Event(
        "CertificateRequest, post-handshake authentication not offered",
        _send(
            handshake_message(
                HandshakeType.CERTIFICATE_REQUEST, bytes.fromhex("00 0008 000d 0004 0002 0403")
            )
        ),
        UNEXPECTED,
        versions=_13,
        roles=("client",),
    )


# --- inside a message ----------------------------------------------------------------------------------------------

_SWALLOWED: Final = "The kernel drops records without data, and so does not see where they are."


def _begin(scene: Scene) -> None:
    """The first bytes of a message that might come."""
    if scene.cell.version == "1.3":
        scene.peer.send_handshake(UPDATE[:3])
    elif scene.cell.role == "client":
        scene.peer.send_handshake(_HELLO_REQUEST[:3])
    else:
        scene.peer.send_handshake(_CLIENT_HELLO[:20])


def _then(*records: tuple[int, bytes]) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        _begin(scene)
        scene.peer.send_raw(b"".join(scene.peer.seal(*record) for record in records))

    return do


def _at_once(*records: tuple[int, bytes]) -> Callable[[Scene], None]:
    """Everything in one TCP segment, behind data."""

    def do(scene: Scene) -> None:
        fragment = _HELLO_REQUEST[:3] if scene.cell.version == "1.2" else UPDATE[:3]
        if scene.cell.version == "1.2" and scene.cell.role == "server":
            fragment = _CLIENT_HELLO[:20]
        whole = ((DATA, b"before"), (_HANDSHAKE, fragment), *records)
        scene.peer.send_raw(b"".join(scene.peer.seal(*record) for record in whole))

    return do


def _around_nothing(scene: Scene) -> None:
    """A KeyUpdate in two pieces, with a data record of length zero in between, all in one segment."""
    seal = scene.peer.seal
    fragments = (_HANDSHAKE, UPDATE[:3]), (DATA, b""), (_HANDSHAKE, UPDATE[3:])
    scene.peer.send_raw(b"".join(seal(*record) for record in fragments))


def _around_nothing_alone(scene: Scene) -> None:
    """The same, but the record of length zero is dealt with before the rest comes."""
    records = scene.tls.key_usage.rx.records
    scene.peer.send_handshake(UPDATE[:3])
    scene.peer.send_data(b"")
    if not scene.rx_in_kernel:
        return  # it is refused
    with short_timeout(scene.tls):
        for _ in turns("the kernel opens the record"):
            with pytest.raises(TimeoutError):
                scene.tls.recv(1)
            if scene.tls.key_usage.rx.records == records + 2:
                break
    scene.peer.send_handshake(UPDATE[3:])
    scene.peer.change_tx_key()


def _alert(level: int, description: int) -> tuple[int, bytes]:
    return _ALERT, bytes((level, description))


_CLOSE: Final = _alert(AlertLevel.WARNING, AlertDescription.CLOSE_NOTIFY)
_INSIDE = (
    Event("data", _then((DATA, b"in between")), UNEXPECTED),
    Event(
        "data, with everything in one segment",
        _at_once((DATA, b"in between")),
        Refused(AlertDescription.UNEXPECTED_MESSAGE, b"before"),
    ),
    Event("close_notify", _then(_CLOSE), UNEXPECTED),
    Event(
        "user_canceled",
        _then(_alert(AlertLevel.WARNING, AlertDescription.USER_CANCELED)),
        UNEXPECTED,
    ),
    Event(
        "a fatal alert",
        _then(_alert(AlertLevel.FATAL, AlertDescription.INTERNAL_ERROR)),
        Alerted(AlertDescription.INTERNAL_ERROR),
    ),
    Event("change_cipher_spec", _then((ContentType.CHANGE_CIPHER_SPEC, b"\x01")), UNEXPECTED),
    Event("a heartbeat", _then((24, b"\x01\x00\x01?")), UNEXPECTED),
    Event("an empty handshake record", _then((_HANDSHAKE, b"")), UNEXPECTED),
    Event("a data record of length zero", _around_nothing, UNEXPECTED, versions=_13),
    Event(
        "a data record of length zero, alone",
        _around_nothing_alone,
        UNEXPECTED,
        in_kernel=GoesOn(),
        why=_SWALLOWED,
        versions=_13,
        updates=True,
    ),
)


@behaviours(
    *rows("Unexpected handshake messages", *_messages()),
    *rows("Inside a handshake message", *_INSIDE),
)
def test_unexpected(scene: Scene) -> None:
    play(scene)


# --- renegotiation -------------------------------------------------------------------------------------------------

_MOST_ANSWERS: Final = 16
_PAUSED: Final = (
    "This kernel takes a handshake record that begins with 0x18 for a KeyUpdate in TLS 1.2, too,"
    " and then waits for a key that nobody can set: the connection ends with internal_error."
)


@final
@dataclass(frozen=True)
class Declines(Outcome):
    """Each wish gets a no_renegotiation warning, up to some number; the connection goes on."""

    answers: int = 1
    data: bytes = b""
    text: str = "no_renegotiation, a warning; goes on"

    def check(self, scene: Scene) -> None:
        scene.peer.send_data(b"go on")
        scene.reads(self.data + b"go on")
        for _ in range(self.answers):
            scene.peer.expect_alert(AlertDescription.NO_RENEGOTIATION)
        scene.both_ways()
        scene.peer.close_notify()
        assert scene.tls.recv(100) == b""
        scene.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)


def _amid_data(wish: bytes) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        for number in range(3):
            scene.peer.send_data(b"%d" % number)
            scene.peer.send_handshake(wish)

    return do


def _after_our_end(wish: bytes) -> Callable[[Scene], None]:
    """We have closed our side: there is nothing more to say."""

    def do(scene: Scene) -> None:
        scene.tls.shutdown(1)
        scene.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
        scene.peer.send_handshake(wish)

    return do


def _with_close(wish: bytes) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        scene.peer.send_handshake(wish)
        scene.peer.close_notify()

    return do


@final
@dataclass(frozen=True)
class ReadsOn(Outcome):
    """We have closed our side, and go on reading; nothing is answered."""

    data: bytes = b""
    text: str = "nothing is answered; reading goes on"

    def check(self, scene: Scene) -> None:
        scene.peer.send_data(b"go on")
        scene.reads(b"go on")
        scene.peer.close_notify()
        assert scene.tls.recv(100) == b""
        scene.tls.close()
        scene.peer.expect_fin()


@final
@dataclass(frozen=True)
class DeclinesAndCloses(Outcome):
    """The wish is declined, and the end answered."""

    data: bytes = b""
    text: str = "no_renegotiation, then a clean end"

    def check(self, scene: Scene) -> None:
        assert scene.tls.recv(100) == b""
        scene.peer.expect_alert(AlertDescription.NO_RENEGOTIATION)
        Closed().check(scene)


@final
@dataclass(frozen=True)
class Paused(Outcome):
    """``Declines``, but for a bug of the kernel that can change keys."""

    data: bytes = b""
    text: str = "no_renegotiation, a warning; goes on"

    def check(self, scene: Scene) -> None:
        if scene.rx_in_kernel and KERNEL == "rekey":
            scene.differs(_PAUSED)
            scene.refused(AlertDescription.INTERNAL_ERROR, silent=True)
            scene.peer.expect_alert(AlertDescription.NO_RENEGOTIATION)
            scene.peer.expect_alert(AlertDescription.INTERNAL_ERROR)
            scene.peer.expect_fin()
        else:
            Declines().check(scene)


@final
@dataclass(frozen=True)
class GivesUp(Outcome):
    """Some wishes are declined, then it is too much. What was not read any more makes TCP reset when we close."""

    data: bytes = b""
    text: str = f"{_MOST_ANSWERS} times no_renegotiation, then unexpected_message"

    def check(self, scene: Scene) -> None:
        scene.refused(AlertDescription.UNEXPECTED_MESSAGE, silent=True)
        for _ in range(_MOST_ANSWERS):
            scene.peer.expect_alert(AlertDescription.NO_RENEGOTIATION)
        scene.peer.expect_alert(AlertDescription.UNEXPECTED_MESSAGE)


def _wishes(role: Role, name: str, wish: bytes) -> Iterator[Event]:
    """What a peer may do with a wish for new keys."""
    pieces = [wish[at : at + 1] for at in range(len(wish))]
    halves = (wish[: len(wish) // 2], wish[len(wish) // 2 :])
    flood = int(FloodBudget.CAPACITY) + 600
    table: tuple[tuple[str, Callable[[Scene], None], Outcome], ...] = (
        (name, _send(wish), Declines()),
        (f"{name} in two records", _send(*halves), Declines()),
        (f"{name} byte by byte", _send(*pieces), Declines()),
        (f"three times {name} in one record", _send(wish * 3), Declines(3)),
        (f"three times {name}, with data in between", _amid_data(wish), Declines(3, b"012")),
        (f"100 times {name}", _send(*[wish] * 100), Declines(_MOST_ANSWERS)),
        (f"{name}, again and again", _send(*[wish] * flood), GivesUp()),
        (f"{name}, then close_notify", _with_close(wish), DeclinesAndCloses()),
        (f"{name}, after our close_notify", _after_our_end(wish), ReadsOn()),
    )
    for what, do, outcome in table:
        yield Event(what, do, outcome, versions=_12, roles=(role,))


_DECODE: Final = Refused(AlertDescription.DECODE_ERROR)
_ILLEGAL: Final = Refused(AlertDescription.ILLEGAL_PARAMETER)


@behaviours(
    *rows(
        "Renegotiation",
        *_wishes("client", "HelloRequest", _HELLO_REQUEST),
        *_wishes("server", "ClientHello", _CLIENT_HELLO),
        Event(
            "HelloRequest with a body",
            _send(handshake_message(HandshakeType.HELLO_REQUEST, b"?")),
            _DECODE,
            versions=_12,
            roles=("client",),
        ),
        Event(
            "ClientHello that announces 16 megabytes",
            _send(b"\x01\xff\xff\xff"),
            _ILLEGAL,
            versions=_12,
            roles=("server",),
        ),
        Event(
            "ClientHello in two records, the second begins with 0x18",
            _send(_CLIENT_HELLO[:6] + b"\x18" * 10, b"\x18" * 22 + _CLIENT_HELLO[38:]),
            Paused(),
            versions=_12,
            roles=("server",),
        ),
    )
)
def test_renegotiation(scene: Scene) -> None:
    play(scene)
