"""``create_connection``, ``create_server``, ``start_tls``, ``connect_accepted_socket`` and ``sendfile``, on any running loop.

Theory of operation
-------------------
Only public calls of the loop are used, so asyncio's loops, uvloop's, and ours (``loops``) are served by the same code. Resolving, connecting and binding remain the loop's own business:
the loop makes a plain connection, or binds a server that does not listen yet, and we take over a duplicate of the descriptor. A descriptor of its own, because the loop closes the one
that it knows; and before a byte is read, because what a transport has read can't be put back.

Where kernel TLS can't be had *by the kind of thing* (a Unix socket, a context of another library, a transport that is no socket), the loop's own TLS is used, and one line in the log
says why. Where only the kernel lacks something the connection is ours, in user space.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeVar

from ktls.handshake.engine import engine_for
from ktls.settings import Settings, settings_of

from .handshake import Handshake
from .server import Server
from .takeover import Untouched, can_take_over, take_over
from .terms import HANDSHAKE_TIMEOUT, Terms
from .transport import KTLSTransport

__all__ = (
    "connect_accepted_socket",
    "create_connection",
    "create_server",
    "make_terms",
    "say_why",
    "shake_hands",
    "start_tls",
    "unfit",
)

_log = logging.getLogger("ktls.aio")

#: In functions with a parameter ``ssl`` the module is out of sight.
_SSLContext: Final = ssl.SSLContext
_SSLSocket: Final = ssl.SSLSocket


def _create_default_context() -> ssl.SSLContext:
    return ssl.create_default_context()


_P = TypeVar("_P", bound=asyncio.BaseProtocol)
_Factory = Callable[[], _P]
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


def unfit(context: ssl.SSLContext | bool, sock: socket.socket | None = None) -> str | None:
    """Return why a connection can't be ours, or None. For the loop's own TLS it may well do."""
    if sock is not None and sock.family not in _INTERNET:
        return "it is not a TCP socket"
    if not isinstance(context, bool):
        try:
            engine_for(context)
        except TypeError as error:
            return str(error)
    return None


def say_why(what: str, reason: str) -> None:
    """Log that the loop's own TLS is used."""
    _log.info("%s uses the event loop's own TLS: %s", what, reason)


def make_terms(
    context: ssl.SSLContext | bool,
    *,
    server_side: bool,
    server_hostname: str | None = None,
    handshake_timeout: float | None = None,
    shutdown_timeout: float | None = None,
    settings: Settings | None = None,
    session: ssl.SSLSession | None = None,
    suppress_ragged_eofs: bool = True,
) -> Terms:
    """Collect what a connection needs to know; ``ValueError`` for timeouts that make no sense, and for True as a server's context."""
    if isinstance(context, bool):
        if server_side:
            raise ValueError("Server side SSL needs a valid SSLContext")
        context = _create_default_context()
        if not server_hostname:
            context.check_hostname = False
    for name, value in (("handshake", handshake_timeout), ("shutdown", shutdown_timeout)):
        if value is not None and value <= 0:
            raise ValueError(f"ssl_{name}_timeout should be a positive number, got {value}")
    settings = settings if settings is not None else settings_of(context)
    return Terms(
        context=context,
        settings=settings,
        server_side=server_side,
        server_hostname=server_hostname,
        session=session,
        handshake_timeout=HANDSHAKE_TIMEOUT if handshake_timeout is None else handshake_timeout,
        shutdown_timeout=settings.shutdown_timeout
        if shutdown_timeout is None
        else shutdown_timeout,
        suppress_ragged_eofs=suppress_ragged_eofs,
    )


