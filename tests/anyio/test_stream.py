"""Data, keys, ends and cancellation of a ``KTLSStream``, on every backend."""

from __future__ import annotations

import socket
import ssl
import struct
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
    wait_all_tasks_blocked,
)

import ktls
from ktls.anyio import KTLSAttribute

from ..sockets.helpers import Case, Net, matrix, pattern, read_all, read_exactly
from ..support import TLS12, TLS13, TlsStat
from .helpers import (
    Backend,
    Link,
    connect,
    ended_untruthfully,
    fill,
    generations,
    in_task,
    receive_all,
    receive_exactly,
    result,
    until,
)

KTLS_PEER = Case(peer="ktls")


def cut(sock: socket.socket) -> None:
    """End TCP without close_notify."""
    socket.socket.shutdown(sock, socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket(fileno=sock.detach()).close()


def slowly(sock: Any) -> bytes:
    """Receive until the end in small pieces."""
    data = bytearray()
    while chunk := sock.recv(1500):
        data += chunk
    return bytes(data)


def ending(sock: Any) -> BaseException | None:
    """Receive until the end, and return how that was told: None if in order."""
    try:
        read_all(sock)
    except OSError as error:
        return error
    return None


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


# --- keys ------------------------------------------------------------------------------------------------------------


def changing() -> list[Case]:
    """Cases in which both directions can change keys."""
    cases = matrix(versions=(TLS13,), peers=("ktls",), offloads=("auto",))
    return [
        case
        for case in (*cases, Case(version=TLS13, peer="ktls", offload="userspace"))
        if case.may_refresh
    ]


@pytest.mark.parametrize("case", changing(), ids=str)
def test_a_key_update_that_poll_does_not_show(net: Net, backend: Backend, case: Case) -> None:
    """Data, KeyUpdate, data come at once: the kernel decrypts the KeyUpdate with the first read, and is silent from there on."""

    async def main() -> None:
        link = await connect(net, case, changing_peer=True)
        link.theirs.sendall(b"before")
        link.theirs.refresh_traffic_keys(request_peer=True)
        assert await link.ours.receive() == b"before"
        async with anyio.create_task_group() as group:

            async def receive() -> None:
                assert await link.ours.receive() == b"after"

            group.start_soon(receive)
            await wait_all_tasks_blocked()
            link.theirs.sendall(b"after")
        assert generations(link.ours) == (1, 1)
        await link.ours.send(b"under the new key")
        assert link.theirs.recv(100) == b"under the new key"
        await link.ours.aclose()

    backend.run(main)


@pytest.mark.parametrize("case", changing(), ids=str)
def test_both_sides_change_their_keys(net: Net, backend: Backend, case: Case) -> None:
    rounds, size = 12, 40_000

    def peer(sock: Any) -> None:
        for number in range(rounds):
            assert read_exactly(sock, size) == pattern(size, number)
            sock.refresh_traffic_keys(request_peer=number % 3 == 0)
            sock.sendall(pattern(size, number + 100))

    async def main() -> None:
        link = await connect(net, case, changing_peer=True)
        peering = net.spawn(peer, link.theirs)
        for number in range(rounds):
            if number % 2:
                await link.ours.refresh_traffic_keys(request_peer=number % 4 == 1)
            await link.ours.send(pattern(size, number))
            assert await receive_exactly(link.ours, size) == pattern(size, number + 100)
        await result(peering)
        tx, rx = generations(link.ours)
        assert tx >= rounds // 2
        assert rx >= rounds
        await link.ours.aclose()

    backend.run(main)


@pytest.mark.parametrize("case", changing(), ids=str)
def test_who_only_sends_answers_a_key_update(net: Net, backend: Backend, case: Case) -> None:
    data = pattern(6_000_000)

    async def main() -> None:
        link = await connect(net, case, buffers=65536, changing_peer=True)
        async with anyio.create_task_group() as group:
            group.start_soon(link.ours.send, data)
            await wait_all_tasks_blocked()
            link.theirs.refresh_traffic_keys(request_peer=True)
            receiving = net.spawn(read_exactly, link.theirs, len(data))
            assert await result(receiving) == data
        assert link.theirs.key_usage.rx.generation == 1
        assert generations(link.ours) == (1, 1)
        await link.ours.aclose()

    backend.run(main)


@pytest.mark.parametrize("case", changing(), ids=str)
def test_who_only_receives_sends_the_answer_that_he_owes(
    net: Net, backend: Backend, case: Case
) -> None:
    """There is no room for the answer when the KeyUpdate comes; nobody sends any more."""

    async def main() -> None:
        link = await connect(net, case, buffers=8192, changing_peer=True)
        await fill(link.ours)
        async with anyio.create_task_group() as group:
            group.start_soon(in_task(receive_all, link.ours))
            link.theirs.refresh_traffic_keys(request_peer=True)
            await until(lambda: generations(link.ours)[1] == 1)
            assert link.ours._driver.owes

            def drain() -> None:
                """Until the KeyUpdate has come, behind all the data; a short timeout because no data follows it."""
                link.theirs.settimeout(0.05)
                while link.theirs.key_usage.rx.generation == 0:
                    with suppress(TimeoutError):
                        link.theirs.recv(65536)

            draining = net.spawn(drain)
            await result(draining)
            assert not link.ours._driver.owes
            assert generations(link.ours)[0] == 1
            group.cancel_scope.cancel()
        await anyio.aclose_forcefully(link.ours)

    backend.run(main)


@pytest.mark.parametrize("case", changing(), ids=str)
def test_keys_change_while_others_send(net: Net, backend: Backend, case: Case) -> None:
    data = pattern(2_000_000)

    async def main() -> None:
        link = await connect(net, case, buffers=16384, changing_peer=True)
        async with anyio.create_task_group() as group:
            group.start_soon(link.ours.send, data)
            await wait_all_tasks_blocked()
            group.start_soon(link.ours.refresh_traffic_keys)
            await wait_all_tasks_blocked()
            assert await result(net.spawn(read_exactly, link.theirs, len(data))) == data
        assert generations(link.ours)[0] == 1
        await link.ours.aclose()

    backend.run(main)


def test_keys_that_do_not_change(net: Net, backend: Backend) -> None:
    async def main() -> None:
        link = await connect(net, Case(version=TLS12))
        with pytest.raises(ktls.LocalProtocolError):
            await link.ours.refresh_traffic_keys()
        await link.ours.send(b"intact")
        assert link.theirs.recv(100) == b"intact"
        await link.ours.aclose()
        with pytest.raises(ClosedResourceError):
            await link.ours.refresh_traffic_keys()

    backend.run(main)


# --- ends ------------------------------------------------------------------------------------------------------------


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
