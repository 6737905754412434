"""Exceptions of signal handlers, at every place where they can come: the k-th, for all k.

CPython runs handlers when a function of Python is entered, and after a function of C has returned (its result is lost if the handler raises then). ``sys.setprofile``
tells of exactly these places, and an exception of the profiler takes the same way as one of a handler.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import ktls

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

__all__ = ("Interrupted", "interrupted_at")

#: Where it may hit: the library, without what it ships for tests.
_SOURCES: Final = str(Path(ktls.__file__).parent)
_TESTING: Final = str(Path(ktls.__file__).parent / "testing")


class Interrupted(BaseException):
    """What the handler raises: as KeyboardInterrupt, no ``Exception``."""


def _in_library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(_SOURCES) and not name.startswith(_TESTING)


def interrupted_at(
    place: int, work: Callable[[], object], error: type[BaseException] = Interrupted
) -> str | None:
    """Run ``work`` in this thread and raise ``error`` at ``place`` (0 is the first), which has to get through; return which place it was.

    None: ``work`` has no such place, and ended as ever.
    """
    left = place
    hit: str | None = None

    def look(frame: FrameType, event: str, function: object) -> None:
        nonlocal left, hit
        if event not in ("call", "c_return") or hit is not None or not _in_library(frame):
            return
        if left:
            left -= 1
            return
        code = frame.f_code
        after = f" after {getattr(function, '__name__', function)}" if event == "c_return" else ""
        hit = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}{after}"
        raise error(hit)

    came: BaseException | None = None
    gc.disable()  # finalisers of what other tests have left are not meant
    sys.setprofile(look)
    try:
        work()
    except error as raised:
        came = raised
    finally:
        sys.setprofile(None)
        gc.enable()
    assert came is None or came.args == (hit,)
    assert hit is None or came is not None, f"{hit}: swallowed"
    return hit
