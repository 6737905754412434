"""``sendfile`` and ``recvfile``: every byte, the right positions, the right errors, and no copy where the kernel can do without."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import socket
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import pytest

import ktls

from ..support import TLS13
from .helpers import PATIENCE, Case, Net, matrix, pattern, read_exactly

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 200_000
CONTENT = pattern(SIZE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: EFBIG, where a full disk would say ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# --- sendfile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "timeout"])
@pytest.mark.parametrize(
    ("offset", "count", "expected"),
    [
        (0, None, CONTENT),
        (0, SIZE, CONTENT),
        (0, 1, CONTENT[:1]),
        (100_001, None, CONTENT[100_001:]),
        (16384, 16384, CONTENT[16384:32768]),
        (SIZE - 10, 1 << 40, CONTENT[-10:]),
        (0, SIZE + 1, CONTENT),
        (SIZE, None, b""),
        (SIZE + 1, 5, b""),
    ],
    ids=["whole", "all", "one", "offset", "record", "short", "too-much", "at-end", "behind-end"],
)
def test_sendfile(
    net: Net,
    layer: Case,
    path: Path,
    offset: int,
    count: int | None,
    expected: bytes,
    timeout: float | None,
) -> None:
    link = net.link(layer, timeout=timeout)
    receiving = net.spawn(read_exactly, link.theirs, len(expected) + 3)
    with open(path, "rb") as file:
        file.seek(7)
        assert link.ours.sendfile(file, offset, count) == len(expected)
        assert file.tell() == (offset + len(expected) if expected else 7)
    link.ours.sendall(b"end")
    assert receiving.result() == expected + b"end"


def test_sendfile_of_an_empty_file(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer)
    (tmp_path / "empty").touch()
    with open(tmp_path / "empty", "rb") as file:
        assert link.ours.sendfile(file) == 0
    assert link.ours.sendfile(io.BytesIO()) == 0
    link.ours.sendall(b"end")
    assert link.theirs.recv(100) == b"end"


@pytest.mark.parametrize(
    ("offset", "count", "expected"),
    [(0, None, CONTENT), (5, None, CONTENT[5:]), (5, 100_000, CONTENT[5:100_005])],
)
def test_sendfile_without_a_descriptor(
    net: Net, layer: Case, offset: int, count: int | None, expected: bytes
) -> None:
    link = net.link(layer)
    file = io.BytesIO(CONTENT)
    receiving = net.spawn(read_exactly, link.theirs, len(expected))
    assert link.ours.sendfile(file, offset, count) == len(expected)
    assert file.tell() == offset + len(expected)
    assert receiving.result() == expected


def test_sendfile_from_a_pipe(net: Net, layer: Case) -> None:
    link = net.link(layer)
    reads, writes = os.pipe()
    os.write(writes, CONTENT[:5000])
    os.close(writes)
    with os.fdopen(reads, "rb") as file:
        assert link.ours.sendfile(file) == 5000
    assert read_exactly(link.theirs, 5000) == CONTENT[:5000]


def test_position_after_a_sendfile_without_descriptor_that_timed_out(net: Net, layer: Case) -> None:
    """Behind the last byte that was accepted, as in ``socket.sendfile``: who goes on from there loses and repeats nothing."""
    link = net.link(layer, timeout=0.05, buffers=8192)
    content = pattern(1 << 20)
    file = io.BytesIO(content)
    with pytest.raises(TimeoutError):
        link.ours.sendfile(file)
    assert file.tell() < len(content)
    receiving = net.spawn(read_exactly, link.theirs, len(content))
    link.ours.settimeout(PATIENCE)
    link.ours.sendall(file.read())
    assert receiving.result() == content


def test_position_after_a_sendfile_that_timed_out(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer, timeout=0.05, buffers=8192)
    content = pattern(1 << 20)
    (tmp_path / "big").write_bytes(content)
    with open(tmp_path / "big", "rb") as file:
        with pytest.raises(TimeoutError, match="The write operation timed out"):
            link.ours.sendfile(file)
        position = file.tell()
        assert 0 < position < len(content)
        receiving = net.spawn(read_exactly, link.theirs, len(content))
        link.ours.settimeout(PATIENCE)
        assert link.ours.sendfile(file, position) == len(content) - position
    assert receiving.result() == content


def test_sendfile_refuses(net: Net, path: Path) -> None:
    ours = net.link().ours
    with open(path, encoding="latin-1") as text, pytest.raises(ValueError, match="binary mode"):
        ours.sendfile(text)  # type: ignore[arg-type]  # that is the mistake
    with open(path, "rb") as file:
        for count in (0, -1):
            with pytest.raises(ValueError, match="count must be a positive integer"):
                ours.sendfile(file, 0, count)
        ours.setblocking(False)
        with pytest.raises(ValueError, match="non-blocking sockets are not supported"):
            ours.sendfile(file)


def test_sendfile_of_a_closed_file(net: Net, path: Path) -> None:
    file = open(path, "rb")  # noqa: SIM115  # closed by the test
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        net.link().ours.sendfile(file)


@pytest.mark.kernel
def test_sendfile_copies_nothing(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = net.link()
    calls = []
    sendfile = os.sendfile

    def spy(*arguments: Any) -> int:
        calls.append(arguments)
        return sendfile(*arguments)

    monkeypatch.setattr(os, "sendfile", spy)
    receiving = net.spawn(read_exactly, link.theirs, SIZE)
    with open(path, "rb") as file:
        link.ours.sendfile(file)
    assert receiving.result() == CONTENT
    assert calls
    assert calls[0][0] == link.ours.fileno()


# --- recvfile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "timeout"])
def test_recvfile_to_the_end(net: Net, layer: Case, tmp_path: Path, timeout: float | None) -> None:
    link = net.link(layer, timeout=timeout)

    def talk() -> None:
        link.theirs.sendall(CONTENT)
        link.theirs.unwrap()

    talking = net.spawn(talk)
    with open(tmp_path / "received", "wb") as file:
        assert link.ours.recvfile(file) == SIZE
        assert file.tell() == SIZE
        assert (tmp_path / "received").stat().st_size == SIZE
        assert link.ours.recvfile(file) == 0
    assert (tmp_path / "received").read_bytes() == CONTENT
    link.ours.close()
    talking.result()


@pytest.mark.parametrize("count", [1, 16384, 100_001, SIZE])
def test_recvfile_of_so_many_bytes(net: Net, layer: Case, tmp_path: Path, count: int) -> None:
    link = net.link(layer)
    sending = net.spawn(link.theirs.sendall, CONTENT + b"end")
    with open(tmp_path / "received", "wb") as file:
        assert link.ours.recvfile(file, count) == count
        assert (tmp_path / "received").stat().st_size == count
        assert link.ours.recvfile(file, 0) == 0
    assert (tmp_path / "received").read_bytes() == CONTENT[:count]
    assert read_exactly(link.ours, SIZE + 3 - count) == CONTENT[count:] + b"end"
    sending.result()


def test_recvfile_into_the_middle(net: Net, layer: Case, path: Path) -> None:
    link = net.link(layer)
    link.theirs.sendall(b"x" * 20_000)
    with open(path, "r+b") as file:
        file.seek(1000)
        assert link.ours.recvfile(file, 20_000) == 20_000
        assert file.tell() == 21_000
        assert file.read(4) == CONTENT[21_000:21_004]
    assert path.read_bytes() == CONTENT[:1000] + b"x" * 20_000 + CONTENT[21_000:]


def test_recvfile_appends(net: Net, layer: Case, path: Path) -> None:
    link = net.link(layer)
    link.theirs.sendall(b"x" * 20_000)
    with open(path, "ab") as file:
        assert link.ours.recvfile(file, 20_000) == 20_000
        file.write(b"end")
    assert path.read_bytes() == CONTENT + b"x" * 20_000 + b"end"


def test_recvfile_behind_what_is_buffered(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer)
    link.theirs.sendall(b"from the network")
    with open(tmp_path / "received", "wb") as file:
        file.write(b"from here, ")
        link.ours.recvfile(file, 16)
        file.write(b", from here")
    assert (tmp_path / "received").read_bytes() == b"from here, from the network, from here"


def test_recvfile_unbuffered(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer)
    sending = net.spawn(link.theirs.sendall, CONTENT)
    with open(tmp_path / "received", "wb", buffering=0) as file:
        assert link.ours.recvfile(file, SIZE) == SIZE
    assert (tmp_path / "received").read_bytes() == CONTENT
    sending.result()


def test_recvfile_after_a_part_of_a_record_was_read(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer)
    link.theirs.sendall(CONTENT[:30_000])
    assert link.ours.recv(100) == CONTENT[:100]
    with open(tmp_path / "received", "wb") as file:
        assert link.ours.recvfile(file, 29_900) == 29_900
    assert (tmp_path / "received").read_bytes() == CONTENT[100:30_000]


def test_recvfile_without_a_descriptor(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.theirs.sendall(CONTENT[:50_000])
    file = io.BytesIO()
    assert link.ours.recvfile(file, 50_000) == 50_000
    assert file.getvalue() == CONTENT[:50_000]


def test_recvfile_into_a_pipe(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.theirs.sendall(CONTENT[:5000])
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb") as end, os.fdopen(writes, "wb", buffering=0) as file:
        assert link.ours.recvfile(file, 5000) == 5000
        assert end.read(5000) == CONTENT[:5000]


class Reluctant(io.RawIOBase):
    """Takes a few bytes at a time, as a raw file on a disk that is nearly full may."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.taken += bytes(data[:1000])
        return min(1000, len(data))


