"""Keys of a ``KTLSStream`` that change, on every backend."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, wait_all_tasks_blocked

import ktls

from ..sockets.helpers import Case, Net, pattern, read_exactly
from ..support import TLS12
from .helpers import (
    Backend,
    changing,
    connect,
    fill,
    generations,
    in_task,
    receive_all,
    receive_exactly,
    result,
    until,
)


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