async def shake_hands(
    sock: socket.socket,
    protocol: asyncio.BaseProtocol,
    terms: Terms,
    *,
    call_connection_made: bool = True,
    early: bytes = b"",
) -> KTLSTransport:
    """Run a handshake on ``sock``, which is ours from here on; return the transport, or raise what ended it."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[KTLSTransport] = loop.create_future()
    handshake = Handshake(
        loop,
        sock,
        protocol,
        terms,
        waiter=waiter,
        call_connection_made=call_connection_made,
        early=early,
    )
    handshake.start()
    try:
        return await waiter
    except asyncio.CancelledError as error:
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            waiter.result().abort()
        handshake.abort(error)
        raise


async def create_connection(
    protocol_factory: _Factory[_P],
    host: str | None = None,
    port: int | str | None = None,
    *,
    ssl: ssl.SSLContext | bool,
    sock: socket.socket | None = None,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    session: ssl.SSLSession | None = None,
    settings: Settings | None = None,
    suppress_ragged_eofs: bool = True,
    **options: Any,
) -> tuple[asyncio.Transport, _P]:
    """Connect and shake hands; as ``loop.create_connection`` with ``ssl``, whose other ``options`` (``family``, ``local_addr``, ``happy_eyeballs_delay``, ...) are passed on.

    ``session`` resumes one; ``settings`` says what a plain context can't. Without ``suppress_ragged_eofs`` a TCP connection that ends without close_notify ends
    in ``connection_lost(TruncatedError)``.
    """
    loop = asyncio.get_running_loop()
    connect: Any = loop.create_connection
    if (reason := unfit(ssl, sock)) is not None:
        say_why("a connection", reason)
        fallen_back: tuple[asyncio.Transport, _P] = await connect(
            protocol_factory,
            host,
            port,
            ssl=ssl,
            sock=sock,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            **options,
        )
        return fallen_back
    if server_hostname is None:
        if not host:
            raise ValueError("You must set server_hostname when using ssl without a host")
        server_hostname = host
    terms = make_terms(
        ssl,
        server_side=False,
        server_hostname=server_hostname or None,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        settings=settings,
        session=session,
        suppress_ragged_eofs=suppress_ragged_eofs,
    )
    if sock is not None:
        if host is not None or port is not None:
            raise ValueError("host/port and sock can not be specified at the same time")
        _check_stream(sock)
        protocol = protocol_factory()
        return await shake_hands(sock, protocol, terms), protocol
    transport, _ = await connect(Untouched, host, port, **options)
    sock = await take_over(transport)
    try:
        protocol = protocol_factory()
    except BaseException:
        sock.close()
        raise
    return await shake_hands(sock, protocol, terms), protocol


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: Any = None,
    port: int | None = None,
    *,
    ssl: ssl.SSLContext,
    sock: socket.socket | None = None,
    backlog: int = 100,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    settings: Settings | None = None,
    suppress_ragged_eofs: bool = True,
    **options: Any,
) -> asyncio.AbstractServer:
    """Serve TLS; as ``loop.create_server`` with ``ssl``, whose other ``options`` (``family``, ``reuse_port``, ...) are passed on. ``settings`` says what a plain context can't."""
    if not isinstance(ssl, _SSLContext):
        raise TypeError("ssl argument must be an SSLContext")
    loop = asyncio.get_running_loop()
    if (reason := unfit(ssl, sock)) is not None:
        say_why("a server", reason)
        serve: Any = loop.create_server
        server: asyncio.AbstractServer = await serve(
            protocol_factory,
            host,
            port,
            ssl=ssl,
            sock=sock,
            backlog=backlog,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            start_serving=start_serving,
            **options,
        )
        return server
    terms = make_terms(
        ssl,
        server_side=True,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        settings=settings,
        suppress_ragged_eofs=suppress_ragged_eofs,
    )
    sockets = await _listeners(loop, host, port, sock, backlog, options)
    ours = Server(loop, sockets, protocol_factory, terms, backlog)
    if start_serving:
        try:
            await ours.start_serving()
        except BaseException:
            ours.close()
            raise
    return ours


