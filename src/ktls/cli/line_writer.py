"""Writes lines to a file descriptor from an event loop, without ever waiting for whoever reads them.

A log that goes into a pipe blocks its writer when nobody empties the pipe, and with the event loop stand all downloads and the handling of signals. So
lines are kept until ``poll`` says that PIPE_BUF bytes will be taken, are written in pieces of at most that size, and are lost (and counted) when too many wait.
Whole lines of that size are written as one piece, so lines of several processes do not mix. A reader that has gone is nobody's error.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections import deque
from typing import Final, final

__all__ = ("LineWriter",)

_RETRY_DELAY: Final = 0.05
_MAX_WAITING: Final = 10_000


@final
class LineWriter:
    """Writes to ``descriptor``, which stays open, as soon as the running loop has nothing more urgent."""

    def __init__(self, descriptor: int, *, max_waiting: int = _MAX_WAITING) -> None:
        self._descriptor = descriptor
        self._max_waiting = max_waiting
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._timer: asyncio.Handle | None = None
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, line: str) -> None:
        """Write ``line``, which ends with a newline, soon."""
        if len(self._waiting) >= self._max_waiting:
            self._lost += 1
            return
        self._waiting.append(line.encode("ascii", "backslashreplace"))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        """Write what can be written at once."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._write_waiting()

    def _flush(self) -> None:
        self._timer = None
        if not self._write_waiting():
            self._timer = asyncio.get_running_loop().call_later(_RETRY_DELAY, self._flush)

    def _write_waiting(self) -> bool:
        """Return whether all is written."""
        while self._waiting:
            if not self._poll.poll(0):
                return False
            piece = self._next_piece()
            try:
                written = os.write(self._descriptor, piece)
            except BlockingIOError:
                written = 0
            except OSError:  # whoever read the lines has gone, or the disk is full
                continue
            if written < len(piece):  # a terminal may do so
                self._waiting.appendleft(piece[written:])
                return False
        if self._lost:
            lost, self._lost = self._lost, 0
            self._waiting.append(f"({lost} lines lost: nobody read them in time)\n".encode())
            return self._write_waiting()
        return True

    def _next_piece(self) -> bytes:
        size = 0
        lines: list[bytes] = []
        while self._waiting and (not lines or size + len(self._waiting[0]) <= select.PIPE_BUF):
            line = self._waiting.popleft()
            size += len(line)
            lines.append(line)
        return b"".join(lines)
