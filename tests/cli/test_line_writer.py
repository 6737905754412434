from __future__ import annotations

import asyncio
import os
import select
from typing import TYPE_CHECKING

import pytest

from ktls.cli.line_writer import LineWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield read, write
    for descriptor in (read, write):
        try:
            os.close(descriptor)
        except OSError:
            pass


async def turn() -> None:
    """Let the loop do what is due."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_lines_go_out(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        writer = LineWriter(pipe[1])
        writer.write("one\n")
        writer.write("two \u00e9\n")
        await turn()
        assert os.read(pipe[0], 100) == b"one\ntwo \\xe9\n"
        writer.write("three\n")
        writer.close()
        assert os.read(pipe[0], 100) == b"three\n"

    asyncio.run(main())


def test_lines_into_a_file(tmp_path: Path) -> None:
    async def main() -> None:
        with open(tmp_path / "log", "wb") as file:
            writer = LineWriter(file.fileno())
            for number in range(1000):
                writer.write(f"line {number}\n")
            writer.close()

    asyncio.run(main())
    assert (tmp_path / "log").read_text().splitlines() == [f"line {n}" for n in range(1000)]


def test_nobody_reads(pipe: tuple[int, int]) -> None:
    """Nothing waits; what is lost is counted; what is read is whole lines in order."""

    async def main() -> str:
        writer = LineWriter(pipe[1], max_waiting=2000)
        for number in range(5000):
            writer.write(f"{number:099}\n")
        await turn()
        text = b""
        while b"lines lost" not in text:
            await asyncio.sleep(0.001)  # until the writer tries again
            try:
                while data := os.read(pipe[0], 65536):
                    text += data
            except BlockingIOError:
                pass
        writer.close()
        return text.decode()

    lines = asyncio.run(main()).splitlines()
    assert lines == [*(f"{n:099}" for n in range(2000)), lines[-1]]
    assert lines[-1] == "(3000 lines lost: nobody read them in time)"


def test_pieces_are_whole_lines(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    write = os.write

    def note(descriptor: int, data: bytes) -> int:
        pieces.append(data)
        return write(descriptor, data)

    async def main() -> None:
        writer = LineWriter(pipe[1])
        for length in (1000, 3000, 97, 4000, 5000):
            writer.write("x" * (length - 1) + "\n")
        writer.close()

    monkeypatch.setattr(os, "write", note)
    asyncio.run(main())
    assert [len(piece) for piece in pieces] == [4000, 97, 4000, 5000]
    assert select.PIPE_BUF == 4096


def test_reader_that_has_gone(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        writer = LineWriter(pipe[1])
        os.close(pipe[0])
        for _ in range(100):
            writer.write("x\n")
        await turn()
        writer.close()

    asyncio.run(main())
