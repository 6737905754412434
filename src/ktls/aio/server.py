"""A TLS server on any loop: it accepts by ``add_reader`` on its listening sockets, and shakes hands with each connection on its own.

The sockets are bound by the loop's own ``create_server`` (names, families, options and errors are then exactly its own) and given to us before it listens.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any, Final, final

from .handshake import Handshake
from .terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from .transport import KTLSTransport

__all__ = ("Server",)

#: Errors of ``accept`` that pass when somebody closes something.
_OUT_OF_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
#: Seconds until the next try after one of them. As in asyncio.
_RETRY_DELAY: Final = 1.0


@final
class Server(asyncio.AbstractServer):
    """What ``create_server`` returns; used like ``asyncio.Server``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: list[socket.socket],
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        terms: Terms,
        backlog: int,
    ) -> None:
        self._loop = loop
        self._sockets: list[socket.socket] | None = sockets
        self._factory = protocol_factory
        self._terms = terms
        self._backlog = backlog
        self._serving = False
        self._forever: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._last_name: Any = None
        #: Handshakes under way, and connections.
        self._active: set[Handshake | KTLSTransport] = set()

    def __repr__(self) -> str:
        return f"<ktls.aio.Server sockets={self.sockets!r}>"

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listening sockets; none once it is closed."""
        return tuple(TransportSocket(sock) for sock in self._sockets or ())

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether connections are accepted."""
        return self._serving

    def begin(self) -> None:
        """Begin to accept, unless that was done."""
        if self._serving or self._sockets is None:
            return
        self._serving = True
        for sock in self._sockets:
            sock.listen(self._backlog)
            self._loop.add_reader(sock.fileno(), self._accept, sock)

    async def start_serving(self) -> None:
        """Begin to accept, unless that was done."""
        self.begin()
        await asyncio.sleep(0)

    async def serve_forever(self) -> None:
        """Accept until cancelled, then close."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._sockets is None:
            raise RuntimeError(f"server {self!r} is closed")
        self.begin()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Accept no more. Connections stay; ``wait_closed`` waits for them on the Pythons where asyncio's own server does (3.12 and newer)."""
        sockets, self._sockets = self._sockets, None
        if sockets is None:
            return
        for sock in sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._serving = False
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        self._wake_up()

    def close_clients(self) -> None:
        """Close every connection in order."""
        for active in list(self._active):
            if isinstance(active, Handshake):
                active.abort(_closing())
            else:
                active.close()

    def abort_clients(self) -> None:
        """Cut every connection."""
        for active in list(self._active):
            if isinstance(active, Handshake):
                active.abort(_closing())
            else:
                active.abort()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and, from Python 3.12 on, all of its connections are."""
        if self._sockets is None and (sys.version_info < (3, 12) or not self._active):
            return
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake_up(self) -> None:
        if self._sockets is None and not self._active:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # --- accepting ---------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        """Take what waits, as many as may wait; the loop calls again if there are more."""
        for _ in range(self._backlog):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                self._pause(listener, error)
                return
            self._shake_hands(sock, address)
            if self._sockets is None:  # a protocol factory has closed us
                return

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        self._loop.call_exception_handler(
            {
                "message": "socket.accept() out of system resource",
                "exception": error,
                "socket": TransportSocket(listener),
            }
        )
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(_RETRY_DELAY, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if self._sockets is not None:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _shake_hands(self, sock: socket.socket, address: Any) -> None:
        try:
            protocol = self._factory()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            sock.close()
            self._loop.call_exception_handler(
                {"message": "the protocol factory of a server failed", "exception": error}
            )
            return
        names = address, self._own_name(sock)
        Handshake(self._loop, sock, protocol, self._terms, names=names, server=self).start()

    def _own_name(self, sock: socket.socket) -> Any:
        """Return the address of ``sock``, or None: for most connections the same as for the one before, so one object will do."""
        try:
            name = sock.getsockname()
        except OSError:
            return None
        if name != self._last_name:
            self._last_name = name
        return self._last_name

    def attach(self, connection: Handshake | KTLSTransport) -> None:
        """See ``ServerLike``."""
        self._active.add(connection)

    def detach(self, connection: Handshake | KTLSTransport) -> None:
        """See ``ServerLike``."""
        self._active.discard(connection)
        self._wake_up()


def _closing() -> ConnectionAbortedError:
    return ConnectionAbortedError(errno.ECONNABORTED, "the server closes its connections")
