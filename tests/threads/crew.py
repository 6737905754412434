"""Threads that have to come to an end, and frames that say where they belong."""

from __future__ import annotations

import faulthandler
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("FRAME", "PATIENCE", "Crew", "Frames", "frame")

#: Seconds after which a thread that has not ended never will.
PATIENCE: Final = 40.0
#: Bytes of a frame: one record each, so that whoever reads as much gets one whole.
FRAME: Final = 64
_HEAD: Final = struct.Struct("!HI")


def frame(writer: int, number: int) -> bytes:
    """The frame ``number`` of ``writer``: as long as all of them, and wrong if a byte of it is."""
    head = _HEAD.pack(writer, number)
    return head + bytes((writer * 31 + number * 7 + i) & 255 for i in range(FRAME - len(head)))


@final
class Frames:
    """What came: every frame whole, and once. ``ordered``: each writer's in order; without it, only by the end all are there."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._seen: dict[int, list[int]] = {}
        self._rest = b""
        self._lock = threading.Lock()

    def feed(self, data: bytes) -> None:
        """Take what was received: any piece of the stream if one reads, whole frames if several do."""
        with self._lock:
            data = self._rest + data
            whole = len(data) - len(data) % FRAME
            for start in range(0, whole, FRAME):
                self._take(data[start : start + FRAME])
            self._rest = data[whole:]

    def _take(self, data: bytes) -> None:
        writer, number = _HEAD.unpack_from(data)
        if data != frame(writer, number):
            raise AssertionError(f"frame {number} of writer {writer} is damaged")
        numbers = self._seen.setdefault(writer, [])
        if self._ordered and number != len(numbers):
            raise AssertionError(f"frame {number} of writer {writer} where {len(numbers)} is due")
        numbers.append(number)

    def check(self, writers: int, count: int) -> None:
        """Everything is there, and once."""
        if self._rest:
            raise AssertionError("the stream ended inside a frame")
        expected = {writer: list(range(count)) for writer in range(writers)}
        found = {writer: sorted(numbers) for writer, numbers in self._seen.items()}
        if found != expected:
            raise AssertionError({writer: len(numbers) for writer, numbers in found.items()})


@final
class Crew:
    """Threads that work at the same time."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def spawn(self, work: Callable[..., object], *arguments: object) -> threading.Thread:
        """Run ``work`` in a thread; ``finish`` tells of its error."""

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self._errors.append(error)

        name = getattr(work, "__name__", "work")
        thread = threading.Thread(target=run, name=f"{name}{arguments}"[:60], daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def finish(self) -> None:
        """Wait until all have ended, show where they hang if they do, and raise the first error of any."""
        deadline = time.monotonic() + PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        alive = [thread.name for thread in self.threads if thread.is_alive()]
        if alive:
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        if self._errors:
            raise self._errors[0]
        if alive:
            raise AssertionError(f"threads that do not end: {alive}")
