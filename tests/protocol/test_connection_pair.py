"""Properties that hold for any traffic: cutting does not matter, two ends agree, and no input makes anything but documented errors."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, assert_never

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktls.protocol.enums import ContentType, Direction, ProtocolVersion, Role
from ktls.protocol.errors import AlertReceived, LocalProtocolError, RemoteProtocolError
from ktls.protocol.limits import KeyLimits
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
from ktls.protocol.suites import CipherSuite
from ktls.record.aead import HEADER_LENGTH, RecordProtection

from .helpers import (
    KU,
    KU_REQUEST,
    TLS12,
    TLS13,
    USER_CANCELED,
    connect,
    data,
    handshake,
    pieces,
    receive,
    secret,
    ticket,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktls.protocol.connection import KernelConnection

# The same examples on every run, and nothing written to disk.
QUIET = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# --- (a) cutting does not matter -----------------------------------------------------------------------------------

TICKETS = st.builds(
    ticket,
    st.binary(min_size=1, max_size=40),
    st.binary(max_size=3),
    st.sampled_from([b"", b"\x0a\x0a\x00\x00", b"\x00\x2a\x00\x04\x00\x00\x40\x00"]),
)
#: Messages that may follow each other in one record: any number of tickets, and a KeyUpdate only at the end.
GROUPS = st.tuples(st.lists(TICKETS, max_size=4), st.sampled_from([b"", KU, KU_REQUEST])).map(
    lambda group: [*group[0], *([group[1]] if group[1] else [])]
)


@QUIET
@given(st.lists(st.one_of(GROUPS, st.binary(max_size=5)), max_size=6), st.data())
def test_any_split_or_join_gives_the_same_items(
    sequence: list[list[bytes] | bytes], draw: st.DataObject
) -> None:
    one_by_one, cut_anyhow = connect(), connect()
    expected: list[ConnectionState] = []
    items: list[ConnectionState] = []
    for step in sequence:
        if isinstance(step, bytes):
            expected += receive(one_by_one, data(step))
            items += receive(cut_anyhow, data(step))
            continue
        joined = b"".join(step)
        for whole in step:
            expected += receive(one_by_one, handshake(whole))
        cuts = draw.draw(st.sets(st.integers(1, max(1, len(joined) - 1)), max_size=len(joined)))
        for fragment in pieces(joined, *cuts):
            if fragment:
                items += receive(cut_anyhow, handshake(fragment))
        assert not cut_anyhow.fragment_pending
    assert items == expected
    assert cut_anyhow.tx_generation == one_by_one.tx_generation
    assert cut_anyhow.rx_generation == one_by_one.rx_generation


# --- (b) two ends agree --------------------------------------------------------------------------------------------


class End:
    """One end: a connection, its two keys at work, the commands that wait, and the records on their way to the other end."""

    def __init__(self, role: Role, suite: CipherSuite, limits: KeyLimits) -> None:
        ours, theirs = (b"c", b"s") if role is Role.CLIENT else (b"s", b"c")
        self.conn = connect(role, suite, limits=limits)
        self.tx = RecordProtection(suite, secret(suite, ours).keys())
        self.rx = RecordProtection(suite, secret(suite, theirs).keys())
        self.queue: deque[SendMessage | UpdateTxKey] = deque()
        self.wire: deque[bytes] = deque()
        self.installed = self.opened = 0
        self.sent, self.received = bytearray(), bytearray()
        self.tickets_sent: list[bytes] = []
        self.tickets_received: list[bytes] = []
        self.peer_closed = self.closed = 0
        self.request_outstanding = False

    @property
    def may_send(self) -> bool:
        return self.conn.tx_state is HalfState.OPEN

    def take(self, items: Sequence[ConnectionState]) -> None:
        """What a driver does with items: receiving keys at once, everything that is sent in its turn."""
        for item in items:
            match item:
                case ApplicationData(received):
                    self.received += received
                case PeerClosed():
                    self.peer_closed += 1
                case Closed():
                    self.closed += 1
                case SendMessage(fragment=fragment):
                    if fragment == KU_REQUEST:
                        assert not self.request_outstanding, "a second request before the answer"
                        self.request_outstanding = True
                    self.queue.append(item)
                case UpdateTxKey():
                    self.queue.append(item)
                case UpdateRxKey(keys, generation):
                    assert generation == self.opened + 1
                    self.opened = generation
                    self.conn.rx_key_installed(generation)
                    self.rx = RecordProtection(self.rx.suite, keys)
                    self.request_outstanding = False
                case SessionTicket(ticket_message):
                    self.tickets_received.append(ticket_message)
                case _:
                    assert_never(item)

    def run(self, count: int, cuts: Sequence[int]) -> None:
        """Run up to ``count`` commands. Handshake messages that follow each other are joined, then cut at ``cuts``."""
        for _ in range(count):
            if not self.queue:
                return
            command = self.queue.popleft()
            if isinstance(command, UpdateTxKey):
                assert command.generation == self.installed + 1
                self.installed = command.generation
                self.tx = RecordProtection(self.tx.suite, command.keys)
                self.conn.tx_key_installed(command.generation)
                continue
            fragment = command.fragment
            if command.content_type is not ContentType.HANDSHAKE:
                self.wire.append(self.tx.seal(command.content_type, fragment, len(cuts)))
                continue
            while self.queue:
                following = self.queue[0]
                if isinstance(following, UpdateTxKey):
                    break
                if following.content_type is not ContentType.HANDSHAKE:
                    break
                fragment += following.fragment
                self.queue.popleft()
            places = {cut % len(fragment) for cut in cuts} - {0}
            self.wire.extend(self.tx.seal(22, piece) for piece in pieces(fragment, *places))

    def read(self, peer: End, count: int, now: float) -> None:
        """Open up to ``count`` records that ``peer`` has sent."""
        for _ in range(count):
            if not peer.wire:
                return
            record = peer.wire.popleft()
            opened = self.rx.open(record[:HEADER_LENGTH], record[HEADER_LENGTH:])
            self.take(self.conn.process_message(opened, now=now))


#: Changes of a key that wait to be run; what is asked for beyond them follows only if it asks the peer as well.
MOST_WAITING = 16
SIDES = st.sampled_from([0, 1])
COUNTS = st.integers(1, 20)
CUTS = st.lists(st.integers(1, 300), max_size=6)


class ConnectionPair(RuleBasedStateMachine):
    """A client and a server, back to back, with a wire that delivers late and a queue that blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ends = [End(Role.CLIENT, TLS13, KeyLimits()), End(Role.SERVER, TLS13, KeyLimits())]

    @initialize(
        suite=st.sampled_from([s for s in CipherSuite if s.version is ProtocolVersion.TLSv1_3]),
        records=st.sampled_from([None, 3, 10]),
    )
    def hand_off(self, suite: CipherSuite, records: int | None) -> None:
        limits = KeyLimits(records=records)
        self.ends = [End(Role.CLIENT, suite, limits), End(Role.SERVER, suite, limits)]

    @rule(side=SIDES, sent=st.binary(max_size=30))
    def send_data(self, side: int, sent: bytes) -> None:
        end = self.ends[side]
        if end.may_send:
            end.sent += sent
            end.queue.append(SendMessage(ContentType.APPLICATION_DATA, sent))

    @rule(tickets=st.lists(TICKETS, min_size=1, max_size=3))
    def send_tickets(self, tickets: list[bytes]) -> None:
        server = self.ends[1]
        if server.may_send:
            server.tickets_sent += tickets
            server.queue.extend(SendMessage(ContentType.HANDSHAKE, one) for one in tickets)

    @rule(side=SIDES)
    def send_user_canceled(self, side: int) -> None:
        if self.ends[side].may_send:
            self.ends[side].queue.append(SendMessage(ContentType.ALERT, USER_CANCELED))

    @rule(side=SIDES, request_peer=st.booleans())
    def refresh(self, side: int, request_peer: bool) -> None:
        end = self.ends[side]
        generation = end.conn.tx_generation
        if end.may_send:
            items = end.conn.refresh_traffic_keys(request_peer, now=self.now)
            must_ask = request_peer and not end.request_outstanding
            if generation - end.installed >= MOST_WAITING and not must_ask:
                assert items == ()
                assert end.conn.tx_generation == generation
                return
            assert (items[0] == SendMessage(ContentType.HANDSHAKE, KU_REQUEST)) is must_ask
            end.take(items)
            assert end.conn.tx_generation == generation + 1
        else:
            with pytest.raises(LocalProtocolError):
                end.conn.refresh_traffic_keys(request_peer, now=self.now)
            assert end.conn.tx_generation == generation

    @rule(request_peer=st.booleans())
    def refresh_on_both_sides_at_once(self, request_peer: bool) -> None:
        self.refresh(0, request_peer)
        self.refresh(1, request_peer)

    @rule(side=SIDES)
    def meter(self, side: int) -> None:
        end = self.ends[side]
        for direction, protection in ((Direction.TX, end.tx), (Direction.RX, end.rx)):
            end.take(end.conn.record_usage(direction, protection.sequence_number, now=self.now))

    @rule(side=SIDES, count=COUNTS, cuts=CUTS)
    def run_commands(self, side: int, count: int, cuts: list[int]) -> None:
        self.ends[side].run(count, cuts)

    @rule(side=SIDES, count=COUNTS)
    def deliver(self, side: int, count: int) -> None:
        self.ends[side].read(self.ends[1 - side], count, self.now)

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.now > 200)  # not too early, or nothing else happens
    @rule(side=SIDES)
    def close(self, side: int) -> None:
        self.ends[side].take(self.ends[side].conn.close())

    @rule()
    def drain(self) -> None:
        """Run and deliver until nothing moves any more; then both ends know the same."""
        while any(end.queue or end.wire for end in self.ends):
            for side in (0, 1):
                self.ends[side].run(1000, [])
                self.ends[1 - side].read(self.ends[side], 1000, self.now)
        for ours, theirs in (self.ends, self.ends[::-1]):
            assert ours.conn.tx_generation == theirs.conn.rx_generation
            assert ours.installed == theirs.opened == ours.conn.tx_generation
            assert ours.tx.sequence_number == theirs.rx.sequence_number
            assert ours.sent == theirs.received
            assert ours.tickets_sent == theirs.tickets_received
            assert not ours.conn.fragment_pending
            assert ours.peer_closed == (theirs.conn.tx_state is HalfState.CLOSED)
            assert ours.request_outstanding <= (not theirs.may_send)
        both_closed = all(end.conn.tx_state is HalfState.CLOSED for end in self.ends)
        assert [end.closed for end in self.ends] == [both_closed, both_closed]

    @invariant()
    def nothing_has_failed_and_nothing_is_reordered(self) -> None:
        for ours, theirs in (self.ends, self.ends[::-1]):
            assert ours.conn.tx_state in (HalfState.OPEN, HalfState.CLOSED)
            assert ours.conn.rx_state in (HalfState.OPEN, HalfState.CLOSED)
            assert ours.conn.rx_generation == ours.opened
            # A KeyUpdate may have arrived whose key its sender has yet to install.
            assert ours.opened - 1 <= theirs.installed <= theirs.conn.tx_generation
            assert ours.sent.startswith(theirs.received)
            assert ours.tickets_sent[: len(theirs.tickets_received)] == theirs.tickets_received
            assert ours.closed <= (
                ours.conn.tx_state is HalfState.CLOSED and ours.conn.rx_state is HalfState.CLOSED
            )

    def teardown(self) -> None:
        self.drain()


