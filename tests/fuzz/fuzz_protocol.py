"""A fuzzer for ``ktls.protocol`` and ``ktls.record.aead``: only documented errors may escape, and the invariants hold.

    python tests/fuzz/fuzz_protocol.py --seconds 600 [--seed N]
    python tests/fuzz/fuzz_protocol.py --reproduce HEX

An input is a list of operations on one connection: records of all types (handshake messages whole, split, joined and mutated; alerts;
data), sealed records that are touched on their way, and the calls of a driver in between. Inputs are made from a grammar and by
mutation of inputs kept; kept are those that reach a new pair of lines (every few executions are traced). On a failure the operations
are made fewer as long as it stays, printed as hexadecimal, and the exit status is 1.

Needs nothing but the package. The same seed and the same number of executions give the same run.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ktls.protocol import connection as _connection
from ktls.protocol.connection import KernelConnection
from ktls.protocol.enums import (
    AlertDescription,
    ContentType,
    Direction,
    HandshakeType,
    ProtocolVersion,
    Role,
)
from ktls.protocol.errors import AlertReceived, LocalProtocolError, RemoteProtocolError
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret
from ktls.protocol.limits import KeyLimits
from ktls.protocol.messages import MAX_HANDSHAKE_MESSAGE, HandshakeReassembler
from ktls.protocol.states import (
    ApplicationData,
    Closed,
    ConnectionState,
    HalfState,
    InboundPlainMessage,
    PeerClosed,
    SendMessage,
    SessionTicket,
    UpdateRxKey,
    UpdateTxKey,
)
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.aead import HEADER_LENGTH, RecordProtection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

SUITES: Final = tuple(CipherSuite)
TRACED_DIRECTORY: Final = str(Path(_connection.__file__).parents[1])
TRACE_ONE_IN: Final = 8

# --- operations ----------------------------------------------------------------------------------------------------

CONFIGURE, RECORD, REFRESH, CLOSE, USAGE, INSTALLED, DATA_SEEN, TICK, SEALED, REASSEMBLE = range(10)


@dataclass(frozen=True)
class Operation:
    """What to do, and with which bytes."""

    code: int
    payload: bytes

    def encode(self) -> bytes:
        return bytes((self.code,)) + len(self.payload).to_bytes(3, "big") + self.payload


Input = tuple[Operation, ...]


def encode(operations: Input) -> str:
    return b"".join(operation.encode() for operation in operations).hex()


def decode(text: str) -> Input:
    raw, operations, start = bytes.fromhex(text), [], 0
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


# --- running an input ----------------------------------------------------------------------------------------------


class Broken(Exception):
    """An invariant does not hold."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Broken(what)


def bounded(pending: bytes) -> None:
    """Nothing is kept of a message that is too large to be legal."""
    require(len(pending) < 4 or number(pending, 1, 4) <= MAX_HANDSHAKE_MESSAGE, "announcement")
    require(len(pending) < 4 + MAX_HANDSHAKE_MESSAGE, f"{len(pending)} bytes pending")


def number(payload: bytes, start: int, end: int) -> int:
    return int.from_bytes(payload[start:end], "big")


