"""Records that were tampered with, repeated, moved or dropped; the wrong key; plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from ktls.protocol.enums import AlertDescription, ContentType
from ktls.record.aead import RecordProtection

from ..peers.scripted import UPDATE, ScriptedPeer
from .craft import DATA, flipped, header
from .matrix import Version, behaviours
from .outcomes import (
    BAD_MAC,
    OVERFLOW,
    UNEXPECTED,
    VERSION,
    Event,
    GoesOn,
    Outcome,
    Refused,
    play,
    rows,
)
from .scene import Scene

_HEADER: Final = 5
_GOOD: Final = b"good"
_WRONG: Final = b"one bit is wrong"
#: A refused record, behind one that was good.
_MAC_AFTER_GOOD: Final = Refused(AlertDescription.BAD_RECORD_MAC, _GOOD)


# --- tampering -----------------------------------------------------------------------------------------------------


def _bit(at: int, bit: int = 1) -> Callable[[Scene], None]:
    """One bit of a record is turned over, between two others."""

    def do(scene: Scene) -> None:
        seal = scene.peer.seal
        scene.peer.send_raw(
            seal(DATA, _GOOD) + flipped(seal(DATA, _WRONG), at, bit) + seal(DATA, b"no")
        )

    return do


def _shorter(scene: Scene) -> None:
    """The header says one byte less, so that the rest is taken for the next header."""
    seal = scene.peer.seal
    good = seal(DATA, _GOOD)
    record = bytearray(seal(DATA, b"too short"))
    record[4] -= 1
    scene.peer.send_raw(good + bytes(record) + seal(DATA, b"no"))


def _longer(scene: Scene) -> None:
    """The header says one byte more, which is taken from the next record."""
    seal = scene.peer.seal
    good = seal(DATA, _GOOD)
    record = bytearray(seal(DATA, b"too long"))
    record[4] += 1
    scene.peer.send_raw(good + bytes(record) + seal(DATA, b"no"))


def _cut(scene: Scene) -> None:
    """The last byte of the tag is missing, and the header agrees."""
    good = scene.peer.seal(DATA, _GOOD)
    record = scene.peer.seal(DATA, b"cut")
    length = len(record) - _HEADER - 1
    scene.peer.send_raw(good + header(DATA, length) + record[_HEADER:-1])


_TYPE_ASSUMED: Final = "The kernel takes the outer type of TLS 1.3 for granted: that it was changed is not seen. The type that counts is inside, and authentic."
_VERSION_FIRST: Final = "The kernel looks at the version before it opens the record."
_UNEXPECTED_AFTER_GOOD: Final = Refused(AlertDescription.UNEXPECTED_MESSAGE, _GOOD)
_VERSION_AFTER_GOOD: Final = Refused(AlertDescription.PROTOCOL_VERSION, _GOOD)

_TAMPERING = (
    Event("first bit of the tag", _bit(-16, 0x80), _MAC_AFTER_GOOD, undecryptable=True),
    Event("last bit of the tag", _bit(-1), _MAC_AFTER_GOOD, undecryptable=True),
    Event("first byte behind the header", _bit(_HEADER), _MAC_AFTER_GOOD, undecryptable=True),
    Event("last byte in front of the tag", _bit(-17), _MAC_AFTER_GOOD, undecryptable=True),
    Event(
        "content type in the header",
        _bit(0),
        _UNEXPECTED_AFTER_GOOD,
        in_kernel=GoesOn(_GOOD + _WRONG + b"no"),
        why=_TYPE_ASSUMED,
        versions=("1.3",),
    ),
    Event(
        "content type in the header",
        _bit(0),
        _MAC_AFTER_GOOD,
        versions=("1.2",),
        undecryptable=True,
    ),
    Event(
        "version in the header",
        _bit(1),
        _MAC_AFTER_GOOD,
        in_kernel=_VERSION_AFTER_GOOD,
        why=_VERSION_FIRST,
        versions=("1.3",),
    ),
    Event("version in the header", _bit(1), _VERSION_AFTER_GOOD, versions=("1.2",)),
    Event("length in the header, one less", _shorter, _MAC_AFTER_GOOD, undecryptable=True),
    Event("length in the header, one more", _longer, _MAC_AFTER_GOOD, undecryptable=True),
    Event("a tag that was cut", _cut, _MAC_AFTER_GOOD, undecryptable=True),
)


# --- order ---------------------------------------------------------------------------------------------------------


def _order(*numbers: int) -> Callable[[Scene], None]:
    """Records 0, 1, 2, ... are sent in this order."""

    def do(scene: Scene) -> None:
        made = [scene.peer.seal(DATA, _GOOD) for _ in range(max(numbers) + 1)]
        scene.peer.send_raw(b"".join(made[number] for number in numbers))

    return do


_ORDER = (
    Event("a record twice", _order(0, 0), _MAC_AFTER_GOOD, undecryptable=True),
    Event(
        "a record once more, after another",
        _order(0, 1, 0),
        Refused(AlertDescription.BAD_RECORD_MAC, _GOOD * 2),
        undecryptable=True,
    ),
    Event("two records in the wrong order", _order(0, 2, 1), _MAC_AFTER_GOOD, undecryptable=True),
    Event("a record is missing", _order(0, 2), _MAC_AFTER_GOOD, undecryptable=True),
)


# --- keys ----------------------------------------------------------------------------------------------------------


def _take_data(peer: ScriptedPeer) -> bytes:
    """The next data record that came, as it is."""
    while True:
        head = peer._take(_HEADER)
        assert head is not None
        body = peer._take(int.from_bytes(head[3:], "big"))
        assert body is not None
        if peer._rx.open(head, body).content_type == DATA:
            return head + body


def _reflected(scene: Scene) -> None:
    """Our own record comes back."""
    scene.tls.sendall(b"to the peer")
    scene.peer.send_raw(_take_data(scene.peer))


def _other_direction(scene: Scene) -> None:
    """The right number, with our sending key."""
    peer = scene.peer
    wrong = RecordProtection(peer.suite, peer._rx.keys, peer._tx.sequence_number)
    peer.send_raw(wrong.seal(DATA, b"whose key is this?"))


def _next_key(scene: Scene) -> None:
    """The next key, without a KeyUpdate."""
    scene.peer.change_tx_key()
    scene.peer.send_data(b"unannounced")


def _old_key(scene: Scene) -> None:
    """KeyUpdate, and then the same key again."""
    scene.peer.send_handshake(UPDATE)
    scene.peer.send_data(b"under the old key")


def _next_but_one(scene: Scene) -> None:
    scene.peer.send_update()
    scene.peer.change_tx_key()
    scene.peer.send_data(b"one key too far")


def _old_number(scene: Scene) -> None:
    """The new key, but numbers that go on."""
    number = scene.peer._tx.sequence_number
    scene.peer.send_update()
    scene.peer._tx.sequence_number = number + 1
    scene.peer.send_data(b"not from zero")


_13: Final[tuple[Version, ...]] = ("1.3",)
_KEYS = (
    Event("our own record, sent back", _reflected, BAD_MAC, undecryptable=True),
    Event("the key of the other direction", _other_direction, BAD_MAC, undecryptable=True),
    Event("the next key without a KeyUpdate", _next_key, BAD_MAC, versions=_13, undecryptable=True),
    Event(
        "the old key after a KeyUpdate",
        _old_key,
        BAD_MAC,
        versions=_13,
        undecryptable=True,
        updates=True,
    ),
    Event(
        "the next key but one after a KeyUpdate",
        _next_but_one,
        BAD_MAC,
        versions=_13,
        undecryptable=True,
        updates=True,
    ),
    Event(
        "a KeyUpdate, and sequence numbers that go on",
        _old_number,
        BAD_MAC,
        versions=_13,
        undecryptable=True,
        updates=True,
    ),
)


# --- plain text ----------------------------------------------------------------------------------------------------


def _raw(data: bytes) -> Callable[[Scene], None]:
    return lambda scene: scene.peer.send_raw(data)


_NO_TLS: Final = "The kernel looks at the length first, then at the version, and never at the type."
#: No record has such a type. With it, what the kernel says who takes the next bytes for a version and a length.
_NOTHING_LIKE_TLS: Final[tuple[tuple[str, bytes, Outcome], ...]] = (
    ("a request of HTTP", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", VERSION),
    ("an answer of HTTP", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", OVERFLOW),
    ("random bytes", bytes(range(200, 256)) * 4, OVERFLOW),
    # RFC 5246, appendix E.2
    (
        "a hello of SSL 2",
        bytes.fromhex("802e 01 0303 0015 0000 0010 00c02b 00c02f 00009c") + bytes(40),
        VERSION,
    ),
    ("nothing but zeros", bytes(64), BAD_MAC),
)
#: Whole records.
_UNPROTECTED: Final = (
    ("an alert", header(ContentType.ALERT, 2) + b"\x02\x28"),
    ("close_notify", header(ContentType.ALERT, 2) + b"\x01\x00"),
    ("a KeyUpdate", header(ContentType.HANDSHAKE, 5) + UPDATE),
    ("a ClientHello", header(ContentType.HANDSHAKE, 64) + b"\x01\x00\x00\x3c" + bytes(60)),
    ("change_cipher_spec", header(ContentType.CHANGE_CIPHER_SPEC, 1) + b"\x01"),
    ("data, shorter than a tag", header(DATA, 5) + b"plain"),
    ("data, longer than a tag", header(DATA, 100) + b"plain" * 20),
)
#: Behind each, so that the kernel has enough to look at.
_BEHIND: Final = bytes(16)


def _plain_text() -> Iterator[Event]:
    for name, data, in_kernel in _NOTHING_LIKE_TLS:
        yield Event(name, _raw(data), UNEXPECTED, in_kernel=in_kernel, why=_NO_TLS)
    for name, record in _UNPROTECTED:
        do = _raw(record + _BEHIND)
        # What is shorter than a tag the kernel need not try to open.
        tried = len(record) > 60
        if record[0] == DATA:
            yield Event(name, do, BAD_MAC, undecryptable=tried)
            continue
        yield Event(name, do, UNEXPECTED, in_kernel=BAD_MAC, why=_NO_TLS, versions=("1.3",))
        yield Event(name, do, BAD_MAC, versions=("1.2",), undecryptable=tried)


@behaviours(
    *rows("Tampering with a record", *_TAMPERING),
    *rows("Order of records", *_ORDER),
    *rows("Wrong keys", *_KEYS),
    *rows("Plain text", *_plain_text()),
)
def test_attacks(scene: Scene) -> None:
    play(scene)