TestConnectionPair = ConnectionPair.TestCase
TestConnectionPair.settings = settings(QUIET, max_examples=60, stateful_step_count=60)


# --- (c) nothing but documented errors -----------------------------------------------------------------------------

FRAGMENTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", KU, KU_REQUEST, KU[:3], KU[3:], ticket(), ticket()[:9], USER_CANCELED]),
    st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x01\x64", b"\x02\x28", bytes(4), b"\x01\0\0\1x"]),
    TICKETS,
)
RECORDS = st.builds(
    InboundPlainMessage,
    st.one_of(st.sampled_from(ContentType), st.sampled_from([21, 22]), st.integers(0, 255)),
    FRAGMENTS,
)


@settings(QUIET, max_examples=400)
@given(st.sampled_from(Role), st.sampled_from([TLS13, TLS12]), st.booleans(), st.lists(RECORDS))
def test_nothing_but_documented_errors_escapes(
    role: Role, suite: CipherSuite, tx_key_can_change: bool, records: list[InboundPlainMessage]
) -> None:
    conn = connect(role, suite, tx_key_can_change=tx_key_can_change)
    for record in records:
        generations = (conn.tx_generation, conn.rx_generation)
        try:
            items = conn.process_message(record, now=0.0)
        except (RemoteProtocolError, AlertReceived):
            assert (conn.tx_generation, conn.rx_generation) == generations
            assert_dead(conn, records)
            return
        assert conn.rx_state is not HalfState.FAILED
        updates = [type(item) for item in items if isinstance(item, UpdateRxKey | UpdateTxKey)]
        assert (conn.tx_generation, conn.rx_generation) == (
            generations[0] + updates.count(UpdateTxKey),
            generations[1] + updates.count(UpdateRxKey),
        )


