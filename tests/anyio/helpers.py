"""Streams on every backend of anyio, with peers that are blocking sockets in threads."""

from __future__ import annotations

import functools
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
from anyio.abc import SocketAttribute

from ktls.anyio import KTLSAttribute, KTLSListener, KTLSStream
from ktls.testing import halve_send_buffer

from ..sockets.helpers import PATIENCE, Case, Net, matrix, read_all
from ..support import HOST, TLS13, has_rekey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from concurrent.futures import Future

    import ktls

_T = TypeVar("_T")

BACKENDS: Final = ("asyncio", "uvloop", "trio")
KTLS_PEER: Final = Case(peer="ktls")


@dataclass(frozen=True)
class Backend:
    """An event loop for one test."""

    name: str

    def run(self, main: Callable[..., Awaitable[_T]], *args: Any) -> _T:
        """Run ``main`` to its end, which must come."""

        async def bounded() -> _T:
            with anyio.fail_after(PATIENCE):
                return await main(*args)

        if self.name == "trio":
            return anyio.run(bounded, backend="trio")
        options = {"use_uvloop": self.name == "uvloop"}
        return anyio.run(bounded, backend="asyncio", backend_options=options)


@dataclass
class Link:
    """Both ends of a connection; ``theirs`` blocks, and is for threads."""

    ours: KTLSStream
    theirs: Any


async def result(future: Future[_T]) -> _T:
    """Wait for a thread."""
    return await anyio.to_thread.run_sync(future.result, abandon_on_cancel=True)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for ``condition``; the test's own deadline ends it."""
    while not condition():
        await anyio.sleep(0.002)


async def connect(
    net: Net,
    case: Case | None = None,
    *,
    buffers: int | None = None,
    settings: ktls.Settings | None = None,
    standard_compatible: bool = True,
    changing_peer: bool = False,
) -> Link:
    """Connect and shake hands. ``changing_peer``: the peer, a ``KTLSSocket``, can change its keys, whatever this kernel can."""
    case = case or Case()
    context = net.context("ktls", case.role, case.version)
    context.offload = case.offload
    their_role: Any = "server" if case.role == "client" else "client"
    their_context = net.context(case.peer, their_role, case.version)
    if changing_peer and not has_rekey():
        their_context.offload = "userspace"
    client, server = net.tcp(buffers=buffers)
    mine, their = (client, server) if case.role == "client" else (server, client)
    their.settimeout(PATIENCE)
    theirs = net.spawn(
        their_context.wrap_socket,
        their,
        server_side=their_role == "server",
        server_hostname=HOST if their_role == "client" else None,
        suppress_ragged_eofs=False,
    )
    ours = await KTLSStream.wrap(
        mine,
        server_side=case.role == "server",
        hostname=HOST if case.role == "client" else None,
        ssl_context=context,
        standard_compatible=standard_compatible,
        settings=settings,
    )
    return Link(ours, net.keep(await result(theirs)))


async def receive_exactly(stream: KTLSStream, count: int) -> bytes:
    """Receive ``count`` bytes."""
    data = bytearray()
    while len(data) < count:
        data += await stream.receive(min(65536, count - len(data)))
    return bytes(data)


async def receive_all(stream: KTLSStream) -> bytes:
    """Receive until the end."""
    data = bytearray()
    try:
        while True:
            data += await stream.receive()
    except anyio.EndOfStream:
        return bytes(data)


async def fill(stream: KTLSStream, piece: bytes = bytes(16384)) -> int:
    """Send ``piece``, one record, until there is no room left, and give up there; return how many were sent whole."""
    whole = 0

    async def send() -> None:
        nonlocal whole
        while True:
            await stream.send(piece)
            whole += 1

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        while True:
            seen = whole
            await anyio.sleep(0.1)
            if seen == whole:
                break
        group.cancel_scope.cancel()
    halve_send_buffer(stream.extra(SocketAttribute.raw_socket))
    return whole


def generations(stream: KTLSStream) -> tuple[int, int]:
    """How often the keys have changed: sending, receiving."""
    usage = stream.extra(KTLSAttribute.key_usage)
    return usage.tx.generation, usage.rx.generation


def in_task(
    function: Callable[..., Awaitable[Any]], *args: Any
) -> Callable[[], Coroutine[Any, Any, None]]:
    """What ``start_soon`` takes, whatever ``function`` returns."""

    @functools.wraps(function)
    async def task() -> None:
        await function(*args)

    return task


def ended_untruthfully(error: BaseException) -> bool:
    """Whether a blocking peer was told that TCP ended without close_notify."""
    return isinstance(error, ssl.SSLEOFError | ConnectionResetError)


def ending(sock: Any) -> BaseException | None:
    """Receive until the end, and return how that was told: None if in order."""
    try:
        read_all(sock)
    except OSError as error:
        return error
    return None


def changing() -> list[Case]:
    """Cases in which both directions can change keys."""
    cases = matrix(versions=(TLS13,), peers=("ktls",), offloads=("auto",))
    return [
        case
        for case in (*cases, Case(version=TLS13, peer="ktls", offload="userspace"))
        if case.may_refresh
    ]


async def echo(stream: KTLSStream) -> None:
    """Send back everything until the end."""
    async with stream:
        try:
            while True:
                await stream.send(await stream.receive())
        except anyio.EndOfStream:
            pass


def port_of(listener: KTLSListener) -> int:
    """Where it listens."""
    port: int = listener.extra(SocketAttribute.local_port)
    return port
