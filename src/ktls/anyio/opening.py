"""From a connected transport to a running record layer: taking the socket over, and the handshake.

Theory of operation
-------------------
anyio has sockets of its own kind, one per backend, and none of them leaves the descriptor alone: asyncio's transport may read from it at any time. So the connection changes hands: the
descriptor is duplicated, the stream closed (which does not disturb TCP as long as there is a duplicate), and what the stream had read by then is taken out of it. On a server that
can be the ClientHello, which may well have come before anybody asked for it.

A cancelled handshake leaves nothing behind: keys are installed in one step without waiting, after its end, and until then there is only a socket, which is closed.
"""

from __future__ import annotations

import functools
import os
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Final, final

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint

from ktls.established import Established, EstablishedFacts
from ktls.handshake.engine import HandshakeEngine, engine_for
from ktls.handshake.handoff import Offload, RecordDriver, hand_off, prepare
from ktls.handshake.result import HandshakeResult
from ktls.handshake.sessions import SessionKey
from ktls.pump import HandshakePump
from ktls.settings import Settings

__all__ = ("Facts", "Opened", "Opening", "take_over")

_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


@final
class Facts(EstablishedFacts):
    """The query methods of ``ssl.SSLObject``, for those who ask a stream for its ``ssl_object``."""

    __slots__ = ("_established", "server_hostname", "server_side")

    def __init__(
        self, established: Established, *, server_side: bool, server_hostname: str | None
    ) -> None:
        self._established = established
        self.server_side = server_side
        self.server_hostname = established.info.server_name if server_side else server_hostname


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """A connection after its handshake."""

    sock: socket.socket
    driver: RecordDriver
    facts: Facts
    established: Established
    peer_address: Any

    @property
    def offload(self) -> Offload:
        """Where its records are protected now."""
        return Offload(self.driver.tx_layer, self.driver.rx_layer, self.established.offload_reason)


async def take_over(transport: SocketStream | socket.socket) -> tuple[socket.socket, bytes]:
    """Take the connection away from ``transport``, which is detached or closed; return it, non-blocking, and what ``transport`` had read already.

    Can't be cancelled. ``TypeError`` if it is no plain socket or stream over one, ``ClosedResourceError`` if it is closed.
    """
    if isinstance(transport, socket.socket):
        sock = socket.socket(
            transport.family, transport.type, transport.proto, fileno=transport.detach()
        )
        sock.setblocking(False)
        return sock, b""
    if not isinstance(transport, SocketStream):
        raise TypeError(
            f"a socket or an anyio.abc.SocketStream is needed, not {type(transport).__name__}"
        )
    with anyio.CancelScope(shield=True):
        await checkpoint()  # what was just sent may still be with the event loop
        try:
            fd = os.dup(transport.extra(SocketAttribute.raw_socket).fileno())
        except (OSError, AttributeError):  # closed; uvloop's transport then has no socket
            raise ClosedResourceError from None
        sock = socket.socket(fileno=fd)
        try:
            sock.setblocking(False)
            early = await _close_and_drain(transport)
        except BaseException:
            sock.close()
            raise
    return sock, early


async def _close_and_drain(stream: SocketStream) -> bytes:
    # Before anyio 4.16 its streams on asyncio send FIN when they are closed, unless the transport below is closing already. There is no public way to it.
    abort = getattr(getattr(stream, "_transport", None), "abort", None)
    if abort is not None:
        abort()
    await stream.aclose()
    taken = b""
    while True:
        try:
            taken += await stream.receive()
        except (ClosedResourceError, BrokenResourceError, EndOfStream):
            return taken


@final
class Opening:
    """One handshake on a socket that ``take_over`` returned. The socket remains the caller's."""

    __slots__ = ("_context", "_hostname", "_server_side", "_settings", "_sock")

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        hostname: str | None,
        settings: Settings,
    ) -> None:
        self._sock = sock
        self._context = context
        self._server_side = server_side
        self._hostname = hostname
        self._settings = settings

    async def run(self, early: bytes) -> Opened:
        """Shake hands, beginning with what was read ``early``.

        Raises the engine's ``ssl.SSLError``, ``OffloadError``, and ``BrokenResourceError`` if the network or the peer ended the connection.
        """
        observer = self._settings.observer
        try:
            opened = await self._run(early)
        except BaseException as error:
            if observer is not None:
                observer.handshake_failed(error)
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                raise
            if isinstance(error, OSError):
                raise BrokenResourceError from error
            raise
        if observer is not None:
            facts = opened.established
            observer.handshake_completed(
                facts.version, facts.cipher[0], facts.info.session_reused, opened.offload
            )
        return opened

    async def _run(self, early: bytes) -> Opened:
        unavailable = prepare(self._sock, self._settings.offload)
        engine = self._engine()
        try:
            if early:
                engine.feed(early)
            await self._shake_hands(HandshakePump(self._sock, engine))
            return self._hand_off(engine.result(), unavailable)
        except BaseException:
            engine.close()
            raise

    async def _shake_hands(self, pump: HandshakePump) -> None:
        while True:
            try:
                pump.run()
                return
            except BlockingIOError:
                pass
            if pump.wants_write:
                await anyio.wait_writable(self._sock)
            else:
                await anyio.wait_readable(self._sock)

    def _engine(self) -> HandshakeEngine:
        cache, key = self._settings.session_cache, self._session_key()
        session = cache.take(key) if cache is not None and key is not None else None
        return engine_for(self._context)(
            self._context,
            server_side=self._server_side,
            server_hostname=self._hostname,
            session=session,
            keep_session=self._settings.keep_session,
        )

    def _hand_off(self, result: HandshakeResult, unavailable: str | None) -> Opened:
        observer = self._settings.observer
        driver, reason = hand_off(
            self._sock,
            result,
            policy=self._settings.offload,
            unavailable=unavailable,
            limits=self._settings.key_limits,
            on_key_change=observer.key_changed if observer is not None else None,
        )
        established = Established.of(result, reason)
        cache, key = self._settings.session_cache, self._session_key()
        if cache is not None and key is not None and result.tickets is not None:
            result.tickets.subscribe(functools.partial(cache.store, key))
        facts = Facts(established, server_side=self._server_side, server_hostname=self._hostname)
        return Opened(self._sock, driver, facts, established, self._sock.getpeername())

    def _session_key(self) -> SessionKey | None:
        if self._server_side or not self._hostname or self._sock.family not in _INTERNET:
            return None
        return self._hostname, int(self._sock.getpeername()[1])
