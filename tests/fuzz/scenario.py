"""A connection as it will happen to each record layer: what the peer sends, in which pieces, and what our application does in between.

``Scenario.from_bytes`` makes one out of any bytes. What the peer sends is sealed beforehand, so that all layers get the very same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from ktls.protocol.enums import ContentType, ProtocolVersion, Role
from ktls.protocol.limits import KeyLimits
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.aead import HEADER_LENGTH, RecordProtection
from ktls.testing import made_up_keys, pattern

from ..record.layers import SUITES
from .source import Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.protocol.suites import CipherSuite

__all__ = ("Action", "Ending", "Fault", "Reading", "Scenario", "Wire")

#: A record that no honest peer sends, by what of it is wrong. What the layers may disagree about depends on it (``differences``).
Fault: TypeAlias = Literal[
    "outer type",
    "version",
    "length",
    "body",
    "cut",
    "too long",
    "no inner type",
    "order",
    "noise",
    "empty data in a message",
    "0x18 in TLS 1.2",
]
Ending: TypeAlias = Literal["fin", "reset"]
#: How our side reads: the blocking front end's way, the event loop's, or uncopied into a pipe (in the kernel).
Reading: TypeAlias = Literal["recv", "loop", "splice"]
ActionName: TypeAlias = Literal["send", "vector", "sendfile", "refresh", "request", "close"]

#: Bytes on the wire, at most: less than TCP's buffers hold, so that a peer is never held up by a layer that has stopped reading.
MOST_WIRE: Final = 120_000
MOST_STEPS: Final = 24
_MOST_SENT: Final = 40_000

_KEY_UPDATES: Final = (b"\x18\0\0\1\0", b"\x18\0\0\1\1")
_TICKET: Final = bytes.fromhex("0400000e 00001c20 01020304 00 0001 78 0000")
_LONG_TICKET: Final = (
    b"\x04\0\x01\x39"
    + bytes(8)
    + b"\x08"
    + bytes(8)
    + b"\x01\x20"
    + bytes(288)
    + b"\0\x04\x00\x2a\0\0"
)
_HELLO_REQUEST: Final = bytes(4)
_CLIENT_HELLO: Final = b"\x01\0\0\x07hel\x18\x18lo"
#: What may come, by version and role of the receiver.
_LEGAL: Final = {
    (ProtocolVersion.TLSv1_3, Role.CLIENT): (*_KEY_UPDATES, _TICKET, _LONG_TICKET),
    (ProtocolVersion.TLSv1_3, Role.SERVER): _KEY_UPDATES,
    (ProtocolVersion.TLSv1_2, Role.CLIENT): (_HELLO_REQUEST,),
    (ProtocolVersion.TLSv1_2, Role.SERVER): (_CLIENT_HELLO,),
}
#: What may not, or not to everybody.
_ILLEGAL: Final = (
    _HELLO_REQUEST,
    _CLIENT_HELLO,
    _TICKET,
    b"\x18\0\0\1\2",
    b"\x18\0\0\2\0\0",
    b"\x0d\0\0\x03\0\0\0",
    b"\x04\0\0\x01x",
    b"\x04\xff\xff\xff",
)
_ALERTS: Final = (
    *[b"\x01\x5a"] * 8,
    b"\x01\x00",
    b"\x02\x00",
    b"\x02\x28",
    b"\x01\x64",
    b"\x02\x5a",
    b"",
    b"\x02",
    b"\x01\x00\x00",
    b"\x02\xfe",
)


@dataclass(frozen=True, slots=True)
class Wire:
    """The peer sends this, in one call."""

    data: bytes = field(repr=False)
    what: str


@dataclass(frozen=True, slots=True)
class Action:
    """Our application does this, after it has read what there was."""

    name: ActionName
    size: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """See the module."""

    suite: CipherSuite
    role: Role
    reading: Reading
    buffer: int
    limits: KeyLimits
    #: How many bytes the catch-up receiver is given as read past the handshake.
    overread: int
    steps: tuple[Wire | Action, ...]
    ending: Ending
    faults: frozenset[Fault]

    @classmethod
    def from_bytes(cls, data: bytes, *, key_updates: bool) -> Scenario:
        """Make one out of ``data``; without ``key_updates`` no whole KeyUpdate is in it, nor a cause for one of ours."""
        return _Builder(Source(data), key_updates).build()

    @property
    def is_tls13(self) -> bool:
        """Whether there may be KeyUpdates at all."""
        return self.suite.version is ProtocolVersion.TLSv1_3

    def __str__(self) -> str:
        lines = [
            f"{self.suite.name}, {self.role.value}, reading by {self.reading} up to {self.buffer},"
            f" {self.limits}, over-read {self.overread}, faults {sorted(self.faults)}"
        ]
        for step in self.steps:
            if isinstance(step, Wire):
                lines.append(f"  peer: {len(step.data)} bytes: {step.what}")
            else:
                lines.append(f"  we: {step.name} {step.size}")
        return "\n".join([*lines, f"  peer: {self.ending}"])


class _Builder:
    def __init__(self, source: Source, key_updates: bool) -> None:
        self._source = source
        self._key_updates = key_updates
        self._suite = source.choice(SUITES)
        self._role = source.choice((Role.CLIENT, Role.SERVER))
        self._is_tls13 = self._suite.version is ProtocolVersion.TLSv1_3
        legal = _LEGAL[self._suite.version, self._role]
        self._legal = [one for one in legal if key_updates or one not in _KEY_UPDATES]
        self._generation = 0
        self._protection = RecordProtection(self._suite, made_up_keys(self._suite, "peer"))
        self._faults: set[Fault] = set()
        self._records: list[tuple[bytes, str]] = []
        self._steps: list[Wire | Action] = []
        self._total = self._position = 0
        self._sent = 0
        self._before = b""

    def build(self) -> Scenario:
        source = self._source
        reading: Reading = source.choice(("recv", "loop", "recv", "splice"))
        buffer = source.choice((65536, 16384, 1, 100, 5000))
        limit = source.choice((None, None, None, 3, 10)) if self._key_updates else None
        overread = source.choice((0, 1, 5, 30, 1000))
        reset = source.chance(10)
        while source and len(self._steps) < MOST_STEPS and self._total < MOST_WIRE:
            if source.chance(20):
                self._ship()
                self._act()
            else:
                self._some_records()
                if source.chance(40):
                    self._ship()
        self._ship()
        return Scenario(
            self._suite,
            self._role,
            reading,
            # One byte at a time would take for ever.
            max(buffer, self._position // 400),
            KeyLimits(records=limit),
            overread,
            tuple(self._steps),
            "reset" if reset else "fin",
            frozenset(self._faults),
        )

    # --- what goes over the wire -------------------------------------------------------------------------------

    def _ship(self) -> None:
        """Turn the records so far into pieces of the TCP stream."""
        source = self._source
        stream = b"".join(record for record, _ in self._records)
        what = ", ".join(what for _, what in self._records)
        self._records.clear()
        if not stream:
            return
        cuts = sorted(source.below(len(stream)) for _ in range(source.choice((0, 0, 0, 1, 2, 5))))
        for start, end in pairwise((0, *cuts, len(stream))):
            if start < end:
                self._steps.append(Wire(stream[start:end], what if start == 0 else "..."))

    def _add(self, record: bytes, what: str) -> None:
        self._records.append((record, what))
        self._total += len(record)
        self._before = record

    def _seal(self, content_type: int, fragment: bytes, what: str) -> None:
        source = self._source
        padding = 0
        if self._is_tls13 and source.chance(15):
            padding = min(
                source.choice((1, 16, 255, 5000, MAX_FRAGMENT)), MAX_FRAGMENT - len(fragment)
            )
        record = self._protection.seal(content_type, fragment, padding)
        self._add(record, f"{what} {len(fragment)}" + (f"+{padding}" if padding else ""))

    def _some_records(self) -> None:
        kinds: tuple[tuple[int, Callable[[], None]], ...] = (
            (100, self._data),
            (190, self._handshake),
            (220, self._alert),
            (235, self._mutated),
            (241, self._too_long),
            (244, self._odd_type),
            (247, self._no_inner_type),
            (250, self._out_of_order),
            (256, self._noise),
        )
        kind = self._source.byte()
        next(make for bound, make in kinds if kind < bound)()

    def _data(self) -> None:
        size = self._source.size(MAX_FRAGMENT)
        if self._total + size > MOST_WIRE:
            size = 1
        self._seal(ContentType.APPLICATION_DATA, pattern(size, self._position), "data")
        self._position += size

    def _alert(self) -> None:
        alert = self._source.choice(_ALERTS)
        self._seal(ContentType.ALERT, alert, f"alert {alert.hex()}")

    def _odd_type(self) -> None:
        content_type = self._source.choice((20, 24, 99, 255, 1))
        self._seal(content_type, self._source.take(2), f"type {content_type}")
        if not self._is_tls13 and content_type != 20:
            self._faults.add("outer type")

    def _handshake(self) -> None:
        source = self._source
        if not self._legal:
            self._data()
            return
        messages = [self._message() for _ in range(source.choice((1, 1, 1, 2, 3)))]
        joined = b"".join(messages)
        cuts = sorted(source.below(len(joined) + 1) for _ in range(source.choice((0, 0, 0, 1, 3))))
        edges = sorted({0, *cuts, len(joined)}) if source.chance(90) else [0, *cuts, len(joined)]
        for start, end in pairwise(edges):
            fragment = joined[start:end]
            if not self._is_tls13 and fragment[:1] == b"\x18":
                self._faults.add("0x18 in TLS 1.2")
            if start and source.chance(5):
                self._data_in_a_message()
            self._seal(ContentType.HANDSHAKE, fragment, f"handshake {fragment[:8].hex()}")
        if self._is_tls13 and messages[-1] in _KEY_UPDATES and not source.chance(3):
            self._generation += 1
            self._protection = RecordProtection(
                self._suite, made_up_keys(self._suite, "peer", self._generation)
            )

    def _message(self) -> bytes:
        return self._source.choice(_ILLEGAL if self._source.chance(8) else self._legal)

    def _data_in_a_message(self) -> None:
        if self._source.chance(50):
            self._seal(ContentType.ALERT, b"\x01\x5a", "warning in between")
        else:
            self._faults.add("empty data in a message")
            self._seal(ContentType.APPLICATION_DATA, b"", "empty data in between")

    # --- what no honest peer sends -----------------------------------------------------------------------------

    def _mutated(self) -> None:
        """Touch the last record: make one if there is none."""
        source = self._source
        if not self._records:
            self._data()
        record, what = self._records.pop()
        kind: Fault = source.choice(("body", "length", "version", "outer type", "cut"))
        changed = bytearray(record)
        if len(record) <= HEADER_LENGTH:
            kind = "cut"
        if kind == "cut":
            del changed[source.below(len(changed) + 1) :]
        else:
            first, count = {
                "outer type": (0, 1),
                "version": (1, 2),
                "length": (3, 2),
                "body": (HEADER_LENGTH, len(record) - HEADER_LENGTH),
            }[kind]
            place = first + source.below(count)
            changed[place] ^= 1 << source.below(8) if source.chance(70) else source.byte() or 1
        self._faults.add(kind)
        self._add(bytes(changed), f"{what} with a changed {kind}")

    def _too_long(self) -> None:
        """Records around the greatest lengths, all of them sealed with the right key."""
        excess = self._source.choice((1, 0, 2, 17, 239, 240, 241, 256, 2024, 2048, 2049))
        size = MAX_FRAGMENT + excess
        if self._total + size > MOST_WIRE:
            return
        if excess:
            self._faults.add("too long")
        if self._is_tls13 and self._source.chance(50):
            content = self._source.choice((0, 1, 1000, MAX_FRAGMENT))
            record = self._protection.seal(
                ContentType.APPLICATION_DATA, pattern(content, self._position), size - content
            )
            self._position += content
        else:
            record = self._protection.seal(
                ContentType.APPLICATION_DATA, pattern(size, self._position)
            )
            self._position += size
        self._add(record, f"data of {MAX_FRAGMENT}+{excess}")

    def _no_inner_type(self) -> None:
        if not self._is_tls13:
            return
        self._faults.add("no inner type")
        self._add(self._protection.seal(0, bytes(self._source.size(300))), "nothing but padding")

    def _out_of_order(self) -> None:
        """Repeat the last record, leave one out, or exchange two."""
        self._faults.add("order")
        kind = self._source.below(3)
        if kind == 0 and self._before:
            self._add(self._before, "the same again")
        elif kind == 1:
            self._protection.seal(ContentType.APPLICATION_DATA, b"x")
            self._data()
        else:
            later = len(self._records)
            self._data()
            self._data()
            self._records[later:] = reversed(self._records[later:])

    def _noise(self) -> None:
        source = self._source
        noise = source.choice(
            (
                b"GET / HTTP/1.1\r\n\r\n",
                b"\x15\x03\x03\0\x02\x01\0",
                b"\x14\x03\x03\0\x01\x01",
                b"\x17\x03\x03\0\0",
                b"\x17\x03\x03\0\x10" + bytes(16),
                b"\x17\x03\x03\xff\xff",
                b"\x17\x03\x03\x40\x11" + bytes(30),
                b"\x17\x03\x01\0\x20" + bytes(32),
                b"\0",
            )
        )
        if source.chance(20):
            noise = source.take(40)
        self._faults.add("noise")
        self._add(noise, f"noise {noise[:8].hex()}")

    # --- what our side does ------------------------------------------------------------------------------------

    def _act(self) -> None:
        source = self._source
        name: ActionName = source.choice(
            ("send", "vector", "sendfile", "refresh", "request", "send", "close")
        )
        if name in ("refresh", "request") and not self._key_updates:
            name = "send"
        size = max(1, source.size(_MOST_SENT)) if source.chance(50) else 10
        self._sent += size
        self._steps.append(Action(name, size))
