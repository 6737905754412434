"""Every alert of the registry at both levels, levels and descriptions that nobody knows, and alerts of a wrong form."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ktls.protocol.enums import AlertDescription, AlertLevel, ContentType
from ktls.protocol.limits import FloodBudget
from ktls.protocol.suites import MAX_FRAGMENT

from .matrix import Row, Version, behaviour, behaviours
from .scene import Scene

_REGISTRY: Final = Path(__file__).parent.parent / "data" / "tls_alerts.csv"
_EVERY: Final = "Alerts, all descriptions"
_FORMS: Final = "Alerts, levels and forms"

_CLOSE: Final = AlertDescription.CLOSE_NOTIFY
_CANCELED: Final = AlertDescription.USER_CANCELED
_NO_RENEGOTIATION: Final = AlertDescription.NO_RENEGOTIATION
_UNEXPECTED: Final = AlertDescription.UNEXPECTED_MESSAGE
_DECODE: Final = AlertDescription.DECODE_ERROR
_WARNING: Final = int(AlertLevel.WARNING)
_FATAL: Final = int(AlertLevel.FATAL)

_ENDS: Final = "`AlertReceived`, for ever; nothing is answered"
_IGNORED: Final = "ignored; data goes both ways"
_THE_END: Final = "the end, in order"


def _registered() -> Iterator[tuple[int, str]]:
    with _REGISTRY.open() as file:
        for row in csv.DictReader(line for line in file if line[0] != "#"):
            yield int(row["value"]), row["name"].removesuffix("_RESERVED")


def _meaning(description: int, level: int, version: Version) -> str:
    """What an alert means to us (RFC 9846 §6, RFC 5246 §7.2)."""
    if description == _CLOSE:
        return _THE_END
    if description == _CANCELED or (version == "1.2" and level == _WARNING):
        return _IGNORED
    return _ENDS


def _rows() -> Iterator[Row]:
    for level, level_name in ((_FATAL, "fatal"), (_WARNING, "warning")):
        for version in ("1.3", "1.2"):
            for value, name in _registered():
                expected = _meaning(value, level, version)
                yield Row(
                    _EVERY,
                    f"{value} {name}, {level_name}",
                    expected,
                    versions=(version,),
                    many=True,
                    case=(level, value, expected),
                )


@behaviours(*_rows())
def test_alert(scene: Scene) -> None:
    level, description, expected = scene.cell.row.case
    scene.peer.send_alert(description, level)
    _check(scene, description, expected)


def _check(scene: Scene, description: int, expected: str) -> None:
    if expected == _ENDS:
        scene.ended_by_alert(description)
    elif expected == _IGNORED:
        scene.both_ways()
        scene.closes()
    else:
        _ended(scene)


def _ended(scene: Scene) -> None:
    """The peer has closed: nothing more comes; TLS 1.2 answers at once, in TLS 1.3 our side goes on."""
    for _ in range(2):
        assert scene.tls.recv(10) == b""
    if scene.cell.version == "1.3":
        scene.tls.sendall(b"our side goes on")
        scene.peer.expect_data(b"our side goes on")
    scene.closes()


# --- levels and descriptions that nobody knows ---------------------------------------------------------------------


def _row(name: str, level: int, description: int, expected: str) -> Row:
    return Row(_FORMS, name, expected, case=(level, description, expected))


@behaviours(
    *(_row(f"alert {number}, unknown, fatal", _FATAL, number, _ENDS) for number in (1, 200, 255)),
    *(_row(f"internal_error, level {level}", level, 80, _ENDS) for level in (0, 3, 255)),
    *(_row(f"close_notify, level {level}", level, _CLOSE, _THE_END) for level in (0, 3, 255)),
    *(_row(f"user_canceled, level {level}", level, _CANCELED, _IGNORED) for level in (0, 3, 255)),
    Row(_FORMS, "alert 200, unknown, warning", _ENDS, versions=("1.3",), case=(1, 200, _ENDS)),
    Row(_FORMS, "alert 200, unknown, warning", _IGNORED, versions=("1.2",), case=(1, 200, _IGNORED)),
)  # fmt: skip
def test_unknown(scene: Scene) -> None:
    level, description, expected = scene.cell.row.case
    scene.peer.send_alert(description, level)
    _check(scene, description, expected)


# --- forms ---------------------------------------------------------------------------------------------------------


#: The records of type alert that are sent, and the answer.
_WRONG: Final = (
    ("an empty alert record", (b"",), _UNEXPECTED),
    ("an alert of one byte", (b"\x01",), _DECODE),
    ("an alert of three bytes", (b"\x01\x00\x00",), _DECODE),
    ("an alert split over two records", (b"\x02", b"\x28"), _DECODE),
    ("close_notify split over two records", (b"\x01", b"\x00"), _DECODE),
    ("two alerts in one record", (b"\x01\x5a\x01\x00",), _DECODE),
    ("an alert record full of alerts", (b"\x01\x5a" * (MAX_FRAGMENT // 2),), _DECODE),
)


@behaviours(
    *(
        Row(_FORMS, name, f"`{alert.name.lower()}`", case=(fragments, alert))
        for name, fragments, alert in _WRONG
    )
)
def test_wrong_form(scene: Scene) -> None:
    fragments, alert = scene.cell.row.case
    scene.peer.send(ContentType.ALERT, *fragments)
    # Where the first of two is refused, the second is left unread: TCP then resets.
    scene.refused(alert, silent=len(fragments) > 1)


@behaviour(_FORMS, "an alert one byte too long for a record", "`record_overflow`")
def test_alert_too_long(scene: Scene) -> None:
    scene.peer.send(ContentType.ALERT, bytes(MAX_FRAGMENT + 1))
    scene.refused(AlertDescription.RECORD_OVERFLOW)


@behaviour(_FORMS, "close_notify in a record padded to the limit", _THE_END, versions=("1.3",))
def test_padded_alert(scene: Scene) -> None:
    scene.peer.send_raw(scene.peer.seal(ContentType.ALERT, b"\x01\x00", padding=MAX_FRAGMENT - 2))
    _ended(scene)


@behaviour(_FORMS, "user_canceled, then close_notify", _THE_END)
def test_canceled_then_close(scene: Scene) -> None:
    scene.peer.send_alert(_CANCELED, _WARNING)
    scene.peer.close_notify()
    _ended(scene)


@behaviour(_FORMS, "close_notify twice", _THE_END)
def test_close_twice(scene: Scene) -> None:
    scene.peer.close_notify()
    scene.peer.close_notify()
    assert scene.tls.recv(10) == b""
    assert scene.tls.recv(10) == b""


@behaviour(_FORMS, "close_notify, then a fatal alert", "the end, in order; the alert is ignored")
def test_alert_after_close(scene: Scene) -> None:
    scene.peer.close_notify()
    scene.peer.send_alert(AlertDescription.INTERNAL_ERROR)
    assert scene.tls.recv(10) == b""
    assert scene.tls.recv(10) == b""


@behaviour(_FORMS, "data, then a fatal alert, in one TCP segment", "the data, then `AlertReceived`")
def test_data_then_alert(scene: Scene) -> None:
    peer = scene.peer
    data = peer.seal(ContentType.APPLICATION_DATA, b"so far")
    peer.send_raw(data + peer.seal(ContentType.ALERT, bytes((_FATAL, 80))))
    scene.reads(b"so far")
    scene.ended_by_alert(80)


@behaviour(_FORMS, "a fatal alert, then data", "`AlertReceived`; the data is never read")
def test_alert_then_data(scene: Scene) -> None:
    peer = scene.peer
    alert = peer.seal(ContentType.ALERT, bytes((_FATAL, 80)))
    peer.send_raw(alert + peer.seal(ContentType.APPLICATION_DATA, b"too late"))
    for _ in range(2):
        scene.alert_received(80)


_IN_VERSION: Final = {"1.3": _CANCELED, "1.2": AlertDescription.BAD_CERTIFICATE}


@behaviour(_FORMS, "20 warnings, data behind each", "the data; warnings are ignored")
def test_warnings_amid_data(scene: Scene) -> None:
    description = _IN_VERSION[scene.cell.version]
    for number in range(20):
        scene.peer.send_alert(description, _WARNING)
        scene.peer.send_data(b"%02d" % number)
    scene.reads(b"".join(b"%02d" % number for number in range(20)))
    scene.both_ways()


@behaviour(_FORMS, "1000 warnings in a row", _IGNORED)
def test_thousand_warnings(scene: Scene) -> None:
    alert = bytes((_WARNING, _IN_VERSION[scene.cell.version]))
    scene.peer.send(ContentType.ALERT, *[alert] * 1000)
    scene.both_ways()


@behaviour(_FORMS, "a flood of warnings", "`unexpected_message`", suites=("AES-128-GCM",))
def test_flood_of_warnings(scene: Scene) -> None:
    alert = bytes((_WARNING, _IN_VERSION[scene.cell.version]))
    # Time gives some of the budget back while we work on them: send more than the slowest kernel earns.
    scene.peer.send(ContentType.ALERT, *[alert] * (int(FloodBudget.CAPACITY) + 600))
    scene.refused(_UNEXPECTED, silent=True)


@behaviour(_FORMS, "no_renegotiation, which we did not ask for", _IGNORED, versions=("1.2",))
def test_no_renegotiation(scene: Scene) -> None:
    for _ in range(3):
        scene.peer.send_alert(_NO_RENEGOTIATION, _WARNING)
        scene.both_ways()
