"""Cancels a task at each of its awaits, one run after the other; and a peer that knows how a connection has ended."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar

from ..sockets.helpers import PATIENCE, Net, Role
from ..support import HOST, TLS13

__all__ = ("BUFFER", "MODES", "CancelAt", "Heard", "Mode", "Peer")

_T = TypeVar("_T")

#: So much do TCP's buffers take, about.
BUFFER: Final = 64 * 1024

#: ``early``: while the task waits. ``late``: what it waits for has happened, but it has not gone on yet.
Mode = Literal["early", "late"]
MODES: Final[tuple[Mode, ...]] = ("early", "late")


class CancelAt(Generic[_T]):
    """Runs a coroutine, and calls ``cancel`` when it waits for the ``position``-th time (from 0). On any loop, asyncio's or trio's."""

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, _T],
        position: int,
        cancel: Callable[[], object],
        mode: Mode = "early",
    ) -> None:
        self._coroutine = coroutine
        self._left = position
        self._cancel = cancel
        self._mode = mode
        #: Whether it came so far.
        self.hit = False
        #: Called each time it waits.
        self.on_wait: Callable[[], object] = lambda: None

    def __await__(self) -> Generator[Any, Any, _T]:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                if error is None:
                    awaited = self._coroutine.send(value)
                else:
                    awaited = self._coroutine.throw(error)
            except StopIteration as stop:
                result: _T = stop.value
                return result
            self._met(awaited)
            value, error = None, None
            try:
                value = yield awaited
            except BaseException as raised:
                error = raised

    def _met(self, awaited: Any) -> None:
        self.on_wait()
        self._left -= 1
        if self._left != -1:
            return
        self.hit = True
        if self._mode == "late" and hasattr(awaited, "add_done_callback"):
            awaited.add_done_callback(lambda _: self._cancel())
        else:
            self._cancel()


@dataclass
class Heard:
    """What the peer got. ``end``: "close_notify", "truncated", "reset", "no handshake", or "none" if nobody came."""

    data: bytearray = field(default_factory=bytearray)
    end: str = "none"


class Peer:
    """The ``ssl`` module in a thread: says ``reply``, then listens to the end; neither, nor a client's handshake, before ``go`` is set.

    A server listens at ``address``; a client is at one end of a connection, of which ``sock`` is the other.
    """

    def __init__(self, net: Net, role: Role, *, reply: bytes = b"", prelude: bytes = b"") -> None:
        self.heard = Heard()
        self.go = threading.Event()
        self.done = threading.Event()
        self._reply = reply
        self._prelude = prelude
        self._context: Any = net.context("stdlib", role, TLS13)
        self._role = role
        self._listener: socket.socket | None = None
        if role == "server":
            self._listener = net.keep(socket.create_server(("127.0.0.1", 0)))
            self._listener.settimeout(PATIENCE)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self.address: tuple[str, int] = self._listener.getsockname()
            self._thread = net.spawn(self._serve, self._listener)
        else:
            self.sock, theirs = net.tcp()
            theirs.settimeout(PATIENCE)
            self._thread = net.spawn(self._talk, theirs)

    def result(self) -> Heard:
        """Wait for the end."""
        self.go.set()
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.result(PATIENCE)
        return self.heard

    def _serve(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            self.done.set()
            return
        sock.settimeout(PATIENCE)
        self._talk(sock)

    def _talk(self, sock: socket.socket) -> None:
        try:
            with sock:
                if self._prelude:
                    self._exchange(sock)
                self._handshake(sock)
        finally:
            self.done.set()

    def _exchange(self, sock: socket.socket) -> None:
        """STARTTLS: each says the prelude in plain text, the client first."""
        if self._role == "client":
            sock.sendall(self._prelude)
        got = b""
        while len(got) < len(self._prelude):
            with suppress(ConnectionResetError):
                if chunk := sock.recv(len(self._prelude) - len(got)):
                    got += chunk
                    continue
            return
        if self._role == "server":
            sock.sendall(self._prelude)

    def _handshake(self, sock: socket.socket) -> None:
        server = self._role == "server"
        if not server:
            self.go.wait(PATIENCE)
        try:
            tls = self._context.wrap_socket(
                sock,
                server_side=server,
                server_hostname=None if server else HOST,
                suppress_ragged_eofs=False,
            )
        except OSError:
            self.heard.end = "no handshake"
            return
        with tls:
            if tls.version() is None:  # reset already: then ``wrap_socket`` does nothing
                self.heard.end = "no handshake"
                return
            self._listen(tls)

    def _listen(self, tls: ssl.SSLSocket) -> None:
        try:
            self.go.wait(PATIENCE)
            if self._reply:
                tls.sendall(self._reply)
            while chunk := tls.recv(65536):
                self.heard.data += chunk
            self.heard.end = "close_notify"
            with suppress(OSError):
                tls.unwrap()
        except ssl.SSLEOFError:
            self.heard.end = "truncated"
        except OSError:
            self.heard.end = "reset"
