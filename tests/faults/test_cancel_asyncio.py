"""The task is cancelled at every await of everything that ``ktls.aio`` lets one wait for.

Afterwards nothing is left of it, nothing was said to the loop's exception handler; and the connection, where there was one already, goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import gc
import io
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls
from ktls.testing import pattern

from ..aio.helpers import Loop, turns, until
from ..sockets.helpers import Net
from ..support import HOST, has_rekey
from .cancelling import (
    BUFFER,
    MODES,
    REPLY,
    SIZE,
    WHOLE_PRODUCT,
    CancelAt,
    Mode,
    Peer,
    at_every_position,
    at_every_position_with_a_file,
    check_beginning,
)

if TYPE_CHECKING:
    from ktls.handshake.handoff import OffloadPolicy

PRELUDE: Final = b"STARTTLS\r\n"


def _ways() -> list[tuple[str, Mode]]:
    loops = ("functions", "uvloop-functions")
    if WHOLE_PRODUCT:
        return [(loop, mode) for loop in loops for mode in MODES]
    return list(zip(loops, MODES, strict=True))


@pytest.fixture(params=_ways(), ids="-".join)
def way(request: pytest.FixtureRequest) -> tuple[Loop, Mode]:
    """asyncio's loop and uvloop's, and when the task is cancelled."""
    name, mode = request.param
    return Loop(name), mode


async def cancelled_at(
    position: int, mode: Mode, body: Callable[[], Any], peer: Peer | None = None
) -> tuple[bool, BaseException | None, Any]:
    """Run ``body`` in a task that is cancelled at its await ``position``; return whether it came so far, and what it raised or returned.

    ``peer`` goes on when ``body`` waits for the first time, or has ended: so there is something to wait for.
    """
    task: asyncio.Task[Any]
    steps = CancelAt(body(), position, lambda: task.cancel(), mode)
    if peer is not None:
        steps.on_wait = peer.go.set

    async def run() -> Any:
        try:
            return await steps
        finally:
            steps.on_wait()

    task = asyncio.ensure_future(run())
    await asyncio.wait([task])
    if task.cancelled():
        return steps.hit, asyncio.CancelledError(), None
    error = task.exception()
    return steps.hit, error, None if error is not None else task.result()


# --- becoming a connection ----------------------------------------------------------------------------------------


async def _open(net: Net, peer: Peer, settings: ktls.Settings) -> Any:
    context = net.context("ktls", "client")
    return await ktls.aio.open_connection(
        *peer.address, ssl=context, server_hostname=HOST, settings=settings
    )


async def _accept(net: Net, peer: Peer, settings: ktls.Settings) -> Any:
    context = net.context("ktls", "server")
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await ktls.aio.connect_accepted_socket(
        lambda: protocol, peer.sock, ssl=context, settings=settings
    )
    loop = asyncio.get_running_loop()
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _start_tls(net: Net, peer: Peer, settings: ktls.Settings) -> Any:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    plain, _ = await loop.create_connection(lambda: protocol, *peer.address)
    try:
        writer = asyncio.StreamWriter(plain, protocol, reader, loop)
        writer.write(PRELUDE)
        await writer.drain()
        assert await reader.readexactly(len(PRELUDE)) == PRELUDE
        transport = await ktls.aio.start_tls(
            plain,
            protocol,
            net.context("ktls", "client"),
            server_hostname=HOST,
            settings=settings,
        )
    finally:
        plain.close()
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


BEGINNINGS: Final[dict[str, Any]] = {"open": _open, "accept": _accept, "start_tls": _start_tls}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_no_connection_is_left_of_one_that_nobody_waits_for(
    net: Net, way: tuple[Loop, Mode], policy: OffloadPolicy, beginning: str
) -> None:
    loop, mode = way
    settings = ktls.Settings(offload=policy)

    async def attempt(position: int) -> bool:
        prelude = PRELUDE if beginning == "start_tls" else b""
        peer = Peer(net, "client" if beginning == "accept" else "server", prelude=prelude)
        asyncio.get_running_loop().call_later(0.003, peer.go.set)
        hit, error, streams = await cancelled_at(
            position, mode, lambda: BEGINNINGS[beginning](net, peer, settings)
        )
        if streams is not None:
            writer = streams[1]
            writer.write(b"whole")
            writer.close()
            await writer.wait_closed()
        else:
            assert isinstance(error, asyncio.CancelledError), error
        await turns()
        assert not _open_transports()
        heard = await asyncio.to_thread(peer.result)
        check_beginning(heard, None if streams is None else b"whole")
        return hit

    assert loop.run(lambda: at_every_position(attempt)) >= 1


def _open_transports() -> list[ktls.aio.KTLSTransport]:
    found = [entry for entry in gc.get_objects() if isinstance(entry, ktls.aio.KTLSTransport)]
    return [transport for transport in found if transport._sock.fileno() >= 0]


# --- a connection at work -----------------------------------------------------------------------------------------


@dataclass
class Work:
    """One connection: what was written, and what came."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    peer: Peer
    file: Any
    written: bytearray = field(default_factory=bytearray)
    got: bytearray = field(default_factory=bytearray)

    def write(self, size: int) -> None:
        data = pattern(size, len(self.written))
        self.writer.write(data)
        self.written += data

    async def receive(self, size: int) -> None:
        self.got += await self.reader.readexactly(size)


