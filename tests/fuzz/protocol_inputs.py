"""Inputs for the protocol room: operations on one connection, their encoding, and a grammar that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktls.protocol.messages import MAX_HANDSHAKE_MESSAGE
from ktls.protocol.suites import MAX_FRAGMENT

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

CONFIGURE, RECORD, REFRESH, CLOSE, USAGE, INSTALLED, DATA_SEEN, TICK, SEALED, REASSEMBLE = range(10)


@dataclass(frozen=True)
class Operation:
    """What to do, and with which bytes."""

    code: int
    payload: bytes

    def encode(self) -> bytes:
        return bytes((self.code,)) + len(self.payload).to_bytes(3, "big") + self.payload


Input = tuple[Operation, ...]


def encode(operations: Input) -> bytes:
    return b"".join(operation.encode() for operation in operations)


def decode(raw: bytes) -> Input:
    """Any bytes are operations: what is cut off is missing, what is unknown does nothing."""
    operations, start = [], 0
    while start < len(raw):
        end = start + 4 + int.from_bytes(raw[start + 1 : start + 4], "big")
        operations.append(Operation(raw[start], raw[start + 4 : end]))
        start = end
    return tuple(operations)


# --- making inputs -------------------------------------------------------------------------------------------------


def message(message_type: int, body: bytes) -> bytes:
    return bytes((message_type & 0xFF,)) + len(body).to_bytes(3, "big") + body


class Generator:
    """Makes inputs from a grammar, and new ones from old."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def fresh(self) -> Input:
        rng = self.rng
        operations = [Operation(CONFIGURE, rng.randbytes(4))]
        for _ in range(rng.choice((1, 2, 4, 8, 16, 40))):
            operations += self.operation()
        return tuple(operations)

    def operation(self) -> Iterator[Operation]:
        rng = self.rng
        kind = rng.random()
        if kind < 0.55:
            yield from self.records(RECORD)
        elif kind < 0.65:
            yield from self.records(SEALED)
        elif kind < 0.70:
            for operation in self.records(REASSEMBLE):
                yield Operation(REASSEMBLE, operation.payload[1:])
        elif kind < 0.71:
            # A run of one record, for the flood budget and for the cap on answers.
            repeated = list(self.records(RECORD))
            yield from repeated * rng.choice((20, 20, 20, 300, 2100 // max(1, len(repeated))))
        else:
            code = rng.choice((REFRESH, REFRESH, CLOSE, USAGE, USAGE, INSTALLED, DATA_SEEN, TICK))
            yield Operation(code, rng.randbytes(rng.choice((0, 1, 4, 9))))

    def records(self, code: int) -> Iterator[Operation]:
        """One or more records; for SEALED two more bytes say where the ciphertext is touched."""
        rng = self.rng
        kind = rng.random()
        front = rng.randbytes(3) if code == SEALED else b""
        if kind < 0.6:
            joined = b"".join(self.handshake() for _ in range(rng.choice((1, 1, 1, 2, 3))))
            for fragment in self.split(self.mutate(joined) if rng.random() < 0.3 else joined):
                yield Operation(code, b"\x16" + front + fragment)
        elif kind < 0.75:
            alert = bytes((rng.choice((1, 2)), rng.choice((0, 0, 90, 100, 10, rng.randrange(256)))))
            yield Operation(code, b"\x15" + front + (self.mutate(alert) if kind < 0.63 else alert))
        elif kind < 0.95:
            yield Operation(code, b"\x17" + front + rng.randbytes(rng.choice((0, 0, 1, 20, 5000))))
        else:
            content_type = bytes((rng.randrange(256),))
            yield Operation(code, content_type + front + rng.randbytes(rng.randrange(6)))

    def handshake(self) -> bytes:
        rng = self.rng
        kind = rng.random()
        if kind < 0.4:
            return message(24, bytes((rng.choice((0, 1, 1, 2)),)) if kind < 0.38 else b"\0\0")
        if kind < 0.75:
            return message(4, self.ticket())
        if kind < 0.85:
            return message(0, b"" if kind < 0.83 else b"\0")
        if kind < 0.93:
            return message(1, rng.randbytes(rng.choice((0, 40))))
        if kind < 0.96:
            # An announcement near a bound, with little behind it.
            length = rng.choice((MAX_HANDSHAKE_MESSAGE, MAX_HANDSHAKE_MESSAGE + 1, 2**24 - 1, 300))
            return bytes((rng.choice((0, 1, 4, 24)),)) + length.to_bytes(3, "big") + b"x"
        return message(rng.choice((2, 8, 11, 13, 20, rng.randrange(256))), rng.randbytes(5))

    def ticket(self) -> bytes:
        rng = self.rng
        nonce = rng.randbytes(rng.choice((0, 1, 8, 255)))
        size = rng.choice((0, 1, 30, 200)) if rng.random() < 0.97 else 0xFFFF
        extensions = b""
        for _ in range(rng.choice((0, 0, 1, 2))):
            value = rng.randbytes(rng.choice((0, 4)))
            extensions += rng.randbytes(2) + len(value).to_bytes(2, "big") + value
        return b"".join(
            (
                rng.randbytes(8),
                bytes((len(nonce),)) + nonce,
                size.to_bytes(2, "big") + bytes(size),
                len(extensions).to_bytes(2, "big") + extensions,
            )
        )

    def split(self, joined: bytes) -> Iterator[bytes]:
        rng = self.rng
        how = rng.random()
        if how < 0.1 and len(joined) < 400:
            yield from (joined[i : i + 1] for i in range(len(joined)))
            return
        count = 0 if how < 0.6 else rng.randrange(1, 4)
        cuts = sorted(rng.randrange(len(joined) + 1) for _ in range(count))
        edges = [0, *cuts, len(joined)]
        for start, end in zip(edges, edges[1:]):  # noqa: B905, RUF007  equal but for one
            for piece in range(start, max(end, start + 1), MAX_FRAGMENT):
                yield joined[piece : min(end, piece + MAX_FRAGMENT)]

    def mutate(self, raw: bytes) -> bytes:
        rng = self.rng
        mutable = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(len(mutable) + 1)
            match rng.randrange(5):
                case 0 if place < len(mutable):
                    mutable[place] ^= 1 << rng.randrange(8)
                case 1 if place < len(mutable):
                    mutable[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    mutable.insert(place, rng.randrange(256))
                case 3:
                    del mutable[place : place + rng.randrange(1, 5)]
                case _:
                    mutable[place:place] = mutable[: rng.randrange(1, 9)]
        return bytes(mutable[: MAX_FRAGMENT + 1])

    def child(self, parent: Input, other: Input) -> Input:
        """A new input out of old ones."""
        rng = self.rng
        operations = list(parent)
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(1, len(operations) + 1)
            match rng.randrange(6):
                case 0 if place < len(operations):
                    old = operations[place]
                    operations[place] = Operation(old.code, self.mutate(old.payload))
                case 1 if place < len(operations):
                    del operations[place]
                case 2 if place < len(operations):
                    operations.insert(place, operations[place])
                case 3:
                    operations[place:] = other[rng.randrange(1, len(other) + 1) :]
                case 4:
                    operations[0] = Operation(CONFIGURE, self.mutate(operations[0].payload))
                case _:
                    operations[place:place] = self.operation()
        return tuple(operations[:3000])
