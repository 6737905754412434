"""What lies below the messages: a file's position that is nobody else's, reading in a thread, and errors on the way."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any, cast

import pytest

import ktls.asgi.sender
from ktls.asgi.moving import Cursor, move, regular_size

from .helpers import OTHERS, Server, pathsend, read_all, request, sends, start
from .test_endings import set_up
from .test_writes import FakeTransport


def test_a_cursor_leaves_the_descriptors_position_alone(big: Path, contents: bytes) -> None:
    with big.open("rb", buffering=0) as file:
        file.seek(7)
        cursor = Cursor(file.fileno())
        assert cursor.fileno() == file.fileno()
        assert cursor.read(3) == contents[:3]
        assert cursor.seek(100) == cursor.tell() == 100
        buffer = bytearray(5)
        assert cursor.readinto(buffer) == 5
        assert buffer == contents[100:105]
        assert cursor.seek(-5, os.SEEK_CUR) == 100
        cursor.seek(len(contents) - 1)
        assert cursor.read(10) == contents[-1:]
        assert cursor.read(10) == b""
        assert file.tell() == 7


def test_only_regular_files_have_a_size(big: Path, contents: bytes) -> None:
    with big.open("rb") as file:
        assert regular_size(file.fileno()) == len(contents)
    reads, writes = os.pipe()
    with open(reads), open(writes), pytest.raises(ValueError, match="only regular files"):
        regular_size(reads)


class TLSTransport(FakeTransport):
    """Says that it is TLS, of somebody else."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return object() if name == "sslcontext" else default


class Flow:
    """Never pauses."""

    write_paused = False

    async def drain(self) -> None:
        """Not called."""
        raise AssertionError


def test_a_descriptor_is_not_let_go_while_a_thread_reads_it(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, may_go_on = threading.Event(), threading.Event()

    def pread(fd: int, size: int, offset: int) -> bytes:
        reading.set()
        assert may_go_on.wait(20)
        raise OSError(errno.EIO, "which nobody will see")

    monkeypatch.setattr(os, "pread", pread)

    async def main(fd: int) -> None:
        moving = asyncio.ensure_future(move(TLSTransport(), Flow(), fd, 0, 100))
        assert await asyncio.to_thread(reading.wait, 20)
        for _ in range(3):
            moving.cancel()
            await asyncio.sleep(0)
        assert not moving.done()
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await moving

    with big.open("rb") as file:
        asyncio.run(main(file.fileno()))


@pytest.mark.parametrize("server", OTHERS[:2], ids=str, indirect=True)
@pytest.mark.parametrize(
    ("number", "is_the_files"),
    [
        (errno.EIO, True),
        (errno.EHOSTUNREACH, False),
        (errno.EPIPE, False),
        (errno.ETIMEDOUT, False),
    ],
)
def test_a_files_error_is_the_applications_and_the_networks_is_not(
    server: Server,
    big: Path,
    number: int,
    is_the_files: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def failing_move(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ktls.asgi.sender, "move", failing_move)
    watched = set_up(server, sends(start(1_000_000), pathsend(big)))
    with server.connect() as sock:
        sock.sendall(request())
        assert read_all(sock).endswith(b"\r\n\r\n")
    assert watched.ended.wait(20)
    if is_the_files:
        assert cast(OSError, watched.error).errno == number
    else:
        assert watched.error is None
        assert watched.afterwards == {"type": "http.disconnect"}
