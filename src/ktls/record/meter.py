"""When to ask a record layer for its count: seldom enough that it costs nothing, often enough that no limit is passed.

The layer's own sequence number is the truth; every use is only estimated here, never too low: sending makes one record per full fragment and one for the rest, receiving at least one
byte per record. After each look at the truth half of what is left may be used before the next, so a key is looked at about log2(limit) times in its life.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from ktls.protocol.limits import KeyLimits

__all__ = ("MAX_PIECE", "Meter")

#: Most bytes given to one system call. It bounds how long the lock of the sending side is held, and costs nothing measurable.
MAX_PIECE: Final = 2**20
_NEVER: Final = 2**62


@final
class Meter:
    """Use of the current key of one direction, estimated. Not thread-safe; belongs to that direction's lock."""

    __slots__ = ("_clock", "_limits", "_room", "_since", "_step", "octets")

    def __init__(self, limits: KeyLimits, clock: Callable[[], float], step: int = 1) -> None:
        """``step``: estimated records that always pass between two looks."""
        self._limits = limits
        self._clock = clock
        self._step = step
        self._since = clock() if limits.age is not None else 0.0
        self._room = 0
        self.octets = 0

    def key_changed(self) -> None:
        """Begin to count for a new key."""
        self.octets = 0
        if self._limits.age is not None:
            self._since = self._clock()
        self._room = 0

    def resume(self, octets: int, age: float) -> None:
        """Go on with a key under which ``octets`` bytes have passed, in use for ``age`` seconds."""
        self.octets = octets
        if self._limits.age is not None:
            self._since = self._clock() - age

    def used(self, records: int, octets: int) -> None:
        """Note an estimated use."""
        self._room -= records
        self.octets += octets

    def looked(self, sequence_number: int, limit: int | None) -> None:
        """Note the true count, and that the key is good until ``limit`` records."""
        if limit is None:
            self._room = _NEVER
        else:
            self._room = max(self._step, (limit - sequence_number + 1) // 2)

    def due(self) -> bool:
        """Whether it is time to look."""
        limits = self._limits
        return (
            self._room <= 0
            or (limits.octets is not None and self.octets >= limits.octets)
            or (limits.age is not None and self._clock() - self._since >= limits.age)
        )

    def spare(self) -> int:
        """How many records may be used before the next look is due, without counting anything else; 0 where bytes or time are limited, too."""
        if self._limits.age is not None or self._limits.octets is not None:
            return 0
        return max(0, self._room)

    def allowance(self, max_fragment: int) -> int:
        """How many bytes may be sent before the next look, in one piece."""
        allowed = min(MAX_PIECE, max(1, self._room) * max_fragment)
        if self._limits.octets is not None:
            allowed = min(allowed, max(1, self._limits.octets - self.octets))
        return allowed