async def _listeners(
    loop: asyncio.AbstractEventLoop,
    host: Any,
    port: int | None,
    sock: socket.socket | None,
    backlog: int,
    options: dict[str, Any],
) -> list[socket.socket]:
    """Return bound sockets that do not listen yet; the loop finds the addresses and binds."""
    if sock is not None:
        if host is not None or port is not None:
            raise ValueError("host/port and sock can not be specified at the same time")
        _check_stream(sock)
        sock.setblocking(False)
        return [sock]
    bind: Any = loop.create_server
    bound = await bind(Untouched, host, port, backlog=backlog, start_serving=False, **options)
    sockets = [
        socket.socket(fileno=os.dup(bound_socket.fileno())) for bound_socket in bound.sockets
    ]
    for listener in sockets:
        listener.setblocking(False)
    bound.close()
    return sockets


async def connect_accepted_socket(
    protocol_factory: _Factory[_P],
    sock: socket.socket,
    *,
    ssl: ssl.SSLContext,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    settings: Settings | None = None,
    suppress_ragged_eofs: bool = True,
) -> tuple[asyncio.Transport, _P]:
    """Be the server of a connection that somebody else has accepted; as ``loop.connect_accepted_socket`` with ``ssl``."""
    if (reason := unfit(ssl, sock)) is not None:
        say_why("an accepted connection", reason)
        accept: Any = asyncio.get_running_loop().connect_accepted_socket
        protocol = protocol_factory()
        transport, _ = await accept(  # uvloop returns another protocol
            lambda: protocol,
            sock,
            ssl=ssl,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
        return transport, protocol
    _check_stream(sock)
    terms = make_terms(
        ssl,
        server_side=True,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        settings=settings,
        suppress_ragged_eofs=suppress_ragged_eofs,
    )
    protocol = protocol_factory()
    return await shake_hands(sock, protocol, terms), protocol


async def start_tls(
    transport: asyncio.BaseTransport,
    protocol: asyncio.BaseProtocol,
    sslcontext: ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    session: ssl.SSLSession | None = None,
    settings: Settings | None = None,
    suppress_ragged_eofs: bool = True,
) -> asyncio.Transport:
    """Go on with TLS on a connection that began in plain text; as ``loop.start_tls``. Return the transport that ``protocol`` is to use from here on.

    What was written to ``transport`` goes out first, in plain text. ``transport`` itself is closed then, its connection goes on.
    On a server, what waits in the ``StreamReader`` of ``protocol`` is taken for the beginning of the handshake, as by asyncio from Python 3.14 on.
    A client's is left there, as by asyncio: it is plain text that anybody may have put in, so look that nothing is left of it before.
    """
    if not isinstance(sslcontext, _SSLContext):
        raise TypeError(
            f"sslcontext is expected to be an instance of ssl.SSLContext, got {sslcontext!r}"
        )
    reason = unfit(sslcontext)
    if reason is None and not can_take_over(transport):
        reason = f"{type(transport).__name__} is not plain TCP"
    if reason is not None:
        say_why("start_tls", reason)
        start: Any = asyncio.get_running_loop().start_tls
        fallen_back: asyncio.Transport = await start(
            transport,
            protocol,
            sslcontext,
            server_side=server_side,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
        return fallen_back
    terms = make_terms(
        sslcontext,
        server_side=server_side,
        server_hostname=server_hostname,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        settings=settings,
        session=session,
        suppress_ragged_eofs=suppress_ragged_eofs,
    )
    sock = await take_over(transport)
    early = _take_early(protocol) if server_side else b""
    return await shake_hands(sock, protocol, terms, call_connection_made=False, early=early)


def _take_early(protocol: asyncio.BaseProtocol) -> bytes:
    """Take what a ``StreamReader`` has read and nobody asked for. A client's is left to it: who could say that TLS is in it."""
    if not isinstance(protocol, asyncio.StreamReaderProtocol):
        return b""
    reader: Any = getattr(protocol, "_stream_reader", None)  # there is no public way
    buffer: bytearray | None = getattr(reader, "_buffer", None)
    if not buffer:
        return b""
    early = bytes(buffer)
    buffer.clear()
    return early


def _check_stream(sock: socket.socket) -> None:
    if isinstance(sock, _SSLSocket):
        raise TypeError("Socket cannot be of type SSLSocket")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A Stream Socket was expected, got {sock!r}")