class Target:
    """One connection, and what is known about it from outside."""

    def __init__(self, payload: bytes) -> None:
        role, suite, flags, limit = payload.ljust(4, b"\0")[:4]
        self.suite = SUITES[suite % len(SUITES)]
        self.is_tls13 = self.suite.version is ProtocolVersion.TLSv1_3
        self.now = 0.0
        size = 48 if self.suite.hash_name == "sha384" else 32
        generation = 2**48 - 3 if flags & 1 else 0
        traffic = TrafficSecret(self.suite, bytes(range(size)), generation)
        self.logged = 0
        self.conn = KernelConnection(
            Role.SERVER if role & 1 else Role.CLIENT,
            self.suite,
            tx_secret=traffic if self.is_tls13 else None,
            rx_secret=traffic if self.is_tls13 else None,
            tx_key_can_change=not flags & 2,
            limits=KeyLimits(
                records=limit or None,
                octets=1000 * limit or None if flags & 4 else None,
                age=float(limit) or None if flags & 8 else None,
            ),
            key_log=self.log,
        )
        keys = (
            traffic.keys()
            if self.is_tls13
            else TrafficKeys(
                bytes(self.suite.aead.key_length), bytes(self.suite.aead.fixed_iv_length), 5
            )
        )
        self.sealer = RecordProtection(self.suite, keys)
        self.opener = RecordProtection(self.suite, keys)
        self.reassembler: HandshakeReassembler | None = HandshakeReassembler(self.accept)
        self.reassembling = b""
        self.pending = b""  # what the reassembler may hold, worked out from outside
        self.unanswered = False
        self.peer_closed = self.closed = 0

    def log(self, label: str, secret: bytes) -> None:
        self.logged += 1
        require(label.rpartition("_")[2].isdigit(), f"key log label {label}")
        require(len(secret) in (32, 48), "key log secret")

    def accept(self, message_type: int) -> HandshakeType:
        try:
            return HandshakeType(message_type)
        except ValueError:
            raise RemoteProtocolError("type", AlertDescription.UNEXPECTED_MESSAGE) from None

    def snapshot(self) -> tuple[object, ...]:
        conn = self.conn
        return (
            conn.tx_state,
            conn.rx_state,
            conn.tx_generation,
            conn.rx_generation,
            conn.fragment_pending,
            self.logged,
        )

    def run(self, operation: Operation) -> None:
        match operation.code:
            case 1:
                payload = operation.payload
                content_type = payload[0] if payload else 0
                self.record(InboundPlainMessage(content_type, payload[1:]))
            case 2:
                self.refresh(bool(operation.payload[:1] > b"\x7f"))
            case 3:
                self.close()
            case 4:
                self.usage(operation.payload)
            case 5:
                self.conn.tx_key_installed(self.conn.tx_generation)
                self.conn.rx_key_installed(self.conn.rx_generation)
            case 6:
                self.conn.received_data(number(operation.payload, 0, 3))
            case 7:
                self.now += number(operation.payload, 0, 2) / 16
            case 8:
                self.sealed(operation.payload)
            case 9:
                self.reassemble(operation.payload)
            case _:
                pass  # a mutated configuration in the middle

    def record(self, record: InboundPlainMessage) -> None:
        conn, before = self.conn, self.snapshot()
        tx, rx = conn.tx_state, conn.rx_state
        generations = conn.tx_generation, conn.rx_generation
        try:
            items = conn.process_message(record, now=self.now)
        except (RemoteProtocolError, AlertReceived) as error:
            require(rx is HalfState.OPEN, "a peer's error on a direction that is not open")
            require(conn.tx_state is conn.rx_state is HalfState.FAILED, "raised, not failed")
            require(generations == (conn.tx_generation, conn.rx_generation), "raised and moved on")
            require(self.logged == before[-1], "raised and logged a secret")
            require(not error.recoverable and bool(str(error)), "error without a text")
            return
        except LocalProtocolError:
            require(rx is HalfState.FAILED, "local error on a connection that has not failed")
            require(self.snapshot() == before, "local error that changed something")
            return
        require(rx is not HalfState.FAILED, "items from a failed connection")
        if rx is HalfState.CLOSED:
            require(not items and self.snapshot() == before, "something after close_notify")
            return
        self.check(items, generations)
        if conn.tx_state is not tx:
            changed = {HalfState.EXHAUSTED, HalfState.CLOSED}
            require(tx is not HalfState.CLOSED and conn.tx_state in changed, "tx moved back")
        self.measure(record, items)

    def measure(self, record: InboundPlainMessage, items: object) -> None:
        """Bound what the reassembler may hold, from outside: what went in less what came out."""
        if not self.conn.fragment_pending:
            self.pending = b""
            return
        require(record.content_type == ContentType.HANDSHAKE, "pending after another record")
        self.pending += record.fragment
        if self.is_tls13 and isinstance(items, tuple):
            tickets = [item.message for item in items if isinstance(item, SessionTicket)]
            self.pending = self.pending[sum(map(len, tickets)) :]
            bounded(self.pending)

    def check(self, items: object, generations: tuple[int, int]) -> None:
        """Every sequence of items is one that a driver can run."""
        require(isinstance(items, tuple), "items are not a complete sequence")
        tx, rx = generations
        key_update_sent = False
        states: tuple[ConnectionState, ...] = items if isinstance(items, tuple) else ()
        for position, item in enumerate(states):
            match item:
                case UpdateTxKey(keys, generation):
                    tx += 1
                    require(key_update_sent, "a sending key without its KeyUpdate")
                    require(generation == tx and len(keys.iv) == 12, "sending generation")
                    key_update_sent = False
                case UpdateRxKey(keys, generation):
                    rx += 1
                    require(generation == rx and len(keys.iv) == 12, "receiving generation")
                    self.unanswered = False
                    require(
                        not any(isinstance(other, SendMessage) for other in states[:position]),
                        "an answer before the key",
                    )
                case SendMessage(content_type, fragment):
                    require(not key_update_sent, "a record between KeyUpdate and key")
                    key_update_sent = content_type is ContentType.HANDSHAKE
                    if key_update_sent:
                        require(fragment[:4] == b"\x18\0\0\1" and fragment[4] < 2, "KeyUpdate")
                        asks = fragment[4] == 1
                        require(not (asks and self.unanswered), "two requests outstanding")
                        self.unanswered = self.unanswered or asks
                    else:
                        require(len(fragment) == 2, "alert")
                case SessionTicket(ticket):
                    require(self.conn.role is Role.CLIENT and ticket[0] == 4, "ticket")
                case ApplicationData(data):
                    require(bool(data) and len(states) == 1, "data")
                case PeerClosed():
                    self.peer_closed += 1
                    require(self.peer_closed == 1, "closed twice")
                case Closed():
                    self.closed += 1
                    both = self.conn.tx_state is self.conn.rx_state is HalfState.CLOSED
                    require(both and self.closed == 1, "Closed but not closed")
        require(not key_update_sent, "a KeyUpdate without its key")
        require((tx, rx) == (self.conn.tx_generation, self.conn.rx_generation), "generations")
        require(tx <= 2**48 - 1, "too many updates")
        require(self.logged >= 0, "log")

    def refresh(self, request_peer: bool) -> None:
        conn, before = self.conn, self.snapshot()
        generations = conn.tx_generation, conn.rx_generation
        may = conn.tx_state is HalfState.OPEN and conn.tx_key_can_change
        may = may and conn.tx_generation < 2**48 - 1
        try:
            items = conn.refresh_traffic_keys(request_peer, now=self.now)
        except LocalProtocolError:
            require(not may, "refresh refused")
            require(self.snapshot() == before, "refused and changed")
            return
        require(may and len(items) == 2, "refreshed what may not be")
        self.check(items, generations)

    def close(self) -> None:
        conn = self.conn
        generations, tx = (conn.tx_generation, conn.rx_generation), conn.tx_state
        items = conn.close()
        self.check(items, generations)
        require(bool(items) is (tx in (HalfState.OPEN, HalfState.EXHAUSTED)), "close")

    def usage(self, payload: bytes) -> None:
        conn = self.conn
        generations, tx = (conn.tx_generation, conn.rx_generation), conn.tx_state
        direction = Direction.RX if payload[:1] > b"\x7f" else Direction.TX
        records, octets = number(payload, 1, 5), number(payload, 5, 9)
        items = conn.record_usage(direction, records, octets=octets, now=self.now)
        self.check(items, generations)
        require(tx is HalfState.OPEN or not items, "usage of a side that is not open")

    def sealed(self, payload: bytes) -> None:
        """Seal a record, touch it perhaps, open it, and take what comes out."""
        payload = payload.ljust(4, b"\0")
        # TLS 1.2 shows the type in the header, where an unknown one is refused before anything is opened.
        content_type = payload[0] or 1 if self.is_tls13 else 20 + payload[0] % 4
        touch, place, bit = payload[1], payload[2], payload[3]
        fragment = payload[4:][:MAX_FRAGMENT]
        padding = min(place, MAX_FRAGMENT - len(fragment)) if touch & 2 else 0
        record = bytearray(self.sealer.seal(content_type, fragment, padding))
        original = bytes(record)
        if touch & 1:
            place = place if touch & 4 else len(record) - 1 - place
            record[place % len(record)] ^= 1 << (bit & 7)
            if touch & 8:
                del record[HEADER_LENGTH + bit :]
        before = self.opener.sequence_number
        header, body = bytes(record[:HEADER_LENGTH]), bytes(record[HEADER_LENGTH:])
        authentic = 5 if self.is_tls13 else 3  # TLS 1.2 takes the length from the body
        same = header[:authentic] + body == original[:authentic] + original[HEADER_LENGTH:]
        try:
            opened = self.opener.open(header, body)
        except RemoteProtocolError:
            require(bytes(record) != original, "a good record was refused")
            require(self.opener.sequence_number == before, "refused and counted")
            opened = self.opener.open(original[:HEADER_LENGTH], original[HEADER_LENGTH:])
        else:
            require(same, "a record that was touched was opened")
        require(self.opener.sequence_number == before + 1, "sequence number")
        require(opened == InboundPlainMessage(content_type, fragment), "not what was sealed")
        self.record(opened)
        if touch & 0xC0 == 0xC0:
            # Bytes that nobody sealed.
            try:
                self.opener.open(header, payload)
            except RemoteProtocolError:
                return
            raise Broken("noise was opened")

    def reassemble(self, fragment: bytes) -> None:
        if self.reassembler is None:
            return
        try:
            messages = self.reassembler.feed(fragment)
        except RemoteProtocolError:
            self.reassembler = None
            return
        whole = b"".join(one.encode() for one in messages)
        fed = self.reassembling + fragment
        require(fed.startswith(whole), "other bytes came out than went in")
        self.reassembling = fed[len(whole) :]
        require(self.reassembler.pending is bool(self.reassembling), "bytes lost")
        bounded(self.reassembling)


