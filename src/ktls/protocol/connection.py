"""``KernelConnection``: the rules of TLS after the handshake, without I/O.

Theory of operation
-------------------
After the hand-off somebody else (the kernel, or a record layer in user space) opens and seals records. What it can't do is *understand* those
that are not application data. Each such record comes here as an ``InboundPlainMessage``; what follows from it goes back as an
ordered sequence of ``ConnectionState`` items: facts for the application, and commands for whoever runs the record layer.

The order of the items is the protocol. A KeyUpdate is the last record under the old key, in both directions: the peer's KeyUpdate
gives ``UpdateRxKey`` before anything more may be read; ours is a ``SendMessage`` that still goes out under the old key, then
``UpdateTxKey``. The trap is in between: if the send blocks, the command must wait, not be lost, not be repeated. So the secrets
move on *here*, at once and completely, and the items are the list of what is still to be done in the outside world.
The caller may queue it, but may neither drop nor reorder it. ``tx_key_installed`` (and ``rx_key_installed``) tell when the outside has caught up.

A call either raises, and then the connection has failed (``LocalProtocolError`` excepted: nothing happened), or returns a complete sequence.

What this module does not do: no I/O, no clock (``now`` is an argument, in seconds, of any monotonic origin), no locks,
no counting of records (the caller reports the counts with ``record_usage``), no check of certificates, no handshake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, final

from .enums import (
    AlertDescription,
    AlertLevel,
    ContentType,
    Direction,
    HandshakeType,
    KeyChangeCause,
    KeyUpdateRequest,
    ProtocolVersion,
    Role,
)
from .errors import AlertReceived, KTLSError, LocalProtocolError, RemoteProtocolError
from .half import Half
from .key_schedule import TrafficSecret
from .limits import FloodBudget, KeyLimits
from .messages import (
    HandshakeMessage,
    HandshakeReassembler,
    build_alert,
    build_key_update,
    check_new_session_ticket,
    parse_alert,
    parse_key_update,
)
from .states import (
    HANDSHAKE_RULES,
    RX_TRANSITIONS,
    TX_TRANSITIONS,
    ApplicationData,
    Closed,
    ConnectionState,
    HalfState,
    HandshakeRule,
    InboundPlainMessage,
    PeerClosed,
    RxEvent,
    SendMessage,
    SessionTicket,
    TxEvent,
    UpdateRxKey,
    UpdateTxKey,
)
from .suites import CipherSuite

__all__ = ("KernelConnection", "KeyLog")

#: Called with (label, secret) for every new traffic secret, labels as in RFC 9850: ``CLIENT_TRAFFIC_SECRET_1``. Must not raise.
KeyLog: TypeAlias = Callable[[str, bytes], None]

#: A sender may not go beyond this epoch (RFC 9846 §4.7.3).
_MAX_GENERATION: Final = 2**48 - 1
#: Requests to renegotiate that get an answer; further ones are ignored, which RFC 5246 §7.4.1.1 allows, so that answers can't pile up.
_MAX_RENEGOTIATION_ANSWERS: Final = 16
#: Changes of our key that may wait for the record layer, while TCP has no room: another one would be no newer than the last of them.
_MAX_WAITING: Final = 16


@final
class KernelConnection:
    """One TLS connection after its handshake.

    ``tx_secret`` and ``rx_secret`` are the application traffic secrets as they are at the hand-off; None for TLS 1.2, whose keys never change.
    ``tx_key_can_change`` is False where the sending record layer can't take a second key (a kernel without rekey).

    Not thread-safe: the caller serialises.
    """

    __slots__ = (
        "_answers_left",
        "_budget",
        "_key_log",
        "_owed_generation",
        "_reassembler",
        "_request_outstanding",
        "_rx",
        "_tx",
        "cipher_suite",
        "limits",
        "role",
        "tx_key_can_change",
    )

    def __init__(
        self,
        role: Role,
        cipher_suite: CipherSuite,
        *,
        tx_secret: TrafficSecret | None = None,
        rx_secret: TrafficSecret | None = None,
        limits: KeyLimits | None = None,
        tx_key_can_change: bool = True,
        key_log: KeyLog | None = None,
        now: float = 0.0,
    ) -> None:
        is_tls13 = cipher_suite.version is ProtocolVersion.TLSv1_3
        if (tx_secret is not None) is not is_tls13 or (rx_secret is not None) is not is_tls13:
            raise ValueError("TLS 1.3 needs both traffic secrets, TLS 1.2 has none")
        ours, theirs = ("CLIENT", "SERVER") if role is Role.CLIENT else ("SERVER", "CLIENT")
        self.role = role
        self.cipher_suite = cipher_suite
        self.limits = limits if limits is not None else KeyLimits()
        self.tx_key_can_change = is_tls13 and tx_key_can_change
        self._tx = Half(tx_secret, ours, now)
        self._rx = Half(rx_secret, theirs, now)
        #: Made when there is something to put together: most connections never see a handshake message again.
        self._reassembler: HandshakeReassembler | None = None
        #: Made when there is something to spend: until then it is full anyway.
        self._budget: FloodBudget | None = None
        self._key_log = key_log
        self._owed_generation: int | None = None
        self._request_outstanding = False
        self._answers_left = _MAX_RENEGOTIATION_ANSWERS

    def __repr__(self) -> str:
        return (
            f"<KernelConnection {self.role.value} {self.cipher_suite.name}"
            f" tx={self._tx.state.value}/{self._tx.generation}"
            f" rx={self._rx.state.value}/{self._rx.generation}>"
        )

    # --- what a caller may ask ---------------------------------------------------------------------------------

    @property
    def version(self) -> ProtocolVersion:
        """The protocol version."""
        return self.cipher_suite.version

    @property
    def tx_state(self) -> HalfState:
        """State of the sending direction."""
        return self._tx.state

    @property
    def rx_state(self) -> HalfState:
        """State of the receiving direction."""
        return self._rx.state

    @property
    def tx_generation(self) -> int:
        """Generation of the sending key, once every command given so far has been run."""
        return self._tx.generation

    @property
    def rx_generation(self) -> int:
        """Generation of the receiving key, once every command given so far has been run."""
        return self._rx.generation

    def installed_generation(self, direction: Direction) -> int:
        """Generation of the key that the record layer uses now."""
        return self._half(direction).installed

    def _half(self, direction: Direction) -> Half:
        return self._tx if direction is Direction.TX else self._rx

    @property
    def fragment_pending(self) -> bool:
        """Whether a handshake message has begun and not ended: application data would now be an error."""
        return self._reassembler is not None

    def record_limit(self, direction: Direction) -> int | None:
        """Sequence number at which the current key of ``direction`` is to be replaced, or else its use ends; None: never.

        A receiving key has no end (RFC 9846 §5.5), so there is no limit where nobody could be asked for a new one.
        """
        aead = self.cipher_suite.aead
        if self.tx_key_can_change:
            return self.limits.refresh_at(aead)
        return self.limits.end_at(aead) if direction is Direction.TX else None

    # --- receiving ---------------------------------------------------------------------------------------------

    def process_message(
        self, message: InboundPlainMessage, *, now: float
    ) -> Sequence[ConnectionState]:
        """Take one decrypted record and return what follows from it, in order.

        Raises ``RemoteProtocolError`` (the peer broke the rules; ``.alert`` is to be sent) or ``AlertReceived``; then both directions are FAILED
        and the secrets are dropped. After close_notify everything is ignored (RFC 9846 §6.1). ``LocalProtocolError`` if the connection has
        already failed.
        """
        if self._rx.state is HalfState.FAILED:
            raise LocalProtocolError("the connection has failed")
        if self._rx.state is HalfState.CLOSED:
            return ()
        try:
            return self._dispatch(message, now)
        except KTLSError:
            self.fail()
            raise

    def received_data(self, octets: int) -> None:
        """Note that ``octets`` bytes of application data were received without coming through ``process_message``."""
        if self._budget is not None:
            self._budget.earn(octets)

    def _dispatch(self, message: InboundPlainMessage, now: float) -> Sequence[ConnectionState]:
        content_type, fragment = message.content_type, message.fragment
        if content_type == ContentType.APPLICATION_DATA:
            return self._application_data(fragment, now)
        self._spend(now)
        if content_type == ContentType.ALERT:
            return self._alert(fragment)
        if content_type == ContentType.HANDSHAKE:
            return self._handshake(fragment, now)
        raise RemoteProtocolError(
            f"record of content type {int(content_type)}", AlertDescription.UNEXPECTED_MESSAGE
        )

    def _application_data(self, data: bytes, now: float) -> Sequence[ConnectionState]:
        self._refuse_inside_message("application data")
        if data:
            self.received_data(len(data))
            return (ApplicationData(data),)
        self._spend(now)
        return ()

    def _refuse_inside_message(self, what: str) -> None:
        """RFC 9846 §5.1: the fragments of a handshake message come one after the other, with nothing in between."""
        if self.fragment_pending:
            raise RemoteProtocolError(
                f"{what} inside a handshake message", AlertDescription.UNEXPECTED_MESSAGE
            )

    def _spend(self, now: float) -> None:
        self._budget = self._budget or FloodBudget(now)
        if not self._budget.spend(now):
            raise RemoteProtocolError(
                "too many messages that bring no data", AlertDescription.UNEXPECTED_MESSAGE
            )

    def _alert(self, fragment: bytes) -> Sequence[ConnectionState]:
        if not fragment:  # RFC 9846 §5.4 names the alert
            raise RemoteProtocolError("empty alert record", AlertDescription.UNEXPECTED_MESSAGE)
        alert = parse_alert(fragment)
        is_tls13 = self.version is ProtocolVersion.TLSv1_3
        if alert.description == AlertDescription.CLOSE_NOTIFY:
            self._refuse_inside_message("close_notify")
            return self._peer_closed()
        # TLS 1.3 ignores the level: all but these two are errors (RFC 9846 §6). In TLS 1.2 a warning is one.
        if alert.description == AlertDescription.USER_CANCELED or (
            not is_tls13 and alert.level == AlertLevel.WARNING
        ):
            self._refuse_inside_message("alert")
            return ()
        raise AlertReceived(alert.description)

    def _peer_closed(self) -> Sequence[ConnectionState]:
        self._rx.state = RX_TRANSITIONS[self._rx.state, RxEvent.CLOSE_NOTIFY]
        if self._tx.state is HalfState.CLOSED:
            return (PeerClosed(), Closed())
        if self.version is ProtocolVersion.TLSv1_2:
            # RFC 5246 §7.2.1: answer at once and discard pending writes.
            return (PeerClosed(), *self.close())
        return (PeerClosed(),)

    def _handshake(self, fragment: bytes, now: float) -> Sequence[ConnectionState]:
        if not fragment:
            raise RemoteProtocolError("empty handshake record", AlertDescription.UNEXPECTED_MESSAGE)
        reassembler = self._reassembler or HandshakeReassembler(self._accept)
        messages = reassembler.feed(fragment)
        self._reassembler = reassembler if reassembler.pending else None
        items: list[ConnectionState] = []
        for position, message in enumerate(messages, start=1):
            if position > 1:
                self._spend(now)  # the record has paid for the first
            rule = HANDSHAKE_RULES[self.version, self.role][message.type]
            if rule is HandshakeRule.KEY_UPDATE:
                if position < len(messages) or self.fragment_pending:
                    raise RemoteProtocolError(
                        "KeyUpdate is not the last message of its record",
                        AlertDescription.UNEXPECTED_MESSAGE,
                    )
                items += self._key_update(parse_key_update(message.body), now)
            elif rule is HandshakeRule.SESSION_TICKET:
                check_new_session_ticket(message.body)
                items.append(SessionTicket(message.encode()))
            else:
                items += self._refuse_renegotiation(message)
        return tuple(items)

    def _accept(self, message_type: int) -> HandshakeType:
        """Say which handshake type this is, if it may come now."""
        for known in HANDSHAKE_RULES[self.version, self.role]:
            if known == message_type:
                return known
        raise RemoteProtocolError(
            f"handshake message of type {message_type} after the handshake",
            AlertDescription.UNEXPECTED_MESSAGE,
        )

    def _key_update(self, request: KeyUpdateRequest, now: float) -> Sequence[ConnectionState]:
        self._request_outstanding = False
        update_rx = self._advance_rx(now)
        if request is KeyUpdateRequest.UPDATE_NOT_REQUESTED or self._owed_generation is not None:
            return (update_rx,)
        if self._tx.state is not HalfState.OPEN or self._tx.generation >= _MAX_GENERATION:
            return (update_rx,)  # nothing more will be sent; and RFC 9846 §4.7.3 ignores it then
        if not self.tx_key_can_change:
            # The answer must come before our next application data: there can be no such data any more.
            self._tx.state = TX_TRANSITIONS[self._tx.state, TxEvent.KEY_EXHAUSTED]
            return (update_rx,)
        answer = self._advance_tx(
            KeyUpdateRequest.UPDATE_NOT_REQUESTED, now, KeyChangeCause.PEER_REQUEST
        )
        self._owed_generation = self._tx.generation
        return (update_rx, *answer)

    def _refuse_renegotiation(self, message: HandshakeMessage) -> Sequence[ConnectionState]:
        if message.type is HandshakeType.HELLO_REQUEST and message.body:
            raise RemoteProtocolError("HelloRequest with a body", AlertDescription.DECODE_ERROR)
        if self._answers_left == 0 or self._tx.state is not HalfState.OPEN:
            return ()
        self._answers_left -= 1
        return (SendMessage(ContentType.ALERT, build_alert(AlertDescription.NO_RENEGOTIATION)),)

    # --- sending -----------------------------------------------------------------------------------------------

    def refresh_traffic_keys(
        self,
        request_peer: bool = False,
        *,
        now: float,
        cause: KeyChangeCause = KeyChangeCause.APPLICATION,
    ) -> Sequence[ConnectionState]:
        """Start a new generation of our sending key and, with ``request_peer``, ask the peer for one of its own.

        While an earlier request of ours is unanswered, only our own key changes (RFC 9846 §4.7.3 allows one). While many changes wait to be run, nothing follows.
        Raises ``LocalProtocolError``, connection unchanged: TLS 1.2, our side closed or failed, or a record layer that can't change keys.
        """
        if self.version is not ProtocolVersion.TLSv1_3:
            raise LocalProtocolError("TLS 1.2 has no KeyUpdate")
        if (self._tx.state, TxEvent.KEY_UPDATE) not in TX_TRANSITIONS:
            raise LocalProtocolError(f"the sending side is {self._tx.state.value}")
        if not self._may_advance_tx():
            raise LocalProtocolError("the sending key of this connection can't be changed")
        if request_peer and not self._request_outstanding:
            self._request_outstanding = True
            return self._advance_tx(KeyUpdateRequest.UPDATE_REQUESTED, now, cause)
        if self._tx.generation - self._tx.installed >= _MAX_WAITING:
            return ()
        return self._advance_tx(KeyUpdateRequest.UPDATE_NOT_REQUESTED, now, cause)

    def tx_key_installed(self, generation: int) -> None:
        """Note that the ``UpdateTxKey`` of ``generation`` has been run: its predecessor protects nothing any more."""
        self._tx.installed = generation
        if self._owed_generation is not None and generation >= self._owed_generation:
            self._owed_generation = None

    def rx_key_installed(self, generation: int) -> None:
        """Note that the ``UpdateRxKey`` of ``generation`` has been run."""
        self._rx.installed = generation

    def record_usage(
        self, direction: Direction, sequence_number: int, *, octets: int = 0, now: float
    ) -> Sequence[ConnectionState]:
        """Report how far the key of ``direction`` that is installed has been used; refresh it if it is time.

        ``sequence_number`` is that of the next record, ``octets`` the bytes of application data under this key so far. When the receiving key nears its
        limit the peer is asked for a new one. A sending key that can't be changed makes the sending side EXHAUSTED.
        """
        half = self._half(direction)
        if self._tx.state is not HalfState.OPEN or half.state is not HalfState.OPEN:
            return ()
        if self._tx.generation != self._tx.installed:
            return ()  # an update is under way: the count is that of a key on its way out
        limit = self.record_limit(direction)
        due = (
            (limit is not None and sequence_number >= limit)
            or (self.limits.octets is not None and octets >= self.limits.octets)
            or (self.limits.age is not None and now - half.since >= self.limits.age)
        )
        if not due:
            return ()
        if direction is Direction.TX:
            if self._may_advance_tx():
                return self._advance_tx(
                    KeyUpdateRequest.UPDATE_NOT_REQUESTED, now, KeyChangeCause.LIMIT
                )
            self._tx.state = TX_TRANSITIONS[self._tx.state, TxEvent.KEY_EXHAUSTED]
            return ()
        if self._request_outstanding or not self._may_advance_tx():
            return ()  # receivers do not enforce limits (RFC 9846 §5.5)
        return self.refresh_traffic_keys(request_peer=True, now=now, cause=KeyChangeCause.LIMIT)

    def close(self) -> Sequence[ConnectionState]:
        """Close our sending side with close_notify; nothing follows if it is closed or failed already."""
        if (self._tx.state, TxEvent.CLOSE_NOTIFY) not in TX_TRANSITIONS:
            return ()
        self._tx.state = TX_TRANSITIONS[self._tx.state, TxEvent.CLOSE_NOTIFY]
        send = SendMessage(ContentType.ALERT, build_alert(AlertDescription.CLOSE_NOTIFY))
        return (send, Closed()) if self._rx.state is HalfState.CLOSED else (send,)

    def fail(self) -> None:
        """Mark both directions FAILED and drop the secrets; for errors that a record layer reports."""
        self._tx.state = TX_TRANSITIONS[self._tx.state, TxEvent.FAILURE]
        self._rx.state = RX_TRANSITIONS[self._rx.state, RxEvent.FAILURE]
        self._tx.secret = self._rx.secret = None

    # --- secrets -----------------------------------------------------------------------------------------------

    def _may_advance_tx(self) -> bool:
        return self.tx_key_can_change and self._tx.generation < _MAX_GENERATION

    def _advance_tx(
        self, request: KeyUpdateRequest, now: float, cause: KeyChangeCause
    ) -> Sequence[ConnectionState]:
        secret = self._advance(self._tx, now)
        return (
            SendMessage(ContentType.HANDSHAKE, build_key_update(request)),
            UpdateTxKey(secret.keys(), secret.generation, cause),
        )

    def _advance_rx(self, now: float) -> UpdateRxKey:
        secret = self._advance(self._rx, now)
        return UpdateRxKey(secret.keys(), secret.generation)

    def _advance(self, half: Half, now: float) -> TrafficSecret:
        assert half.secret is not None  # the rules let no KeyUpdate through in TLS 1.2
        half.secret = half.secret.next()
        half.generation = half.secret.generation
        half.since = now
        if self._key_log is not None:
            label = f"{half.label}_TRAFFIC_SECRET_{half.secret.generation}"
            self._key_log(label, half.secret.secret)
        return half.secret