def test_recvfile_into_what_takes_only_a_part(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.theirs.sendall(CONTENT[:50_000])
    file = Reluctant()
    assert link.ours.recvfile(file, 50_000) == 50_000  # type: ignore[arg-type]  # a file of its own kind
    assert file.taken == CONTENT[:50_000]


def test_recvfile_ends_before_the_count(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer)

    def talk() -> None:
        link.theirs.sendall(CONTENT)
        link.theirs.unwrap()

    talking = net.spawn(talk)
    with open(tmp_path / "received", "wb") as file:
        assert link.ours.recvfile(file, SIZE * 2) == SIZE
    link.ours.close()
    talking.result()


@pytest.mark.parametrize("suppress", [True, False])
def test_recvfile_of_what_was_cut_off(
    net: Net, layer: Case, tmp_path: Path, suppress: bool
) -> None:
    link = net.link(layer, suppress_ragged_eofs=suppress)
    link.theirs.sendall(CONTENT[:1000])
    socket.socket.shutdown(link.theirs, socket.SHUT_WR)
    with open(tmp_path / "received", "wb") as file:
        if suppress:
            assert link.ours.recvfile(file) == 1000
        else:
            with pytest.raises(ktls.TruncatedError):
                link.ours.recvfile(file)
        assert file.tell() == 1000
    assert (tmp_path / "received").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("mode", ["wb", "ab"])
@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_recvfile_when_the_disk_is_full(
    net: Net, layer: Case, tmp_path: Path, mode: str, buffering: int
) -> None:
    link = net.link(layer)
    sending = net.spawn(link.theirs.sendall, CONTENT[:100_000])
    with file_size_limit(50_000):
        file: IO[bytes] = open(tmp_path / "received", mode, buffering=buffering)  # noqa: SIM115  # closed by the test
        with pytest.raises(OSError) as caught:
            link.ours.recvfile(file, 100_000)
        assert caught.value.errno == errno.EFBIG
    sending.result()
    file.close()
    # A large buffer, as Python 3.15's, keeps what it could not write, and writes it when the file is closed.
    received_until_full = (tmp_path / "received").read_bytes()
    assert len(received_until_full) >= 50_000
    assert CONTENT.startswith(received_until_full)
    # What was lost is lost; but the next file does not get what was meant for this one.
    link.theirs.sendall(b"next")
    received = io.BytesIO()
    with open(tmp_path / "next", "w+b") as after:
        link.ours.settimeout(0.2)
        with pytest.raises(TimeoutError):
            link.ours.recvfile(after)
        after.seek(0)
        received.write(after.read())
    assert received.getvalue().endswith(b"next")
    assert CONTENT[:100_000].endswith(received.getvalue()[:-4])


def test_recvfile_on_a_full_device(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.theirs.sendall(CONTENT[:20_000])
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        link.ours.recvfile(file, 20_000)
    assert caught.value.errno == errno.ENOSPC


def test_recvfile_where_pipes_are_not_to_grow(
    net: Net, layer: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unprivileged user with many connections gets EPERM from F_SETPIPE_SZ: then the pipe stays small."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("ktls.files.fcntl", refuse)
    link = net.link(layer)
    sending = net.spawn(link.theirs.sendall, CONTENT)
    with open(tmp_path / "received", "wb") as file:
        assert link.ours.recvfile(file, SIZE) == SIZE
    assert (tmp_path / "received").read_bytes() == CONTENT
    sending.result()


def spied_splices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    splice = os.splice

    def spy(*arguments: Any, **keywords: Any) -> int:
        counts.append(splice(*arguments, **keywords))
        return counts[-1]

    monkeypatch.setattr(os, "splice", spy)
    return counts


@pytest.mark.rekey
def test_recvfile_splices(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = net.link()
    counts = spied_splices(monkeypatch)
    sending = net.spawn(link.theirs.sendall, CONTENT)
    with open(tmp_path / "received", "wb") as file:
        link.ours.recvfile(file, SIZE)
    assert (tmp_path / "received").read_bytes() == CONTENT
    assert sum(counts) == 2 * SIZE  # into the pipe, and out of it
    sending.result()


@pytest.mark.parametrize(
    "case", matrix(versions=(TLS13,), roles=("client",), peers=("ktls",)), ids=str
)
@pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "timeout"])
def test_key_updates_in_the_middle_of_recvfile(
    net: Net, case: Case, tmp_path: Path, timeout: float | None
) -> None:
    link = net.link(case, timeout=timeout, changing_peer=True)
    pieces = 10

    def talk() -> None:
        for number in range(pieces):
            link.theirs.sendall(CONTENT[:40_000])
            link.theirs.refresh_traffic_keys(request_peer=number % 2 == 0)
        link.theirs.shutdown(socket.SHUT_WR)

    talking = net.spawn(talk)
    with open(tmp_path / "received", "wb") as file:
        assert link.ours.recvfile(file) == 40_000 * pieces
    assert (tmp_path / "received").read_bytes() == CONTENT[:40_000] * pieces
    talking.result()
    assert link.ours.key_usage.rx.generation == pieces


def test_file_to_file(net: Net, case: Case, path: Path, tmp_path: Path) -> None:
    if case.peer == "stdlib":
        case = Case(version=case.version, role=case.role, peer="ktls", offload=case.offload)
    link = net.link(case)
    with open(path, "rb") as source, open(tmp_path / "copy", "wb") as target:
        sending = net.spawn(link.theirs.sendfile, source)
        assert link.ours.recvfile(target, SIZE) == SIZE
        assert sending.result() == SIZE
    assert (tmp_path / "copy").read_bytes() == CONTENT
