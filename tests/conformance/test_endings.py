"""All the ways in which a connection may end: close_notify with something behind or before it, FIN, RST, and silence, at every point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from ktls.protocol.enums import AlertDescription, AlertLevel, ContentType

from ..peers.scripted import UPDATE, UPDATE_REQUESTED
from .craft import DATA
from .matrix import VERSIONS, Version, behaviours
from .outcomes import Closed, Event, Outcome, Reset, Truncated, fin, play, reset, rows
from .scene import Scene

_ALERT: Final = ContentType.ALERT
_13: Final[tuple[Version, ...]] = ("1.3",)
_CLOSE: Final = bytes((AlertLevel.WARNING, AlertDescription.CLOSE_NOTIFY))
_CANCELED: Final = bytes((AlertLevel.WARNING, AlertDescription.USER_CANCELED))


def _steps(*steps: Callable[[Scene], None]) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        for step in steps:
            step(scene)

    return do


# --- FIN and RST at every point ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """Where the connection is when it ends: what the peer has sent, and what of it is data."""

    name: str
    get_to: Callable[[Scene], None]
    data: bytes = b""
    versions: tuple[Version, ...] = VERSIONS
    updates: bool = False


def _records(*records: tuple[int, bytes]) -> Callable[[Scene], None]:
    return lambda scene: scene.peer.send_raw(
        b"".join(scene.peer.seal(*record) for record in records)
    )


def _part(start: int, end: int | None) -> Callable[[Scene], None]:
    """A whole record, and of another what is between these."""

    def get_to(scene: Scene) -> None:
        whole = scene.peer.seal(DATA, b"whole")
        scene.peer.send_raw(whole + scene.peer.seal(DATA, b"never whole")[start:end])

    return get_to


def _update_then(*records: tuple[int, bytes]) -> Callable[[Scene], None]:
    def get_to(scene: Scene) -> None:
        update = scene.peer.sealed_update()
        scene.peer.send_raw(update + b"".join(scene.peer.seal(*record) for record in records))

    return get_to


def _fragment(scene: Scene) -> None:
    """The beginning of a handshake message that may come."""
    message = UPDATE if scene.cell.version == "1.3" else b"\0\0\0\0"
    if scene.cell.version == "1.2" and scene.cell.role == "server":
        message = b"\x01\0\0\x40"
    scene.peer.send_handshake(message[:3])


_POINTS: Final = (
    _Point("before any record", lambda scene: None),
    _Point("between records", _records((DATA, b"one"), (DATA, b"two")), b"onetwo"),
    *(
        _Point(f"behind byte {count} of a header", _part(0, count), b"whole")
        for count in range(1, 5)
    ),
    _Point("behind a header", _part(0, 5), b"whole"),
    _Point("inside the body of a record", _part(0, 13), b"whole"),
    _Point("inside the tag", _part(0, -8), b"whole"),
    _Point("one byte before the end of a record", _part(0, -1), b"whole"),
    _Point("behind a full record", _records((DATA, b"x" * 2**14)), b"x" * 2**14),
    _Point("behind a data record of length zero", _records((DATA, b"data"), (DATA, b"")), b"data"),
    _Point("behind user_canceled", _records((DATA, b"data"), (_ALERT, _CANCELED)), b"data"),
    _Point("inside a handshake message", _fragment),
    _Point("behind a KeyUpdate", _update_then(), versions=_13, updates=True),
    _Point(
        "behind data under a new key",
        _update_then((DATA, b"new")),
        b"new",
        versions=_13,
        updates=True,
    ),
)


def _at_every_point(
    end: Callable[[Scene], None], outcome: Callable[[bytes], Outcome]
) -> Iterator[Event]:
    for point in _POINTS:
        yield Event(
            point.name,
            _steps(point.get_to, end),
            outcome(point.data),
            versions=point.versions,
            updates=point.updates,
            many=True,
        )


@behaviours(
    *rows("FIN without close_notify", *_at_every_point(fin, Truncated)),
    *rows("RST", *_at_every_point(reset, Reset)),
)
def test_tcp_ends(scene: Scene) -> None:
    play(scene)


# --- close_notify --------------------------------------------------------------------------------------------------


def _close_then(*after: Callable[[Scene], None]) -> Callable[[Scene], None]:
    return _steps(_records((DATA, b"last"), (_ALERT, _CLOSE)), *after)


def _more_data(scene: Scene) -> None:
    scene.peer.send_data(b"too", b"late")


def _fatal_alert(scene: Scene) -> None:
    scene.peer.send_alert(AlertDescription.INTERNAL_ERROR)


def _update(scene: Scene) -> None:
    scene.may_fail_to_decrypt()  # when we close, what is left is dropped under whatever key there is
    scene.peer.send_update(UPDATE_REQUESTED)


def _garbage(scene: Scene) -> None:
    scene.peer.send_raw(bytes(100))


_CLOSES = (
    Event("close_notify", _close_then(), Closed(b"last")),
    Event("close_notify, then FIN", _close_then(fin), Closed(b"last")),
    Event("close_notify, then data", _close_then(_more_data), Closed(b"last")),
    Event("close_notify, then data and FIN", _close_then(_more_data, fin), Closed(b"last")),
    Event("close_notify, then a fatal alert", _close_then(_fatal_alert, fin), Closed(b"last")),
    Event("close_notify, then what is no TLS", _close_then(_garbage, fin), Closed(b"last")),
    Event(
        "close_notify, then a KeyUpdate and data",
        _close_then(_update, _more_data),
        Closed(b"last"),
        versions=_13,
    ),
    Event(
        "a KeyUpdate, then close_notify",
        _update_then((DATA, b"last"), (_ALERT, _CLOSE)),
        Closed(b"last"),
        versions=_13,
        updates=True,
    ),
    Event(
        "close_notify at the fatal level, then FIN",
        _steps(_records((_ALERT, bytes((AlertLevel.FATAL, AlertDescription.CLOSE_NOTIFY)))), fin),
        Closed(),
    ),
    Event(
        "user_canceled, then close_notify and FIN",
        _steps(_records((_ALERT, _CANCELED), (_ALERT, _CLOSE)), fin),
        Closed(),
    ),
)


@behaviours(*rows("close_notify", *_CLOSES))
def test_close_notify(scene: Scene) -> None:
    play(scene)
