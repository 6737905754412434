"""Records at the edges of what is legal, and beyond: sizes, padding, nothing inside, content types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ktls.protocol.enums import AlertDescription, AlertLevel, ContentType
from ktls.protocol.suites import MAX_FRAGMENT, TAG_LENGTH

from ..peers.scripted import UPDATE
from .craft import DATA, header, inner, seal, shortest
from .matrix import Version, behaviours
from .outcomes import (
    BAD_MAC,
    OVERFLOW,
    UNEXPECTED,
    Closed,
    Event,
    GoesOn,
    play,
    rows,
)
from .scene import Scene

_ALERT: Final = ContentType.ALERT
_CCS: Final = ContentType.CHANGE_CIPHER_SPEC
_HANDSHAKE: Final = ContentType.HANDSHAKE
_CLOSE: Final = bytes((AlertLevel.WARNING, AlertDescription.CLOSE_NOTIFY))
#: So that a header is followed by enough for the kernel to look at it.
_FILLER: Final = bytes(64)
#: Bytes of no meaning; as payload they are never zeros, which would be padding.
_BIG: Final = bytes(range(1, 256)) * 75


def _text(size: int) -> bytes:
    return _BIG[:size]


def _records(*records: tuple[int, bytes]) -> Callable[[Scene], None]:
    """Honest records of these types, sent at once."""
    return lambda scene: scene.peer.send_raw(
        b"".join(scene.peer.seal(kind, fragment) for kind, fragment in records)
    )


def _inside(*insides: bytes) -> Callable[[Scene], None]:
    """TLS 1.3: records with exactly this encrypted. TLS 1.2: with these fragments."""
    return lambda scene: scene.peer.send_raw(
        b"".join(seal(scene.peer._tx, inside) for inside in insides)
    )


def _padded(size: int, padding: int, kind: int = DATA) -> Callable[[Scene], None]:
    return _inside(inner(_text(size), kind, padding))


def _raw(data: bytes) -> Callable[[Scene], None]:
    return lambda scene: scene.peer.send_raw(data)


def _outer(kind: int) -> Callable[[Scene], None]:
    """An authentic record that says another type outside; TLS 1.2 knows no other place."""
    return lambda scene: scene.peer.send_raw(seal(scene.peer._tx, inner(b"data"), kind=kind))


def _of_length(length: int) -> Callable[[Scene], None]:
    """A header that announces ``length``, and that many bytes that nobody sealed."""
    return lambda scene: scene.peer.send_raw(header(DATA, length) + _text(length) + _FILLER)


def _shorter_by(missing: int) -> Callable[[Scene], None]:
    """A record ``missing`` bytes shorter than one that holds nothing."""

    def do(scene: Scene) -> None:
        length = shortest(scene.peer._tx) - missing
        scene.peer.send_raw(header(DATA, length) + _text(length) + _FILLER)

    return do


def _dribbled(scene: Scene) -> None:
    """Two records, one TCP segment for each byte (TCP_NODELAY is set)."""
    for byte in scene.peer.seal(DATA, b"drop by ") + scene.peer.seal(DATA, b"drop"):
        scene.peer.send_raw(bytes((byte,)))


_13: Final[tuple[Version, ...]] = ("1.3",)
_12: Final[tuple[Version, ...]] = ("1.2",)

# --- nothing inside ------------------------------------------------------------------------------------------------

_EMPTY = (
    Event("a data record of length zero", _records((DATA, b"")), GoesOn()),
    Event(
        "zero-length data records between data",
        _records((DATA, b"one"), (DATA, b""), (DATA, b""), (DATA, b"two"), (DATA, b"")),
        GoesOn(b"onetwo"),
    ),
    Event(
        "500 zero-length data records, then data",
        _records(*[(DATA, b"")] * 500, (DATA, b"end")),
        GoesOn(b"end"),
    ),
    Event(
        "zero-length data, then close_notify",
        _records((DATA, b""), (_ALERT, _CLOSE)),
        Closed(),
    ),
    Event("an empty handshake record", _records((_HANDSHAKE, b"")), UNEXPECTED),
    Event("an empty change_cipher_spec record", _records((_CCS, b"")), UNEXPECTED),
)


@behaviours(*rows("Records without content", *_EMPTY))
def test_empty(scene: Scene) -> None:
    play(scene)


# --- padding (TLS 1.3) ---------------------------------------------------------------------------------------------

_NO_TYPE = "The kernel says of a record without a content type only that it can't be opened."


def _pads(*sizes: tuple[int, int]) -> Callable[[Scene], None]:
    return _inside(*(inner(_text(size), DATA, padding) for size, padding in sizes))


_PADDING = (
    Event("padding of 1 byte", _pads((5, 1)), GoesOn(_text(5)), versions=_13),
    Event(
        "padding of 255 and 16000 bytes",
        _pads((5, 255), (6, 16000)),
        GoesOn(_text(5) + _text(6)),
        versions=_13,
    ),
    Event(
        "padding up to the limit of 2^14+1 inside",
        _pads((1, 2**14 - 1), (2**13, 2**13), (2**14 - 1, 1), (2**14, 0)),
        GoesOn(_text(1) + _text(2**13) + _text(2**14 - 1) + _text(2**14)),
        versions=_13,
    ),
    Event("nothing but padding, 2^14 bytes", _pads((0, 2**14), (0, 1)), GoesOn(), versions=_13),
    Event(
        "padding one byte beyond the limit, full record", _padded(2**14, 1), OVERFLOW, versions=_13
    ),
    Event(
        "padding one byte beyond the limit, no data", _padded(0, 2**14 + 1), OVERFLOW, versions=_13
    ),
    Event("padding far beyond the limit", _padded(2**14, 239), OVERFLOW, versions=_13),
    Event(
        "a zero at the end of the data, and padding",
        _inside(inner(b"zeros\0\0", DATA, 3), inner(b"!")),
        GoesOn(b"zeros\0\0!"),
        versions=_13,
    ),
    Event(
        "nothing but zeros inside",
        _inside(bytes(20)),
        UNEXPECTED,
        in_kernel=BAD_MAC,
        why=_NO_TYPE,
        versions=_13,
    ),
    Event(
        "2^14+1 zeros inside",
        _inside(bytes(2**14 + 1)),
        UNEXPECTED,
        in_kernel=BAD_MAC,
        why=_NO_TYPE,
        versions=_13,
    ),
    Event(
        "nothing inside, not even a content type",
        _inside(b""),
        UNEXPECTED,
        in_kernel=BAD_MAC,
        why=_NO_TYPE,
        versions=_13,
    ),
)


@behaviours(*rows("Padding", *_PADDING))
def test_padding(scene: Scene) -> None:
    play(scene)


def _padded_update(scene: Scene) -> None:
    scene.peer.send_raw(seal(scene.peer._tx, inner(UPDATE, _HANDSHAKE, 50)))
    scene.peer.change_tx_key()


@behaviours(
    *rows(
        "Padding",
        Event("a padded KeyUpdate", _padded_update, GoesOn(), versions=_13, updates=True),
    )
)
def test_padded_update(scene: Scene) -> None:
    play(scene)


# --- sizes ---------------------------------------------------------------------------------------------------------

_UNREAD = "The kernel refuses a length that no suite of its can make before it looks at the tag."


def _expanded(size: int) -> Callable[[Scene], None]:
    """An authentic record whose protected length is ``size``."""

    def do(scene: Scene) -> None:
        protection = scene.peer._tx
        inside = size - shortest(protection)
        if scene.cell.version == "1.3":
            scene.peer.send_raw(seal(protection, inner(_text(inside))))
        else:
            scene.peer.send_raw(seal(protection, _text(inside)))

    return do


_SIZES = (
    Event("2^14 bytes of data", _records((DATA, _text(2**14))), GoesOn(_text(2**14))),
    Event("2^14+1 bytes of data", _records((DATA, _text(2**14 + 1))), OVERFLOW),
    Event("a record of 2^14+256 bytes, authentic", _expanded(2**14 + 256), OVERFLOW),
    Event(
        "a record of 2^14+256 bytes, garbage",
        _of_length(2**14 + 256),
        BAD_MAC,
        in_kernel=OVERFLOW,
        why=_UNREAD,
    ),
    Event("a record of 2^14+257 bytes", _of_length(2**14 + 257), OVERFLOW, versions=_13),
    Event(
        "a record of 2^14+1024 bytes, authentic", _expanded(2**14 + 1024), OVERFLOW, versions=_12
    ),
    Event(
        "a record of 2^14+1025 bytes, authentic", _expanded(2**14 + 1025), OVERFLOW, versions=_12
    ),
    Event(
        "a record of 2^14+2048 bytes, authentic", _expanded(2**14 + 2048), OVERFLOW, versions=_12
    ),
    Event(
        "a record of 2^14+2048 bytes, garbage",
        _of_length(2**14 + 2048),
        BAD_MAC,
        in_kernel=OVERFLOW,
        why=_UNREAD,
        versions=_12,
    ),
    Event("a record of 2^14+2049 bytes", _of_length(2**14 + 2049), OVERFLOW, versions=_12),
    Event(
        "a header that announces 2^16-1 bytes", _raw(header(DATA, 2**16 - 1) + _FILLER), OVERFLOW
    ),
    Event("a record of length 0", _of_length(0), BAD_MAC),
    Event("a record of length 1", _of_length(1), BAD_MAC),
    Event("a record one byte shorter than its tag", _of_length(TAG_LENGTH - 1), BAD_MAC),
    Event("a record one byte shorter than an empty one", _shorter_by(1), BAD_MAC),
    Event("one TCP segment for each byte", _dribbled, GoesOn(b"drop by drop")),
)


@behaviours(*rows("Record sizes", *_SIZES))
def test_sizes(scene: Scene) -> None:
    play(scene)


# --- content types -------------------------------------------------------------------------------------------------

_ASSUMED = "The kernel takes the outer type for granted: with any other a record can't be opened."

_TYPES = (
    *(
        Event(f"protected record of type {kind}{name}", _records((kind, b"?")), UNEXPECTED)
        for kind, name in ((1, ""), (19, ""), (24, " (heartbeat)"), (25, ""), (99, ""), (255, ""))
    ),
    Event("protected change_cipher_spec", _records((_CCS, b"\x01")), UNEXPECTED),
    Event("heartbeat request", _records((24, b"\x01\x00\x01?")), UNEXPECTED),
    *(
        Event(
            f"authentic record of outer type {kind}",
            _outer(kind),
            UNEXPECTED,
            in_kernel=BAD_MAC,
            why=_ASSUMED,
            versions=_13,
        )
        for kind in (0, 20, 21, 22, 24, 255)
    ),
)


@behaviours(*rows("Content types", *_TYPES))
def test_types(scene: Scene) -> None:
    play(scene)


def test_texts_are_long_enough() -> None:
    assert len(_BIG) > MAX_FRAGMENT + 2048
    assert 0 not in _BIG
