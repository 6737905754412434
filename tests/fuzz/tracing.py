"""Coverage for our own fuzzers: which lines of the package followed each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ktls.protocol import connection as _connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

__all__ = ("TRACE_ONE_IN", "Coverage")

#: Tracing makes an execution some ten times slower.
TRACE_ONE_IN: Final = 8
_TRACED_DIRECTORY: Final = str(Path(_connection.__file__).parents[1])


class Coverage:
    """Pairs of lines that followed each other in the package."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()

    def trace(self, execute: Callable[[], object]) -> bool:
        """Call ``execute`` and say whether it reached anything new."""
        known = len(self.seen)
        before = sys.gettrace()  # that of coverage, in `make test`
        sys.settrace(self._call)
        try:
            execute()
        finally:
            sys.settrace(before)
        return len(self.seen) > known

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if not name.startswith(_TRACED_DIRECTORY):
            return None
        previous, seen = 0, self.seen

        def line(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            nonlocal previous
            seen.add((name, previous, frame.f_lineno))
            previous = frame.f_lineno
            return line

        return line
