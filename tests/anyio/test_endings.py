"""How a ``KTLSStream`` ends, on every backend: in order, by the peer's fault, in time."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, wait_all_tasks_blocked

import ktls

from ..sockets.helpers import Case, Net, cut, pattern, read_all, read_exactly, reset, slowly
from ..support import TLS12
from .helpers import (
    KTLS_PEER,
    Backend,
    connect,
    ended_untruthfully,
    ending,
    fill,
    receive_all,
    receive_exactly,
    result,
    until,
)


def test_half_close(net: Net, backend: Backend, layer: Case) -> None:
    async def main() -> None:
        link = await connect(net, layer)
        await link.ours.send(b"question")
        if layer.version is TLS12:
            with pytest.raises(NotImplementedError, match=r"TLSv1\.2"):
                await link.ours.send_eof()
            await link.ours.aclose()
            return
        await link.ours.send_eof()
        assert read_all(link.theirs) == b"question"
        link.theirs.sendall(pattern(100_000))
        assert await receive_exactly(link.ours, 100_000) == pattern(100_000)
        with pytest.raises(ClosedResourceError):
            await link.ours.send(b"more")
        await link.ours.send_eof()
        await link.ours.aclose()

    backend.run(main)


def test_the_peer_closes(net: Net, backend: Backend, layer: Case) -> None:
    def close(sock: Any) -> None:
        sock.sendall(b"last words")
        with suppress(OSError):
            net.keep(sock.unwrap())

    async def main() -> None:
        link = await connect(net, layer)
        closing = net.spawn(close, link.theirs)
        assert await receive_all(link.ours) == b"last words"
        with pytest.raises(EndOfStream):
            await link.ours.receive()
        await link.ours.aclose()
        await result(closing)

    backend.run(main)


@pytest.mark.parametrize("standard_compatible", [True, False])
def test_tcp_ends_without_close_notify(
    net: Net, backend: Backend, layer: Case, standard_compatible: bool
) -> None:
    async def main() -> None:
        link = await connect(net, layer, standard_compatible=standard_compatible)
        link.theirs.sendall(b"all?")
        cut(link.theirs)
        assert await link.ours.receive() == b"all?"
        for _ in range(2):
            if standard_compatible:
                with pytest.raises(BrokenResourceError) as caught:
                    await link.ours.receive()
                assert isinstance(caught.value.__cause__, ktls.TruncatedError)
            else:
                with pytest.raises(EndOfStream):
                    await link.ours.receive()
        await link.ours.aclose()

    backend.run(main)


def test_the_network_fails(net: Net, backend: Backend, layer: Case) -> None:
    async def main() -> None:
        link = await connect(net, layer)
        reset(link.theirs)
        with pytest.raises(BrokenResourceError) as caught:
            await link.ours.receive()
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        with pytest.raises(BrokenResourceError) as caught:
            await link.ours.send(b"into the void")
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        await link.ours.aclose()

    backend.run(main)


def test_an_alert_reaches_who_only_sends(net: Net, backend: Backend) -> None:
    """The peer reads nothing, and says why: then nobody may wait for room for ever."""
    from ktls.protocol.enums import AlertDescription
    from ktls.protocol.messages import build_alert

    async def main() -> None:
        link = await connect(net, KTLS_PEER, buffers=65536)
        async with anyio.create_task_group() as group:

            async def send() -> None:
                with pytest.raises(BrokenResourceError) as caught:
                    await link.ours.send(bytes(20_000_000))
                assert isinstance(caught.value.__cause__, ktls.AlertReceived)

            group.start_soon(send)
            await wait_all_tasks_blocked()
            half = link.theirs._driver.sending
            half.alert(build_alert(AlertDescription.INTERNAL_ERROR))
            half.run_owed()
            net.spawn(ending, link.theirs)
        await link.ours.aclose()

    backend.run(main)


@pytest.mark.parametrize("bad", ["tag", "header"])
def test_a_bad_record_reaches_who_only_sends(net: Net, backend: Backend, bad: str) -> None:
    """Once there is room. The kernel tells of a bad header before: then the descriptor is "ready" for ever, and whoever waits for room must not spin."""
    header = b"\x17\x03\x03\x00\x20" if bad == "tag" else b"\x17\x05\x05\x00\x20"

    async def main() -> None:
        net.context("ktls", "server").offload = "userspace"  # so that it can send anything
        link = await connect(net, KTLS_PEER, buffers=65536)
        async with anyio.create_task_group() as group:

            async def send() -> None:
                with pytest.raises(BrokenResourceError) as caught:
                    await link.ours.send(bytes(20_000_000))
                assert isinstance(caught.value.__cause__, ktls.RemoteProtocolError)

            group.start_soon(send)
            await wait_all_tasks_blocked()
            link.theirs._raw.send(header + bytes(32))
            if bad == "tag" or KTLS_PEER.rx_layer == "userspace":
                net.spawn(read_exactly, link.theirs, 1_000_000)
        with pytest.raises(BrokenResourceError) as caught:
            await link.ours.receive()
        assert isinstance(caught.value.__cause__, ktls.RemoteProtocolError)
        await link.ours.aclose()

    backend.run(main)


def test_close_loses_nothing(net: Net, backend: Backend, layer: Case) -> None:
    data = pattern(400_000)

    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        receiving = net.spawn(slowly, link.theirs)
        await link.ours.send(data)
        await link.ours.aclose()
        assert await result(receiving) == data

    backend.run(main)


def test_close_loses_nothing_when_the_peer_sends_first(
    net: Net, backend: Backend, layer: Case
) -> None:
    """Neither end has room: whoever closes has to let the other go on."""
    piece = pattern(16384)

    def peer(sock: Any) -> bytes:
        sock.sendall(bytes(1_000_000))
        return slowly(sock)

    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        whole = await fill(link.ours, piece)
        peering = net.spawn(peer, link.theirs)
        await link.ours.aclose()
        data = await result(peering)
        assert len(data) >= whole * len(piece)
        assert data == piece * (len(data) // len(piece))

    backend.run(main)


def test_close_is_bounded(net: Net, backend: Backend, layer: Case) -> None:
    settings = ktls.Settings(shutdown_timeout=0.2, offload=layer.offload)

    async def main() -> None:
        link = await connect(net, layer, buffers=8192, settings=settings)
        await fill(link.ours)
        with pytest.raises(BrokenResourceError) as caught:
            await link.ours.aclose()
        assert isinstance(caught.value.__cause__, TimeoutError)
        await link.ours.aclose()
        assert link.ours._sock.fileno() == -1

    backend.run(main)


def test_close_when_the_peer_has_gone(net: Net, backend: Backend, layer: Case) -> None:
    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        await fill(link.ours)
        reset(link.theirs)
        await link.ours.aclose()
        link = await connect(net, layer, buffers=8192)
        await fill(link.ours)
        async with anyio.create_task_group() as group:
            group.start_soon(link.ours.aclose)
            await wait_all_tasks_blocked()
            reset(link.theirs)

    backend.run(main)


def test_close_by_force(net: Net, backend: Backend, layer: Case) -> None:
    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        await fill(link.ours)
        await anyio.aclose_forcefully(link.ours)
        assert link.ours._sock.fileno() == -1
        error = await result(net.spawn(ending, link.theirs))
        assert error is not None
        assert ended_untruthfully(error)

    backend.run(main)


def test_a_close_that_is_cancelled(net: Net, backend: Backend) -> None:
    async def main() -> None:
        link = await connect(net, buffers=8192)
        await fill(link.ours)
        async with anyio.create_task_group() as group:
            group.start_soon(link.ours.aclose)
            await until(lambda: link.ours._closed)
            group.cancel_scope.cancel()
        assert link.ours._sock.fileno() == -1

    backend.run(main)


def test_close_wakes_who_waits(net: Net, backend: Backend, layer: Case) -> None:
    async def expect_closed(operation: Any, *args: Any) -> None:
        with pytest.raises(ClosedResourceError):
            await operation(*args)

    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        async with anyio.create_task_group() as group:
            group.start_soon(expect_closed, link.ours.receive)
            group.start_soon(expect_closed, link.ours.send, bytes(5_000_000))
            await wait_all_tasks_blocked()
            await link.ours.aclose()
        await expect_closed(link.ours.receive)
        await expect_closed(link.ours.send, b"x")
        await expect_closed(link.ours.sendfile, None)
        error = await result(net.spawn(ending, link.theirs))
        assert error is not None, "half an item, and the peer was told that it was all"
        assert ended_untruthfully(error)

    backend.run(main)
