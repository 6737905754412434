"""Cancels a task at each of its awaits, one run after the other; a peer that knows how a connection has ended; and what both kinds of cancellation's tests share."""

from __future__ import annotations

import gc
import os
import socket
import ssl
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

import pytest

from ktls.testing import pattern

from ..sockets.fixtures import open_sockets
from ..sockets.helpers import PATIENCE, Net, Role
from ..support import HOST, TLS13, Authority, has_kernel_tls

if TYPE_CHECKING:
    from ktls.handshake.handoff import OffloadPolicy

__all__ = (
    "BUFFER",
    "MODES",
    "REPLY",
    "SIZE",
    "WHOLE_PRODUCT",
    "CancelAt",
    "Heard",
    "Mode",
    "Peer",
    "at_every_position",
    "at_every_position_with_a_file",
    "check_beginning",
    "collected_net",
    "policy",
)

_T = TypeVar("_T")

#: All combinations of loops, moments and policies.
WHOLE_PRODUCT: Final = os.environ.get("KTLS_TRUST") == "1"
#: More awaits than anything has.
_MOST: Final = 400
#: What a peer has to say, where it says anything.
REPLY: Final = pattern(300_000)
#: More bytes than TCP takes at once.
SIZE: Final = 1_500_000

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


def check_beginning(heard: Heard, said: bytes | None) -> None:
    """Check what the peer heard of a connection that has said ``said``, or None if nobody waited for it any more."""
    if said is not None:
        assert (bytes(heard.data), heard.end) == (said, "close_notify")
    else:
        assert not heard.data
        assert heard.end != "close_notify", "a clean end of what never was"


def _policies() -> list[OffloadPolicy]:
    if not has_kernel_tls():
        return ["userspace"]
    return ["auto", "userspace"] if WHOLE_PRODUCT else ["auto"]


@pytest.fixture(params=_policies())
def policy(request: pytest.FixtureRequest) -> OffloadPolicy:
    """Where the records are to be protected."""
    policy: OffloadPolicy = request.param
    return policy


@pytest.fixture(name="net")
def collected_net(authority: Authority) -> Iterator[Net]:
    """Makes connections; when the garbage is collected, no socket may be left that was not there before the test."""
    before = open_sockets()
    net = Net(authority)
    yield net
    net.close()
    gc.collect()
    assert open_sockets() <= before, "sockets are left open"


async def at_every_position(attempt: Callable[[int], Awaitable[bool]]) -> int:
    """Call ``attempt`` with 0, 1, 2 …, until it says that there is no such await; return how many there are."""
    for position in range(_MOST):
        if not await attempt(position):
            return position
    raise AssertionError("it never comes to its end")


async def at_every_position_with_a_file(
    attempt: Callable[[int, IO[bytes]], Awaitable[bool]],
) -> int:
    """As ``at_every_position``; each attempt also gets a file of ``SIZE`` bytes, at its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(pattern(SIZE))

        async def rewound(position: int) -> bool:
            file.seek(0)
            return await attempt(position, file)

        return await at_every_position(rewound)