def execute(operations: Input) -> None:
    """Run one input. Raises whatever should not have been raised."""
    if not operations:
        return
    target = Target(operations[0].payload)
    for operation in operations[1:]:
        target.run(operation)


# --- coverage ------------------------------------------------------------------------------------------------------


class Coverage:
    """Pairs of lines that followed each other in the package."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()

    def trace(self, operations: Input) -> bool:
        """Run ``operations`` and say whether they reached anything new."""
        known = len(self.seen)
        sys.settrace(self._call)
        try:
            execute(operations)
        finally:
            sys.settrace(None)
        return len(self.seen) > known

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if not name.startswith(TRACED_DIRECTORY):
            return None
        previous, seen = 0, self.seen

        def line(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            nonlocal previous
            seen.add((name, previous, frame.f_lineno))
            previous = frame.f_lineno
            return line

        return line


# --- the loop ------------------------------------------------------------------------------------------------------


def fails(operations: Input) -> bool:
    try:
        execute(operations)
    except Exception:
        return True
    return False


def minimise(operations: Input) -> Input:
    """Leave out operations as long as the failure stays."""
    size = len(operations) // 2
    while size:
        start = 1
        while start < len(operations):
            shorter = operations[:start] + operations[start + size :]
            if fails(shorter):
                operations = shorter
            else:
                start += size
        size //= 2
    return operations


def report(operations: Input) -> None:
    print("FAILED; the shortest input found:")
    print(encode(minimise(operations)))
    traceback.print_exc(file=sys.stdout)


def fuzz(seconds: float, seed: int) -> int:
    rng = random.Random(seed)
    generator, coverage = Generator(rng), Coverage()
    corpus: list[Input] = [generator.fresh()]
    executions = operations_run = 0
    start = last = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        if now - last >= 30:
            last = now
            rate = executions / (now - start)
            print(
                f"{now - start:6.0f} s  {executions} executions  {rate:.0f}/s  "
                f"corpus {len(corpus)}  line pairs {len(coverage.seen)}",
                flush=True,
            )
        if rng.random() < 0.4:
            candidate = generator.fresh()
        else:
            candidate = generator.child(rng.choice(corpus), rng.choice(corpus))
        try:
            if executions % TRACE_ONE_IN == 0:
                if coverage.trace(candidate):
                    corpus.append(candidate)
            else:
                execute(candidate)
        except Exception:
            report(candidate)
            return 1
        executions += 1
        operations_run += len(candidate)
    elapsed = time.monotonic() - start
    print(
        f"OK: {executions} executions ({operations_run} operations) in {elapsed:.0f} s, "
        f"{executions / elapsed:.0f} executions/s, seed {seed}, corpus {len(corpus)}, "
        f"line pairs {len(coverage.seen)}"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz ktls.protocol and ktls.record.aead.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reproduce", metavar="HEX", help="run one input that failed")
    arguments = parser.parse_args()
    if arguments.reproduce is None:
        return fuzz(arguments.seconds, arguments.seed)
    execute(decode(arguments.reproduce))
    print("OK: this input does not fail")
    return 0


if __name__ == "__main__":
    sys.exit(main())
