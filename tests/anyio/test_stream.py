"""Data through a ``KTLSStream``, and calls that are cancelled, on every backend."""

from __future__ import annotations

import ssl

import anyio
import pytest
from anyio import BrokenResourceError, BusyResourceError, wait_all_tasks_blocked

import ktls
from ktls.anyio import KTLSAttribute

from ..sockets.helpers import Case, Net, pattern, read_all, read_exactly
from ..support import TLS12, TLS13, TlsStat
from .helpers import (
    Backend,
    Link,
    changing,
    connect,
    ended_untruthfully,
    ending,
    fill,
    generations,
    in_task,
    receive_exactly,
    result,
)

# --- data ------------------------------------------------------------------------------------------------------------


def test_both_ways(net: Net, backend: Backend, case: Case) -> None:
    async def main() -> None:
        link = await connect(net, case)
        offload = link.ours.extra(KTLSAttribute.offload)
        assert (offload.tx, offload.rx) == (case.tx_layer, case.rx_layer)
        await link.ours.send(b"question")
        assert link.theirs.recv(100) == b"question"
        link.theirs.sendall(b"answer")
        assert await link.ours.receive() == b"answer"
        link.theirs.sendall(b"in pieces")
        assert await link.ours.receive(2) == b"in"
        assert await link.ours.receive() == b" pieces"
        await link.ours.send(b"")
        await link.ours.aclose()
        assert link.theirs.recv(1) == b""

    backend.run(main)


def test_much_data_both_ways_at_once(net: Net, backend: Backend, layer: Case) -> None:
    data, answer = pattern(3_000_000, 1), pattern(2_500_000, 2)

    async def main() -> None:
        link = await connect(net, layer, buffers=65536)
        sending = net.spawn(link.theirs.sendall, answer)
        receiving = net.spawn(read_exactly, link.theirs, len(data))
        async with anyio.create_task_group() as group:
            group.start_soon(link.ours.send, data)
            assert await receive_exactly(link.ours, len(answer)) == answer
        assert await result(receiving) == data
        await result(sending)
        await link.ours.aclose()

    # The ssl module can't read and write at once.
    layer = Case(version=layer.version, peer="ktls", offload=layer.offload)
    backend.run(main)


@pytest.mark.kernel
def test_the_kernel_does_it(net: Net, backend: Backend, tls_stat: TlsStat) -> None:
    case = Case(version=TLS12)

    async def main() -> None:
        link = await connect(net, case)
        assert link.ours.extra(KTLSAttribute.offload) == ktls.Offload("kernel", "kernel", None)
        assert tls_stat["TlsTxSw"] + tls_stat["TlsTxDevice"] == 1
        assert tls_stat["TlsRxSw"] + tls_stat["TlsRxDevice"] == 1
        before = link.ours.extra(KTLSAttribute.key_usage).tx.records
        await link.ours.send(bytes(40000))
        assert link.ours.extra(KTLSAttribute.key_usage).tx.records == before + 3
        assert len(read_exactly(link.theirs, 40000)) == 40000
        await link.ours.aclose()

    backend.run(main)


def test_one_task_for_each_direction(net: Net, backend: Backend) -> None:
    async def main() -> None:
        link = await connect(net, buffers=8192)
        async with anyio.create_task_group() as group:
            group.start_soon(in_task(link.ours.receive))
            group.start_soon(link.ours.send, bytes(5_000_000))
            await wait_all_tasks_blocked()
            with pytest.raises(BusyResourceError):
                await link.ours.receive()
            with pytest.raises(BusyResourceError):
                await link.ours.send(b"x")
            with pytest.raises(BusyResourceError):
                await link.ours.send_eof()
            group.cancel_scope.cancel()
        await anyio.aclose_forcefully(link.ours)

    backend.run(main)


def test_arguments(net: Net, backend: Backend) -> None:
    async def main() -> None:
        link = await connect(net)
        with pytest.raises(ValueError, match="max_bytes"):
            await link.ours.receive(0)
        assert "KTLSStream" in repr(link.ours)
        await link.ours.aclose()
        assert "closed" in repr(link.ours)

    backend.run(main)


# --- cancellation ----------------------------------------------------------------------------------------------------


def test_a_receive_that_is_cancelled(net: Net, backend: Backend, layer: Case) -> None:
    data = pattern(300_000)

    async def main() -> None:
        link = await connect(net, layer, buffers=16384)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await link.ours.receive()
        assert scope.cancelled_caught
        sending = net.spawn(link.theirs.sendall, data)
        received = bytearray()
        while len(received) < len(data):
            with anyio.move_on_after(0.0005):
                while len(received) < len(data):
                    received += await link.ours.receive(5000)
        assert received == data
        await result(sending)
        await link.ours.aclose()

    backend.run(main)


def test_a_send_that_is_cancelled_before_it_began(net: Net, backend: Backend, layer: Case) -> None:
    """Whole items or nothing: then the stream goes on, and its end is honest."""
    piece = pattern(16384)

    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        whole = await fill(link.ours, piece)
        receiving = net.spawn(read_all, link.theirs)
        await link.ours.send(b"the end")
        await link.ours.aclose()
        data = await result(receiving)
        assert data.endswith(b"the end")
        sent, rest = divmod(len(data) - len(b"the end"), len(piece))
        assert rest == 0
        assert whole <= sent <= whole + 1
        assert data == piece * sent + b"the end"

    backend.run(main)


def test_a_send_that_is_cancelled_in_the_middle(net: Net, backend: Backend, layer: Case) -> None:
    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        async with anyio.create_task_group() as group:
            group.start_soon(link.ours.send, bytes(5_000_000))
            await wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        with pytest.raises(BrokenResourceError):
            await link.ours.send(b"more")
        if layer.version is TLS13:
            with pytest.raises(BrokenResourceError):
                await link.ours.send_eof()
        link.theirs.sendall(b"still heard")
        assert await link.ours.receive() == b"still heard"
        await link.ours.aclose()
        error = await result(net.spawn(ending, link.theirs))
        assert error is not None
        assert ended_untruthfully(error)

    backend.run(main)


@pytest.mark.parametrize("case", changing(), ids=str)
def test_a_change_of_keys_that_is_cancelled(net: Net, backend: Backend, case: Case) -> None:
    piece = pattern(16384)

    async def main() -> None:
        link = await connect(net, case, buffers=8192, changing_peer=True)
        await fill(link.ours, piece)
        async with anyio.create_task_group() as group:
            group.start_soon(link.ours.refresh_traffic_keys)
            await wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        receiving = net.spawn(read_all, link.theirs)
        await link.ours.send(b"under the new key")
        assert generations(link.ours)[0] == 1
        await link.ours.aclose()
        data = await result(receiving)
        assert data.endswith(b"under the new key")
        assert len(data) % 16384 == len(b"under the new key")

    backend.run(main)


def test_links_are_what_they_seem(net: Net, backend: Backend) -> None:
    """The helpers' own test: a peer of the ssl module tells a ragged end."""

    async def main() -> Link:
        link = await connect(net)
        await anyio.aclose_forcefully(link.ours)
        return link

    link = backend.run(main)
    assert isinstance(link.theirs, ssl.SSLSocket)
    error = ending(link.theirs)
    assert error is not None
    assert ended_untruthfully(error)
