"""The protocol room under an input: one connection, and what must hold after each operation."""

from __future__ import annotations

from typing import Final

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

from .protocol_inputs import Input, Operation

SUITES: Final = tuple(CipherSuite)


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