async def _read(work: Work) -> None:
    await work.receive(100_000)
    await work.receive(1)


async def _drain(work: Work) -> None:
    work.writer.transport.set_write_buffer_limits(1000)
    work.write(SIZE)
    await work.writer.drain()


async def _sendfile(work: Work) -> None:
    await ktls.aio.sendfile(work.writer, work.file)


async def _copy(work: Work) -> None:
    """From what is no file for the kernel."""
    copied = io.BytesIO(pattern(600_000))
    try:
        await ktls.aio.sendfile(work.writer, copied)
    finally:
        work.file = copied


async def _refresh(work: Work) -> None:
    work.write(10)
    if work.writer.get_extra_info("ktls").offload.tx == "userspace" or has_rekey():
        work.writer.get_extra_info("ktls").refresh_traffic_keys(request_peer=True)
    work.write(10)
    await work.writer.drain()
    await work.receive(1000)


async def _half_close(work: Work) -> None:
    work.write(100_000)
    work.writer.write_eof()
    await work.writer.drain()
    await work.receive(len(REPLY))


async def _close(work: Work) -> None:
    work.write(SIZE)
    work.writer.close()
    await work.writer.wait_closed()


BODIES: Final[dict[str, Callable[[Work], Awaitable[None]]]] = {
    function.__name__.removeprefix("_"): function
    for function in (_read, _drain, _sendfile, _copy, _refresh, _half_close, _close)
}
#: Those that have nothing more to say.
CLOSED: Final = ("half_close", "close")


@pytest.mark.parametrize("body", BODIES)
def test_a_connection_goes_on_when_an_operation_is_cancelled(
    net: Net, way: tuple[Loop, Mode], policy: OffloadPolicy, body: str
) -> None:
    loop, mode = way
    settings = ktls.Settings(offload=policy)

    async def attempt(position: int, file: Any) -> bool:
        replies = body in ("read", "refresh", "half_close")
        peer = Peer(net, "server", reply=REPLY if replies else b"")
        reader, writer = await _open(net, peer, settings)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        work = Work(reader, writer, peer, file)
        hit, error, _ = await cancelled_at(position, mode, lambda: BODIES[body](work), peer)
        assert error is None or isinstance(error, asyncio.CancelledError), error
        if body in ("sendfile", "copy"):
            # Its position says how much has gone.
            work.written += pattern(work.file.tell())
        if replies:
            await work.receive(len(REPLY) - len(work.got))
            assert bytes(work.got) == REPLY
        if body not in CLOSED:
            work.write(1000)
        writer.close()
        # Whoever cancels ``wait_closed`` makes it useless, on these streams; but the closing goes on.
        held = writer.transport._sock
        await until(lambda: held.fileno() < 0)
        heard = await asyncio.to_thread(peer.result)
        assert heard.end == "close_notify"
        assert len(heard.data) == len(work.written)
        assert heard.data == work.written
        return hit

    assert loop.run(lambda: at_every_position_with_a_file(attempt)) >= 1
