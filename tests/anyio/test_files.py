"""``sendfile`` of a ``KTLSStream``, on every backend."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, BusyResourceError

from ktls.anyio import KTLSAttribute

from ..sockets.helpers import Case, Net, pattern, read_all, read_exactly
from ..support import TLS12, TlsStat
from .helpers import (
    Backend,
    changing,
    connect,
    ended_untruthfully,
    ending,
    generations,
    result,
    until,
)

DATA = pattern(1_500_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


def test_files(net: Net, backend: Backend, layer: Case, path: Path) -> None:
    async def main() -> None:
        link = await connect(net, layer, buffers=65536)
        with path.open("rb") as file:
            for offset, count in ((0, None), (1000, 70_000), (len(DATA) - 10, 100), (3, 1)):
                expected = DATA[offset:] if count is None else DATA[offset : offset + count]
                receiving = net.spawn(read_exactly, link.theirs, len(expected))
                assert await link.ours.sendfile(file, offset, count) == len(expected)
                assert file.tell() == offset + len(expected)
                assert await result(receiving) == expected
            assert await link.ours.sendfile(file, len(DATA)) == 0
        await link.ours.send(b"and more")
        assert link.theirs.recv(100) == b"and more"
        await link.ours.aclose()

    backend.run(main)


def test_files_of_anyio(net: Net, backend: Backend, path: Path) -> None:
    async def main() -> None:
        link = await connect(net)
        receiving = net.spawn(read_all, link.theirs)
        async with await anyio.open_file(path, "rb") as file:
            assert await link.ours.sendfile(file, 10) == len(DATA) - 10
            assert await file.tell() == len(DATA)
        await link.ours.aclose()
        assert await result(receiving) == DATA[10:]

    backend.run(main)


def test_files_without_a_descriptor(net: Net, backend: Backend) -> None:
    async def main() -> None:
        link = await connect(net, buffers=65536)
        receiving = net.spawn(read_all, link.theirs)
        file = io.BytesIO(DATA)
        assert await link.ours.sendfile(file, 5) == len(DATA) - 5
        assert await link.ours.sendfile(file, 1, 300_000) == 300_000
        assert file.tell() == 300_001
        await link.ours.aclose()
        assert await result(receiving) == DATA[5:] + DATA[1:300_001]

    backend.run(main)


def test_arguments(net: Net, backend: Backend, path: Path) -> None:
    async def main() -> None:
        link = await connect(net)
        with path.open("rb") as file, path.open(encoding="latin1") as text:
            wrong: Any = text
            with pytest.raises(ValueError, match="binary"):
                await link.ours.sendfile(wrong)
            with pytest.raises(ValueError, match="positive"):
                await link.ours.sendfile(file, count=0)
        await link.ours.aclose()

    backend.run(main)


@pytest.mark.kernel
def test_nothing_is_copied(net: Net, backend: Backend, path: Path, tls_stat: TlsStat) -> None:
    """Records are counted by the kernel, and are full ones."""

    async def main() -> None:
        link = await connect(net, Case(version=TLS12))
        assert tls_stat["TlsTxSw"] + tls_stat["TlsTxDevice"] == 1
        before = link.ours.extra(KTLSAttribute.key_usage).tx.records
        receiving = net.spawn(read_exactly, link.theirs, 163_840)
        with path.open("rb") as file:
            assert await link.ours.sendfile(file, 0, 163_840) == 163_840
        assert await result(receiving) == DATA[:163_840]
        assert link.ours.extra(KTLSAttribute.key_usage).tx.records - before == 10
        await link.ours.aclose()

    backend.run(main)


@pytest.mark.parametrize("case", changing(), ids=str)
def test_a_key_update_amid_a_file(net: Net, backend: Backend, case: Case, path: Path) -> None:
    async def main() -> None:
        link = await connect(net, case, buffers=65536, changing_peer=True)
        with path.open("rb") as file:
            async with anyio.create_task_group() as group:
                group.start_soon(link.ours.sendfile, file)
                await anyio.wait_all_tasks_blocked()
                link.theirs.refresh_traffic_keys(request_peer=True)
                assert await result(net.spawn(read_exactly, link.theirs, len(DATA))) == DATA
        assert generations(link.ours) == (1, 1)
        await link.ours.aclose()

    backend.run(main)


@pytest.mark.parametrize("descriptor", [True, False])
def test_a_file_that_is_cancelled(
    net: Net, backend: Backend, layer: Case, path: Path, descriptor: bool
) -> None:
    async def main() -> None:
        link = await connect(net, layer, buffers=8192)
        with path.open("rb") if descriptor else io.BytesIO(DATA) as file:
            async with anyio.create_task_group() as group:
                group.start_soon(link.ours.sendfile, file)
                await until(lambda: link.ours._torn)
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(BusyResourceError):
                    await link.ours.sendfile(file)
                group.cancel_scope.cancel()
            assert 0 < file.tell() < len(DATA)
        with pytest.raises(BrokenResourceError):
            await link.ours.send(b"more")
        await link.ours.aclose()
        error = await result(net.spawn(ending, link.theirs))
        assert error is not None
        assert ended_untruthfully(error)

    backend.run(main)
