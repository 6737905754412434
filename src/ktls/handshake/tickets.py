"""The ticket relay: gives NewSessionTicket messages back to the engine, so that its sessions resume.

Theory of operation
-------------------
Only the engine can turn a ticket into an ``ssl.SSLSession``, but after the hand-off it sees no records any more. So the message is sealed again, as a
record under the key that *the engine* would receive with next, with a counter of our own: to the engine it looks like the first records
after the handshake. It does not matter what happened on the wire in between, as long as the engine's own sequence is consistent.

The engine would hold server_application_traffic_secret_0 for its life, which would undo what a KeyUpdate is for. ``ratchet`` moves it
on: a KeyUpdate(update_requested) is fed, its sealed answer is drawn out by an empty write and thrown away; the engine has then
replaced the secrets of both its directions, as have we (RFC 9846 §7.2).

In TLS 1.2 tickets come inside the handshake: nothing is relayed, the object is only kept so that ``session`` can be asked.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from typing import TYPE_CHECKING, Final, final

from ktls.protocol.enums import AlertDescription, ContentType, KeyUpdateRequest
from ktls.protocol.errors import KTLSError, LocalProtocolError, RemoteProtocolError
from ktls.protocol.messages import build_key_update, parse_alert
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.aead import HEADER_LENGTH, RecordProtection

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.protocol.key_schedule import TrafficSecret

__all__ = ("TicketRelay", "discard_engine")

_HEADER: Final = HEADER_LENGTH
#: Sessions of one connection that a subscriber is told. Servers send two or so; each takes 6 KB for good in Python 3.11, and a peer may send tickets for weeks.
_MAX_ANNOUNCED: Final = 16


def discard_engine(sslobject: ssl.SSLObject) -> None:
    """Say goodbye to an engine that is no longer needed; nothing of it is sent.

    Without the shutdown, OpenSSL 3.0 takes the session for broken: a server forgets it, a client may not resume it.
    """
    with contextlib.suppress(ssl.SSLError, ValueError):
        sslobject.unwrap()


@final
class TicketRelay:
    """The engine of a client after the hand-off, as a maker of sessions. Thread-safe: ``session`` may be asked while a ticket is fed.

    ``rx_secret`` and ``tx_secret`` are the traffic secrets, generation 0, of the receiving and the sending direction; None for TLS 1.2.
    ``sweep`` is called whenever the engine has written secrets to its key log.
    """

    __slots__ = (
        "_announced",
        "_fresh",
        "_incoming",
        "_lock",
        "_on_session",
        "_outgoing",
        "_rx",
        "_rx_secret",
        "_session",
        "_sslobject",
        "_sweep",
        "_tx_secret",
        "tickets",
    )

    def __init__(
        self,
        sslobject: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        *,
        rx_secret: TrafficSecret | None = None,
        tx_secret: TrafficSecret | None = None,
        sweep: Callable[[], None] | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self._sslobject: ssl.SSLObject | None = sslobject
        self._incoming = incoming
        self._outgoing = outgoing
        self._rx_secret = rx_secret
        self._tx_secret = tx_secret
        self._sweep = sweep
        self._rx = None if rx_secret is None else _protection(rx_secret)
        self._session: ssl.SSLSession | None = None
        self._fresh = False
        self._announced = 0
        self._on_session: Callable[[ssl.SSLSession], None] | None = None
        #: How many tickets the engine has taken.
        self.tickets = 0

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<TicketRelay {state}, {self.tickets} tickets>"

    def __del__(self) -> None:
        # Nobody else has this object, so whoever holds the lock is a thread that a fork has left behind, in the middle of using the engine.
        if self._lock.acquire(blocking=False):
            self.close()

    @property
    def closed(self) -> bool:
        """Whether the engine is gone: closed, or it refused a message."""
        return self._sslobject is None

    @property
    def generation(self) -> int:
        """How often the engine's secrets have been moved on."""
        return 0 if self._rx_secret is None else self._rx_secret.generation

    @property
    def session(self) -> ssl.SSLSession | None:
        """The session as it is after the last ticket, or None if there is none.

        The engine is asked only when you ask, and once per ticket: each read leaks some 6 KB in Python 3.11.
        """
        with self._lock:
            if not self._fresh and self._sslobject is not None:
                # Python 3.11 copies a session through a form that has no room for the largest tickets: the one before stays then.
                with contextlib.suppress(ValueError):
                    self._session = self._sslobject.session
                self._fresh = True
            return self._session

    @property
    def has_ticket(self) -> bool:
        """Whether ``session`` can be expected to resume."""
        if self._rx is not None:
            return self.tickets > 0
        session = self.session
        return session is not None and (session.has_ticket or bool(session.id))

    def subscribe(self, on_session: Callable[[ssl.SSLSession], None] | None) -> None:
        """Call ``on_session`` with every session from here on (sixteen of them at most), and at once if there is one already."""
        self._on_session = on_session
        self._announce()

    def _announce(self) -> None:
        on_session = self._on_session
        if on_session is not None and self.has_ticket and self._announced < _MAX_ANNOUNCED:
            session = self.session
            if session is not None:
                self._announced += 1
                on_session(session)

    def feed(self, message: bytes) -> None:
        """Give one whole NewSessionTicket message, its header included, to the engine.

        Raises ``RemoteProtocolError`` with the engine's own alert if it refuses; the relay is then closed. Does nothing once closed.
        """
        with self._lock:
            if self._sslobject is None:
                return
            for start in range(0, len(message), MAX_FRAGMENT):
                self._deliver(message[start : start + MAX_FRAGMENT])
            self.tickets += 1
            self._fresh = False
        self._announce()

    def ratchet(self) -> None:
        """Move the engine's secrets of both directions one generation on. Does nothing in TLS 1.2, or once closed. Never raises."""
        with self._lock:
            if self._sslobject is None or self._rx_secret is None or self._tx_secret is None:
                return
            try:
                self._deliver(build_key_update(KeyUpdateRequest.UPDATE_REQUESTED))
            except RemoteProtocolError:
                return  # the message was ours, not the peer's; the engine is gone now, the connection goes on
            self._sslobject.write(b"")  # draws out the owed KeyUpdate: a new sending key
            self._outgoing.read()
            self._rx_secret = self._rx_secret.next()
            self._tx_secret = self._tx_secret.next()
            self._rx = _protection(self._rx_secret)
            if self._sweep is not None:
                self._sweep()

    def close(self) -> None:
        """Let the engine go. ``session`` stays what it was, if it was asked before."""
        with self._lock:
            sslobject, self._sslobject = self._sslobject, None
            self._rx = self._rx_secret = self._tx_secret = None
            self._on_session = None
            if sslobject is not None:
                discard_engine(sslobject)

    def _deliver(self, fragment: bytes) -> None:
        if self._rx is None or self._sslobject is None:
            raise LocalProtocolError("TLS 1.2 has no messages after the handshake to relay")
        self._incoming.write(self._rx.seal(ContentType.HANDSHAKE, fragment))
        try:
            self._sslobject.read(1)
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            alert = self._alert()
            self.close()
            raise RemoteProtocolError(
                f"the handshake engine refuses a message: {error.reason}", alert
            ) from error

    def _alert(self) -> AlertDescription:
        """Return the alert that the engine would have sent."""
        record = self._outgoing.read()
        if self._tx_secret is not None and len(record) > _HEADER:
            try:
                # Under each of its keys the engine sends one record at most: this one, or the KeyUpdate that ends the key.
                message = _protection(self._tx_secret).open(record[:_HEADER], record[_HEADER:])
                description = parse_alert(message.fragment).description
            except KTLSError:
                pass
            else:
                if isinstance(description, AlertDescription):
                    return description
        return AlertDescription.DECODE_ERROR


def _protection(secret: TrafficSecret) -> RecordProtection:
    return RecordProtection(secret.suite, secret.keys())
