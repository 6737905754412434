"""From a connected socket to a ``KTLSTransport``: the handshake, on the loop's own events.

The engine is fed exactly what it asks for (``pump``), so the kernel takes over at a record boundary. One object for each handshake; it ends as a transport that the protocol gets in
``connection_made``, or with the socket closed and an error for whoever waits.

What a waiting client is told is what asyncio's own TLS would say: the engine's ``ssl.SSLError``, ``ConnectionResetError`` if the peer went away, ``ConnectionAbortedError`` after the
handshake timeout. On a server nobody waits: network and TLS errors are no news there (debug log), except that a demand for the kernel could not be met.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
import ssl
from typing import TYPE_CHECKING, Any, Protocol, final

from ktls.closing import drop_unread
from ktls.established import Established
from ktls.handshake.engine import HandshakeEngine, engine_for
from ktls.handshake.handoff import Offload, hand_off, prepare
from ktls.protocol.errors import OffloadError
from ktls.pump import HandshakePump

from .reading import AGAIN, shared_by
from .transport import KTLSTransport, Owner

if TYPE_CHECKING:
    from ktls.handshake.result import HandshakeResult

    from .terms import Terms

__all__ = ("Handshake", "ServerLike")

_log = logging.getLogger("ktls.aio")


class ServerLike(Owner, Protocol):
    """Who keeps account of handshakes and connections."""

    def attach(self, connection: Handshake | KTLSTransport) -> None:
        """Note a new one."""
        ...


@final
class Handshake:
    """One handshake. ``waiter`` gets the transport or the error; ``server`` keeps account of it, and then of the transport.

    ``call_connection_made`` is False where the protocol had a connection before (``start_tls``); ``early`` is what came of the handshake meanwhile.
    """

    __slots__ = (
        "_call_connection_made",
        "_early",
        "_engine",
        "_loop",
        "_names",
        "_protocol",
        "_pump",
        "_server",
        "_sock",
        "_terms",
        "_timer",
        "_unavailable",
        "_watching",
        "waiter",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        terms: Terms,
        *,
        names: tuple[Any, Any] | None = None,
        waiter: asyncio.Future[KTLSTransport] | None = None,
        server: ServerLike | None = None,
        call_connection_made: bool = True,
        early: bytes = b"",
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._terms = terms
        self._names = names if names is not None else _names(sock)
        self.waiter = waiter
        self._server = server
        if server is not None:
            server.attach(self)
        self._call_connection_made = call_connection_made
        self._early = early
        self._pump: HandshakePump | None = None
        self._engine: HandshakeEngine | None = None
        self._unavailable: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: "r" or "w" while the loop watches the socket for us.
        self._watching = ""

    def start(self) -> None:
        """Begin. Errors go where all go."""
        terms, sock = self._terms, self._sock
        try:
            sock.setblocking(False)
            # First of all: once the peer has sent FIN it can't be done any more.
            self._unavailable = prepare(sock, terms.settings.offload)
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = terms.session
            cache, key = terms.settings.session_cache, self._cache_key()
            if session is None and cache is not None and key is not None:
                session = cache.take(key)
            self._engine = engine_for(terms.context)(
                terms.context,
                server_side=terms.server_side,
                server_hostname=terms.server_hostname,
                session=session,
                keep_session=terms.settings.keep_session,
            )
            if self._early:
                self._engine.feed(self._early)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail(error)
            return
        self._pump = HandshakePump(sock, self._engine)
        self._timer = self._loop.call_later(terms.handshake_timeout, self._too_late)
        self._go_on()

    def abort(self, error: BaseException) -> None:
        """Give up, with ``error`` for whoever waits. Does nothing once the handshake is complete."""
        if self._pump is not None:
            self._fail(error)

    def _cache_key(self) -> tuple[str, int] | None:
        peer = self._names[0]
        if self._terms.server_side or not self._terms.server_hostname or not peer:
            return None
        return self._terms.server_hostname, int(peer[1])

    def _go_on(self) -> None:
        pump = self._pump
        if pump is None:
            return
        try:
            pump.run()
        except AGAIN:
            self._watch("w" if pump.wants_write else "r")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail(_as_asyncio_says(error))
        else:
            self._complete()

    def _watch(self, what: str) -> None:
        if what == self._watching:
            return
        self._unwatch()
        self._watching = what
        add = self._loop.add_writer if what == "w" else self._loop.add_reader
        add(self._sock.fileno(), self._go_on)

    def _unwatch(self) -> None:
        if self._watching == "r":
            self._loop.remove_reader(self._sock.fileno())
        elif self._watching == "w":
            self._loop.remove_writer(self._sock.fileno())
        self._watching = ""

    def _too_late(self) -> None:
        message = f"SSL handshake is taking longer than {self._terms.handshake_timeout} seconds: aborting the connection"
        self._fail(ConnectionAbortedError(message))

    def _stop(self) -> None:
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pump = None

    # --- the two ends ------------------------------------------------------------------------------------------

    def _complete(self) -> None:
        waiter = self.waiter
        if (
            waiter is not None and waiter.done()
        ):  # nobody waits any more, and the protocol knows nothing
            self._fail(asyncio.CancelledError())
            return
        self._stop()
        engine, self._engine = self._engine, None
        assert engine is not None
        result = engine.result()
        try:
            transport = self._make_transport(result)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail(error)
            return
        try:
            if self._call_connection_made:
                self._protocol.connection_made(transport)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            transport._fatal_error(error, "Fatal error: protocol.connection_made() call failed.")
        if waiter is not None and not waiter.done():
            waiter.set_result(transport)
        transport.start()

    def _make_transport(self, result: HandshakeResult) -> KTLSTransport:
        """Hand off; ``OffloadError``."""
        terms, settings = self._terms, self._terms.settings
        observer = settings.observer
        driver, reason = hand_off(
            self._sock,
            result,
            policy=settings.offload,
            unavailable=self._unavailable,
            limits=settings.key_limits,
            on_key_change=observer.key_changed if observer is not None else None,
            lock=shared_by(self._loop).lock,
        )
        established = Established.of(result, reason)
        cache, key = settings.session_cache, self._cache_key()
        if cache is not None and key is not None and result.tickets is not None:
            result.tickets.subscribe(functools.partial(cache.store, key))
        if observer is not None:
            observer.handshake_completed(
                established.version,
                established.cipher[0],
                established.info.session_reused,
                Offload(driver.tx_layer, driver.rx_layer, reason),
            )
        transport = KTLSTransport(
            self._loop,
            self._sock,
            driver,
            established,
            self._protocol,
            terms,
            names=self._names,
            owner=self._server,
        )
        self._let_go(transport)
        return transport

    def _let_go(self, successor: KTLSTransport | None) -> None:
        server, self._server = self._server, None
        if server is not None:
            if successor is not None:
                server.attach(successor)
            server.detach(self)

    def _fail(self, error: BaseException) -> None:
        self._stop()
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        drop_unread(self._sock)  # it would make TCP take back what we said last, an alert
        self._sock.close()
        if not self._call_connection_made:
            # Whoever had a connection before has lost it.
            lost = error if isinstance(error, Exception) else ConnectionAbortedError("cancelled")
            self._loop.call_soon(self._protocol.connection_lost, lost)
        if self._terms.settings.observer is not None:
            self._terms.settings.observer.handshake_failed(error)
        self._report(error)
        self._let_go(None)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(error)

    def _report(self, error: BaseException) -> None:
        if self.waiter is not None:
            return
        if isinstance(error, OffloadError):
            _log.warning("a connection was refused: %s", error)
        elif isinstance(error, OSError):
            if self._loop.get_debug():
                _log.debug("%r: SSL handshake failed", self, exc_info=error)
        elif not isinstance(error, asyncio.CancelledError):
            self._loop.call_exception_handler(
                {
                    "message": "SSL handshake failed",
                    "exception": error,
                    "protocol": self._protocol,
                }
            )


def _names(sock: socket.socket) -> tuple[Any, Any]:
    names: list[Any] = []
    for ask in (sock.getpeername, sock.getsockname):
        try:
            names.append(ask())
        except OSError:
            names.append(None)
    return names[0], names[1]


def _as_asyncio_says(error: BaseException) -> BaseException:
    if isinstance(error, ssl.SSLEOFError):
        lost = ConnectionResetError(errno.ECONNRESET, "the peer closed during the handshake")
        lost.__cause__ = error
        return lost
    return error
