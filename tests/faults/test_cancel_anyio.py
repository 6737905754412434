"""The scope is cancelled at every await of everything that ``ktls.anyio`` lets one wait for, on trio and asyncio.

What was sent in part only has no clean end; all else goes on as if nothing had happened.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
from anyio.abc import SocketAttribute

import ktls
from ktls.anyio import KTLSStream
from ktls.testing import pattern

from ..anyio.helpers import BACKENDS, Backend, receive_exactly
from ..sockets.helpers import Net
from ..support import HOST, has_rekey
from .cancelling import (
    BUFFER,
    REPLY,
    SIZE,
    WHOLE_PRODUCT,
    CancelAt,
    Heard,
    Peer,
    at_every_position,
    at_every_position_with_a_file,
    check_beginning,
)

if TYPE_CHECKING:
    from ktls.handshake.handoff import OffloadPolicy

LATER: Final = b"later" * 100


@pytest.fixture(params=BACKENDS if WHOLE_PRODUCT else ("asyncio", "trio"))
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)


async def cancelled_at(position: int, body: Callable[[], Any], peer: Peer) -> tuple[bool, Any]:
    """Run ``body`` in a scope that is cancelled at its await ``position``; return whether it came so far, and what it returned."""
    returned = None

    async def let_go() -> None:
        await anyio.sleep(0.003)
        peer.go.set()

    async with anyio.create_task_group() as group:
        group.start_soon(let_go)
        with anyio.CancelScope() as scope:
            steps: CancelAt[Any] = CancelAt(body(), position, scope.cancel)
            returned = await steps
    return steps.hit, returned


async def heard_by(peer: Peer) -> Heard:
    return await anyio.to_thread.run_sync(peer.result)


async def _connect(net: Net, peer: Peer, settings: ktls.Settings) -> KTLSStream:
    return await ktls.anyio.connect_tcp(
        *peer.address,
        ssl_context=net.context("ktls", "client"),
        tls_hostname=HOST,
        settings=settings,
    )


async def _accept(net: Net, peer: Peer, settings: ktls.Settings) -> KTLSStream:
    return await KTLSStream.wrap(
        peer.sock, server_side=True, ssl_context=net.context("ktls", "server"), settings=settings
    )


@pytest.mark.parametrize("beginning", [_connect, _accept])
def test_no_connection_is_left_of_one_that_nobody_waits_for(
    net: Net, backend: Backend, policy: OffloadPolicy, beginning: Any
) -> None:
    settings = ktls.Settings(offload=policy)

    async def attempt(position: int) -> bool:
        peer = Peer(net, "client" if beginning is _accept else "server")
        hit, stream = await cancelled_at(position, lambda: beginning(net, peer, settings), peer)
        if stream is not None:
            await stream.send(LATER)
            await stream.aclose()
        heard = await heard_by(peer)
        check_beginning(heard, None if stream is None else LATER)
        return hit

    assert backend.run(at_every_position, attempt) >= 1


@dataclass
class Work:
    """One connection: what was sent for certain, and what came."""

    stream: KTLSStream
    file: Any
    sent: bytearray = field(default_factory=bytearray)
    #: Whose sending was cancelled: all of it may have gone, or nothing.
    item: bytes = b""
    got: bytearray = field(default_factory=bytearray)


async def _receive(work: Work) -> None:
    while len(work.got) < len(REPLY):
        work.got += await work.stream.receive(50_000)


async def _send(work: Work) -> None:
    for _ in range(2):
        work.item = pattern(SIZE // 2, len(work.sent))
        await work.stream.send(work.item)
        work.sent += work.item
        work.item = b""


async def _sendfile(work: Work) -> None:
    await work.stream.sendfile(work.file)
    work.sent += pattern(SIZE)


async def _refresh(work: Work) -> None:
    if work.stream.extra(ktls.anyio.KTLSAttribute.offload).tx == "userspace" or has_rekey():
        await work.stream.refresh_traffic_keys(request_peer=True)
    await _receive(work)


async def _send_eof(work: Work) -> None:
    await work.stream.send_eof()
    await _receive(work)


async def _close(work: Work) -> None:
    work.item = pattern(1000)
    await work.stream.send(work.item)
    work.sent += work.item
    work.item = b""
    await work.stream.aclose()


BODIES: Final[dict[str, Callable[[Work], Awaitable[None]]]] = {
    function.__name__.removeprefix("_"): function
    for function in (_receive, _send, _sendfile, _refresh, _send_eof, _close)
}
_REPLIES: Final = ("receive", "refresh", "send_eof")


@pytest.mark.parametrize("body", BODIES)
def test_a_stream_after_an_operation_was_cancelled(
    net: Net, backend: Backend, policy: OffloadPolicy, body: str
) -> None:
    settings = ktls.Settings(offload=policy)

    async def attempt(position: int, file: Any) -> bool:
        peer = Peer(net, "server", reply=REPLY if body in _REPLIES else b"")
        stream = await _connect(net, peer, settings)
        sock = stream.extra(SocketAttribute.raw_socket)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        work = Work(stream, file)
        hit, _ = await cancelled_at(position, lambda: BODIES[body](work), peer)
        if body == "sendfile":
            work.sent[:] = pattern(file.tell())  # its position says how much has gone
        if body in _REPLIES:
            work.got += await receive_exactly(stream, len(REPLY) - len(work.got))
            assert bytes(work.got) == REPLY
        more = LATER if await _takes(stream, LATER) else b""
        await stream.aclose()
        heard = await heard_by(peer)
        if more:
            assert heard.end == "close_notify"
        if heard.end == "close_notify":  # which says that everything has come
            sent = bytes(work.sent)
            assert bytes(heard.data) in (sent + more, sent + work.item + more)
        else:
            assert heard.data == pattern(len(heard.data))
        return hit

    assert backend.run(at_every_position_with_a_file, attempt) >= 1


async def _takes(stream: KTLSStream, data: bytes) -> bool:
    """Send ``data``; False if the stream refuses, since it was closed, or an item was sent in part."""
    try:
        await stream.send(data)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        return False
    return True
