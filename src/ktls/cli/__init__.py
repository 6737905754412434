"""The command ``ktls``: one module per command, loaded when it is asked for.

Needs ``click`` and ``rich`` (the extra ``cli``); this module itself does not.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("main",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ktls`` with ``arguments`` (default: those of the process) and return its exit status."""
    for needed in ("click", "rich"):
        try:
            importlib.import_module(needed)
        except ModuleNotFoundError:
            print(
                f"ktls: the command needs {needed}, which is not installed: pip install 'ktls[cli]'",
                file=sys.stderr,
            )
            return 1
    from .app import run

    return run(arguments)
