"""trio's own tests of a stream, run on ours."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import anyio
import pytest
import trio
import trio.testing
from anyio.abc import SocketAttribute
from trio.abc import HalfCloseableStream

import ktls
from ktls.anyio import KTLSStream
from ktls.handshake.handoff import OffloadPolicy

from ..sockets.helpers import Case, Net
from ..support import HOST, TLS13, has_kernel_tls
from .helpers import fill

_T = TypeVar("_T")


@contextmanager
def as_trio_says_it() -> Iterator[None]:
    """Translate anyio's exceptions."""
    try:
        yield
    except anyio.ClosedResourceError as error:
        raise trio.ClosedResourceError from error
    except anyio.BrokenResourceError as error:
        raise trio.BrokenResourceError from error
    except anyio.BusyResourceError as error:
        raise trio.BusyResourceError from error


class TrioStream(HalfCloseableStream):
    """A ``KTLSStream`` with the methods of a stream of trio."""

    def __init__(self, stream: KTLSStream) -> None:
        self.stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with as_trio_says_it():
            await self.stream.send(cast(bytes, data))

    async def wait_send_all_might_not_block(self) -> None:
        with as_trio_says_it(), self.stream._sending:
            self.stream._check_may_send()
            await self.stream._wait_writable()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        with as_trio_says_it():
            try:
                return await self.stream.receive(65536 if max_bytes is None else max_bytes)
            except anyio.EndOfStream:
                return b""

    async def send_eof(self) -> None:
        with as_trio_says_it():
            await self.stream.send_eof()

    async def aclose(self) -> None:
        with as_trio_says_it():
            await self.stream.aclose()


def socket_of(stream: KTLSStream) -> socket.socket:
    """The TCP connection below."""
    return stream.extra(SocketAttribute.raw_socket)


async def in_parallel(
    first: Callable[[], Awaitable[_T]], second: Callable[[], Awaitable[_T]]
) -> tuple[_T, _T]:
    """Both results."""
    results: list[_T] = []

    async def run() -> None:
        results.append(await first())

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        other = await second()
    return results[0], other


def makers(
    net: Net, case: Case
) -> Iterator[Callable[[], Awaitable[tuple[TrioStream, TrioStream]]]]:
    """Make connected streams: with room to send, and without."""
    client_context = net.context("ktls", "client", case.version)
    server_context = net.context("ktls", "server", case.version)
    settings = ktls.Settings(offload=case.offload, shutdown_timeout=5)

    async def connect(buffers: int | None) -> tuple[KTLSStream, KTLSStream]:
        client, server = net.tcp(buffers=buffers)
        return await in_parallel(
            lambda: KTLSStream.wrap(
                client, hostname=HOST, ssl_context=client_context, settings=settings
            ),
            lambda: KTLSStream.wrap(server, ssl_context=server_context, settings=settings),
        )

    async def free() -> tuple[TrioStream, TrioStream]:
        client, server = await connect(None)
        return TrioStream(client), TrioStream(server)

    async def clogged() -> tuple[TrioStream, TrioStream]:
        client, server = await connect(8192)
        for stream in client, server:
            # Much more than the receiver may squeeze together later: that must not make room.
            socket_of(stream).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        await in_parallel(lambda: fill(client), lambda: fill(server))
        return TrioStream(client), TrioStream(server)

    yield free
    yield clogged


#: Without kernel TLS they are the same.
OFFLOADS = pytest.mark.parametrize(
    "offload", ["auto", "userspace"] if has_kernel_tls() else ["auto"]
)


@OFFLOADS
def test_half_closeable_stream(net: Net, offload: OffloadPolicy) -> None:
    """Includes the tests of streams that can't be closed by halves."""
    free, clogged = makers(net, Case(version=TLS13, offload=offload))
    trio.run(trio.testing.check_half_closeable_stream, free, clogged)
