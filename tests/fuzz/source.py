"""Decisions out of bytes: any bytes are an input, so that mutation, minimising and a corpus need to know nothing of what an input means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Source",)

_T = TypeVar("_T")

#: Sizes where things change: empty, one, around a block, around the limits of a record.
_SIZES: Final = (0, 1, 2, 13, 100, 1000, 4096, 16383, 16384)


class Source:
    """Reads ``data`` from the left. When it is used up all answers are zero, which always means the plain and usual thing."""

    __slots__ = ("_data", "_offset")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def __bool__(self) -> bool:
        return self._offset < len(self._data)

    def take(self, count: int) -> bytes:
        """Return up to ``count`` bytes."""
        chunk = self._data[self._offset : self._offset + count]
        self._offset += len(chunk)
        return chunk

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def byte(self) -> int:
        """Return a number below 256."""
        chunk = self.take(1)
        return chunk[0] if chunk else 0

    def below(self, bound: int) -> int:
        """Return a number below ``bound``."""
        if bound <= 256:
            return self.byte() % bound
        return int.from_bytes(self.take(3), "big") % bound

    def choice(self, options: Sequence[_T]) -> _T:
        """Return one of ``options``; the first is the usual one."""
        return options[self.below(len(options))]

    def chance(self, percent: int) -> bool:
        """Return True about ``percent`` times of a hundred, never when used up."""
        return self.byte() > 255 - percent * 256 // 100

    def size(self, most: int) -> int:
        """Return a length up to ``most``, more often than not an interesting one."""
        kind = self.byte()
        if kind < 160:
            return min(most, _SIZES[kind % len(_SIZES)])
        return self.below(most + 1) if kind > 224 else self.below(min(most, 64) + 1)
