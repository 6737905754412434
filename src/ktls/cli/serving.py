"""One process of ``ktls serve``: accepts, serves, and ends so that nobody's download is lost.

Theory of operation
    We accept ourselves instead of by ``loop.create_server``: the end of a handshake that fails is then ours to see, with the address of the client, and handshakes under
    way can be ended. Each accepted socket goes through ``connect_accepted_socket``, in a task of its own, so that a slow client keeps nobody waiting.

    The end has three steps. ``stop`` once: no connection is accepted any more, handshakes end, idle connections are closed, a connection with
    a request under way is closed after the answer. After ``grace`` seconds, or with ``stop(now=True)``: what is left is aborted, without close_notify.

    Connections that make no progress end by timeouts: of the handshake, of silence between (and within) requests, and, for a client that stops reading,
    TCP_USER_TIMEOUT, which the kernel watches for us without costing a timer per download.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import TYPE_CHECKING, Any, Final, final

from aiohttp import web

from .failure import reason
from .file_app import AccessLog, Request, handler_for, printable

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from aiohttp import StreamReader
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.web_protocol import RequestHandler

    from .metrics import Metrics

__all__ = ("FileServer", "listen")

_BACKLOG: Final = 128
#: Seconds for a handshake, and of silence between or within requests.
_HANDSHAKE_TIMEOUT: Final = 10.0
_IDLE_TIMEOUT: Final = 60.0
#: Milliseconds that a client may leave what was sent unacknowledged, or its window shut.
_STALLED_TIMEOUT: Final = 60_000
#: Seconds for a request's body, which is discarded.
_LINGERING_TIME: Final = 2.0
#: After an abort, connections end at the loop's next turns.
_ABORT_TIMEOUT: Final = 1.0
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_DELAY: Final = 1.0


def listen(family: int, address: Any, *, shared: int = 1) -> list[socket.socket]:
    """Return ``shared`` sockets listening on one address (port 0: any port). Raises ``OSError``.

    The first one is bound alone, so that a port in use is an error even if its owner would share it.
    """
    listeners: list[socket.socket] = []
    try:
        for _ in range(shared):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_TIMEOUT)
            if len(listeners) > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            if shared > 1 and len(listeners) == 1:
                address = listener.getsockname()
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for listener in listeners:  # none before all are bound
            listener.setblocking(False)
            listener.listen(_BACKLOG)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


@final
class FileServer:
    """Serves the files below ``root`` on ``listener``, which it closes, until ``stop``.

    ``log`` is given the access log's lines, ``complain`` those that say why a connection ended early.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        root: str,
        *,
        log: Callable[[str], None],
        complain: Callable[[str], None],
        grace: float = 30.0,
        metrics: Metrics | None = None,
    ) -> None:
        self._listener = listener
        self._context = context
        self._root = root
        self._log = log
        self._say = complain
        self._grace = grace
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop
        self._http: _Connections
        self._handshakes: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._now = asyncio.Event()

    def stop(self, *, now: bool = False) -> None:
        """End ``run``: when all requests under way are answered, or ``now``. To be called in the loop."""
        self._stopping.set()
        if now:
            self._now.set()

    async def run(self) -> None:
        """Serve until ``stop``, then until the connections have ended."""
        self._loop = asyncio.get_running_loop()
        self._http = _Connections(self._root, self._log, self._complain, self._metrics)
        self._loop.add_reader(self._listener, self._accept)
        try:
            await self._stopping.wait()
        finally:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        await self._drain()

    # --- accepting -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_BACKLOG):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS:
                    raise
                self._say(f"cannot accept connections: {reason(error)}\n")
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_ACCEPT_DELAY, self._accept_again)
                return
            sock.setblocking(False)
            task = self._loop.create_task(self._begin(sock, str(address[0])))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    def _accept_again(self) -> None:
        if not self._stopping.is_set():
            self._loop.add_reader(self._listener, self._accept)

    async def _begin(self, sock: socket.socket, peer: str) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._http, sock, ssl=self._context, ssl_handshake_timeout=_HANDSHAKE_TIMEOUT
            )
        except Exception as error:
            self._complain(peer, error)

    # --- the end -------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        await asyncio.sleep(0)  # what was just accepted begins its handshake, which then closes it
        for handshake in self._handshakes:
            handshake.cancel()
        finish = self._loop.create_task(self._http.finish())
        hurry = self._loop.create_task(self._now.wait())
        await asyncio.wait(
            (finish, hurry), timeout=self._grace, return_when=asyncio.FIRST_COMPLETED
        )
        if not finish.done():
            self._now.set()
            self._http.abort()
            await asyncio.wait((finish,), timeout=_ABORT_TIMEOUT)
        for task in (finish, hurry):
            task.cancel()
        await asyncio.gather(finish, hurry, *self._handshakes, return_exceptions=True)

    def _complain(self, peer: str | None, error: BaseException) -> None:
        """Say in one line why a connection ended early."""
        if self._now.is_set():
            return  # because we did that
        what = reason(error) if isinstance(error, OSError) else str(error) or repr(error)
        self._say(f"{peer or '-'}: connection ended: {printable(' '.join(what.split()))}\n")


