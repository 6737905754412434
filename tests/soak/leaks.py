"""What a process must not have any more when all connections have ended."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from pathlib import Path
from typing import Final

from ktls.aio.handshake import Handshake
from ktls.aio.transport import KTLSTransport
from ktls.handshake.handoff import RecordDriver

__all__ = ("Descriptors", "find_leaks")

_PATIENCE: Final = 10.0


class Descriptors:
    """The open descriptors, and which are new since this was made."""

    def __init__(self) -> None:
        self._start = self._list()

    @staticmethod
    def _list() -> Counter[str]:
        found: Counter[str] = Counter()
        for link in Path("/proc/self/fd").iterdir():
            try:
                target = os.readlink(link)
            except FileNotFoundError:  # the one that lists
                continue
            # Which socket it is has no name that lasts. libuv keeps a spare descriptor, for when there are none.
            if target != os.devnull:
                found[target.partition(":[")[0]] += 1
        return found

    def new(self) -> list[str]:
        """Return what is new, by kind."""
        return sorted((self._list() - self._start).elements())


async def find_leaks(descriptors: Descriptors) -> list[str]:
    """Return what is left of connections: tasks, descriptors, objects. What is about to end is given time."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        leaks = _look(descriptors)
        if not leaks or asyncio.get_running_loop().time() > deadline:
            return leaks
        await asyncio.sleep(0.1)


def _look(descriptors: Descriptors) -> list[str]:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    leaks = [f"task {task!r}" for task in tasks]
    leaks += [f"descriptor {name}" for name in descriptors.new()]
    gc.collect()
    kinds = Counter(
        type(thing).__name__
        for thing in gc.get_objects()
        if isinstance(thing, KTLSTransport | Handshake | RecordDriver)
    )
    return leaks + [f"{count} {name}" for name, count in kinds.items()]
