"""Peers that are slow on purpose: handshakes that never end, readers that never read, drips in place of records. All of it ends by a timeout, and takes little until then."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest

import ktls
import ktls.aio
from ktls.aio import KTLSTransport
from ktls.anyio import create_tcp_listener
from ktls.testing import loopback_pair
from ktls.waiting import for_read

from ..aio.helpers import Keeper, Loop, until
from ..support import HOST, TLS13
from .attacks import TLS13 as SUITE
from .attacks import Attacker
from .victims import blocking, layers_for, transport_on

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..sockets.helpers import Net
    from .victims import Layers

#: Seconds: the timeouts under test.
_SHORT: Final = 0.2
#: Bytes that wait before a protocol is told to pause, unless it says otherwise: those of asyncio's own TLS.
_HIGH_WATER: Final = 512 * 1024
#: KiB of this process, memory of OpenSSL included, that a handshake which has begun may take.
_HALF_OPEN: Final = 64


def client_hello(context: ssl.SSLContext) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    engine = context.wrap_bio(incoming, outgoing, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        engine.do_handshake()
    return outgoing.read()


def anonymous_memory() -> int:
    gc.collect()
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("begin", [0, 1, 100, None], ids="{} bytes".format)
def test_a_server_ends_a_handshake_that_stops(net: Net, loop: Loop, begin: int | None) -> None:
    async def main() -> None:
        made: list[Keeper] = []

        def make() -> Keeper:
            made.append(Keeper())
            return made[-1]

        server = await loop.create_server(
            make,
            "127.0.0.1",
            0,
            ssl=net.context("ktls", "server"),
            ssl_handshake_timeout=_SHORT,
        )
        client = net.keep(socket.create_connection(server.sockets[0].getsockname()))
        client.setblocking(False)
        client.sendall(client_hello(net.context("stdlib", "client"))[:begin])
        await until(lambda: ended(client))
        assert [keeper.diary.events for keeper in made] == [[]]
        server.close()

    loop.run(main)


def ended(client: socket.socket) -> bool:
    """Read what comes; return whether that was all."""
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_an_anyio_listener_ends_a_handshake_that_stops(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        listener = await create_tcp_listener(
            ssl_context=net.context("ktls", "server"),
            local_host="127.0.0.1",
            handshake_timeout=_SHORT,
        )
        address: Any = listener.listener.extra(anyio.abc.SocketAttribute.local_address)

        async def never(stream: Any) -> None:
            raise AssertionError("this handshake can't be complete")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, never)
            client = net.keep(socket.create_connection(address))
            client.setblocking(False)
            client.sendall(client_hello(net.context("stdlib", "client"))[:50])
            with anyio.fail_after(20):
                while not ended(client) or "TimeoutError" not in caplog.text:
                    await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
        await listener.aclose()

    anyio.run(main)


def test_a_blocking_socket_ends_a_handshake_that_drips(net: Net) -> None:
    """A byte now and then does not begin the timeout anew."""
    client, server = net.tcp()
    server.settimeout(_SHORT)
    hello = client_hello(net.context("stdlib", "client"))
    over = threading.Event()

    def drip() -> None:
        for position in range(len(hello) - 1):
            client.sendall(hello[position : position + 1])
            if over.wait(_SHORT / 10):
                return

    dripping = net.spawn(drip)
    with pytest.raises(TimeoutError, match="handshake operation timed out"):
        ktls.wrap_socket(server, net.context("ktls", "server"), server_side=True)
    over.set()
    dripping.result()


def test_half_open_handshakes_take_little(net: Net) -> None:
    """Also after the server has answered, which makes secrets; and when they are gone, so is what they took."""
    count = 200

    async def main() -> tuple[int, int]:
        context = net.context("ktls", "server", TLS13)
        server: Any = await ktls.aio.create_server(
            Keeper, "127.0.0.1", 0, ssl=context, ssl_handshake_timeout=30, backlog=count
        )
        address = server.sockets[0].getsockname()
        hello = client_hello(net.context("stdlib", "client"))

        async def begin(number: int) -> list[socket.socket]:
            clients = [socket.create_connection(address) for _ in range(number)]
            for client in clients:
                client.sendall(hello)
                client.setblocking(False)
            answered: set[socket.socket] = set()
            while len(answered) < number:
                await asyncio.sleep(0.005)
                answered |= {client for client in clients if has_answer(client)}
            return clients

        async def end(clients: list[socket.socket]) -> None:
            for client in clients:
                client.close()
            await until(lambda: not server._active)

        await end(await begin(20))  # pays for caches
        before = anonymous_memory()
        clients = await begin(count)
        taken = anonymous_memory() - before
        await end(clients)
        before = anonymous_memory()  # the allocator may keep what was taken, once
        for _ in range(2):
            await end(await begin(count))
        left = anonymous_memory() - before
        server.close()
        return taken, left

    taken, left = Loop("functions").run(main)
    assert taken / count < _HALF_OPEN
    assert left / (2 * count) < _HALF_OPEN / 8  # nothing, but for what the allocator does


def has_answer(client: socket.socket) -> bool:
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Ends the threads of a test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("layers", layers_for(SUITE))
def test_a_read_timeout_is_kept_while_something_drips(
    net: Net, layers: Layers, over: threading.Event
) -> None:
    """The socket is always readable, and never anything to read comes."""
    with loopback_pair() as (ours, theirs):
        tls = net.keep(blocking(ours, net.context("ktls", "server"), SUITE, layers))
        tls.settimeout(_SHORT)
        attacker = Attacker(SUITE)

        def flood() -> None:
            while layers == "kernel" and not over.is_set():
                theirs.sendall(attacker.data(b""))  # dropped without a word
            record = attacker.data(bytes(16000))
            while not over.is_set():
                for position in range(len(record) - 1):
                    if over.is_set():
                        return
                    theirs.sendall(record[position : position + 1])
                over.wait(20)

        flooding = net.spawn(flood)
        with pytest.raises(TimeoutError, match="read operation timed out"):
            tls.recv(1)
        over.set()
        flooding.result()


def test_a_timeout_is_kept_although_the_socket_is_readable_all_the_time(net: Net) -> None:
    with loopback_pair() as (ours, theirs):
        tls = net.keep(blocking(ours, net.context("ktls", "server"), SUITE, "userspace"))
        theirs.sendall(b"x")
        tls.settimeout(_SHORT)
        tries = 0

        def nothing_yet() -> None:
            nonlocal tries
            tries += 1
            raise BlockingIOError

        with pytest.raises(TimeoutError, match="read operation timed out"):
            tls.perform(nothing_yet, for_read)
        assert tries > 1


@pytest.mark.parametrize("layers", layers_for(SUITE))
def test_a_reader_that_does_not_read(net: Net, loop: Loop, layers: Layers) -> None:
    """Writing pauses at the high-water mark; closing ends with the shutdown timeout, and nothing is left."""

    async def main() -> None:
        ours, _ = net.tcp(buffers=64 * 1024)
        keeper, running = Keeper(), asyncio.get_running_loop()
        transport = transport_on(
            running, ours, net.context("ktls", "server"), SUITE, layers, keeper,
            shutdown_timeout=_SHORT,
        )  # fmt: skip
        piece = bytes(50_000)
        while "pause" not in keeper.diary.events:
            transport.write(piece)
        assert transport.get_write_buffer_size() <= _HIGH_WATER + len(piece)
        transport.close()
        await until(lambda: keeper.diary.lost)
        assert isinstance(keeper.diary.error, TimeoutError)
        assert transport.get_write_buffer_size() == 0

    loop.run(main)


@pytest.mark.parametrize("layers", layers_for(SUITE))
def test_a_reader_that_resets(net: Net, loop: Loop, layers: Layers, tmp_path: Path) -> None:
    """What waited for it, a file included, is told at once."""
    (tmp_path / "big").write_bytes(bytes(8_000_000))

    async def main() -> None:
        ours, theirs = net.tcp(buffers=64 * 1024)
        keeper, running = Keeper(), asyncio.get_running_loop()
        transport: KTLSTransport = transport_on(
            running, ours, net.context("ktls", "server"), SUITE, layers, keeper
        )
        with (tmp_path / "big").open("rb") as file:
            sending = asyncio.ensure_future(ktls.aio.sendfile(transport, file))
            await asyncio.sleep(0.01)
            transport.write(bytes(50_000))
            assert transport.get_write_buffer_size() == 50_000
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            theirs.close()
            with pytest.raises(ConnectionError):
                await sending
        await until(lambda: keeper.diary.lost)
        assert transport.get_write_buffer_size() == 0

    loop.run(main)