@final
class _Connections(web.Server):
    """aiohttp's server, with what it knows of connections kept where ``finish`` needs it."""

    def __init__(
        self,
        root: str,
        log: Callable[[str], None],
        complain: Callable[[str | None, BaseException], None],
        metrics: Metrics | None,
    ) -> None:
        super().__init__(
            handler_for(root, complain),
            request_factory=self._request,
            access_log_class=AccessLog,
            access_log=logging.getLogger("ktls.serve"),
            logger=_quiet_logger(complain),
            keepalive_timeout=_IDLE_TIMEOUT,
            lingering_time=_LINGERING_TIME,
            tcp_keepalive=False,  # TCP_USER_TIMEOUT and the idle timeout leave it nothing to do
        )
        self._log = log
        self._complain = complain
        self._metrics = metrics
        self._open: dict[RequestHandler, asyncio.Transport] = {}
        self._none_open = asyncio.Event()
        self._running_loop = asyncio.get_running_loop()

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """See ``web.Server``."""
        super().connection_made(handler, transport)
        self._open[handler] = transport
        access_log = handler.access_logger
        assert isinstance(access_log, AccessLog)
        peer = transport.get_extra_info("peername")
        tls = transport.get_extra_info("ktls")
        access_log.begin(str(peer[0]) if peer else "-", tls, self._log, self._metrics)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """See ``web.Server``."""
        transport = self._open.pop(handler, None)
        super().connection_lost(handler, exc)
        if exc is not None and transport is not None:
            peer = transport.get_extra_info("peername")
            self._complain(str(peer[0]) if peer else None, exc)
        if not self._open:
            self._none_open.set()

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> Request:
        return Request(message, payload, protocol, writer, task, self._running_loop)

    async def finish(self) -> None:
        """Close idle connections now and the others after their answer; return when all have ended."""
        await asyncio.sleep(0)  # requests that came before, begin
        self.pre_shutdown()
        await self.shutdown(None)
        while self._open:
            self._none_open.clear()
            await self._none_open.wait()

    def abort(self) -> None:
        """Cut all connections."""
        for transport in list(self._open.values()):
            transport.abort()


# --- what aiohttp has to say ---------------------------------------------------------------------------------------------


class _OneLine(logging.Handler):
    """aiohttp's complaints, with a traceback each, as ours of one line."""

    def __init__(self, complain: Callable[[str | None, BaseException], None]) -> None:
        super().__init__(logging.WARNING)
        self._complain = complain

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # "Error handling request from %s"
        peer = record.args[0] if isinstance(record.args, tuple) and record.args else None
        self._complain(
            None if peer is None else str(peer), error or RuntimeError(record.getMessage())
        )


def _quiet_logger(complain: Callable[[str | None, BaseException], None]) -> logging.Logger:
    logger = logging.Logger("ktls.serve.aiohttp", logging.WARNING)
    logger.addHandler(_OneLine(complain))
    return logger
