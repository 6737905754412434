"""The seam to whoever does the handshake: bytes in, bytes out, and secrets at the end.

``HandshakeEngine`` is what a front end drives. The standard ``ssl`` module is the first engine; one over another library registers beside it with
``register_engine``. Which engine is used depends on the context's exact make: foreign contexts (truststore, rustls and pyOpenSSL wrappers)
pretend to be an ``ssl.SSLContext`` and then do something else, so ``isinstance`` proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from . import openssl
from .result import HandshakeResult

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

__all__ = (
    "EngineFactory",
    "HandshakeEngine",
    "engine_for",
    "register_engine",
)


class HandshakeEngine(Protocol):
    """One handshake. Not thread-safe: the caller serialises.

    Loop: ``step``; send all of ``data_to_send``, also when ``step`` raised, for there may be an alert in it; if not complete, receive at most
    ``bytes_needed`` bytes and ``feed`` them, or say ``eof``.
    """

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they came from the network, however many; ``ValueError`` once the handshake is complete."""
        ...

    def step(self) -> bool:
        """Go as far as the bytes fed so far allow; return whether the handshake is complete.

        Raises the engine's own ``ssl.SSLError`` (``SSLCertVerificationError``, ``SSLEOFError``, ...); the handshake has then failed for good.
        """
        ...

    def data_to_send(self) -> bytes:
        """Return the bytes that are to be sent now, once."""
        ...

    def bytes_needed(self) -> int:
        """Return how many bytes may be received without reading past the handshake; 0 if ``step`` is due, or all is done."""
        ...

    def eof(self) -> None:
        """Note that the peer closed the TCP connection; ``step`` will raise ``ssl.SSLEOFError`` if that is too early."""
        ...

    def result(self) -> HandshakeResult:
        """Return the result, once ``step`` has returned True (``ValueError`` before)."""
        ...

    def close(self) -> None:
        """Abandon a handshake that will not be finished. Does nothing after it was completed."""
        ...


class EngineFactory(Protocol):
    """Makes the engine of one connection."""

    def __call__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        keep_session: bool = True,
    ) -> HandshakeEngine:
        """Begin a handshake. With ``keep_session`` a client's result has a ``TicketRelay``."""
        ...


_engines: Final[list[tuple[Callable[[object], bool], EngineFactory]]] = [
    (openssl.accepts, openssl.OpenSSLHandshake)
]


def register_engine(accepts: Callable[[object], bool], factory: EngineFactory) -> None:
    """Use ``factory`` for contexts that ``accepts`` says it knows. The first to accept a context gets it."""
    _engines.append((accepts, factory))


def engine_for(context: object) -> EngineFactory:
    """Return the factory for ``context``; ``TypeError``, with the name of its type, if no engine knows it."""
    for accepts, factory in _engines:
        if accepts(context):
            return factory
    kind = type(context)
    raise TypeError(
        f"no handshake engine for a context of type {kind.__module__}.{kind.__qualname__}: "
        "an ssl.SSLContext, or a subclass that leaves wrap_bio as it is, is needed"
    )