def assert_dead(conn: KernelConnection, records: list[InboundPlainMessage]) -> None:
    """Every call on a failed connection behaves as documented."""
    assert conn.tx_state is conn.rx_state is HalfState.FAILED
    for record in records:
        with pytest.raises(LocalProtocolError):
            conn.process_message(record, now=0.0)
    with pytest.raises(LocalProtocolError):
        conn.refresh_traffic_keys(True, now=0.0)
    assert conn.close() == ()
    for direction in Direction:
        assert conn.record_usage(direction, 2**50, now=1e9) == ()
    conn.tx_key_installed(7)
    conn.received_data(1)
    assert conn.tx_state is conn.rx_state is HalfState.FAILED


# --- ciphertext ----------------------------------------------------------------------------------------------------


@settings(QUIET, max_examples=300)
@given(st.sampled_from(CipherSuite), st.binary(max_size=60), st.integers(0, 40), st.data())
def test_a_record_that_was_touched_can_not_be_opened(
    suite: CipherSuite, fragment: bytes, padding: int, draw: st.DataObject
) -> None:
    keys = secret(TLS13, b"c").keys()
    size, iv = suite.aead.key_length, suite.aead.fixed_iv_length
    is_tls13 = suite.version is ProtocolVersion.TLSv1_3
    keys = type(keys)((keys.key * 2)[:size], keys.iv if is_tls13 else keys.iv[:iv])
    record = RecordProtection(suite, keys).seal(23, fragment, padding)
    opener = RecordProtection(suite, keys)
    # The length in the header of TLS 1.2 is not authenticated by itself: what is opened is as long as it is.
    places = [*range(3 if not is_tls13 else 5), *range(5, len(record))]
    place = draw.draw(st.sampled_from(places))
    touched = bytearray(record)
    touched[place] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        opener.open(bytes(touched[:5]), bytes(touched[5:]))
    with pytest.raises(RemoteProtocolError):
        opener.open(record[:5], record[5 : draw.draw(st.integers(5, len(record) - 1))])
    assert opener.sequence_number == 0
    assert opener.open(record[:5], record[5:]) == data(fragment)
    assert opener.sequence_number == 1
