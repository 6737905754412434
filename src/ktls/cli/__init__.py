"""The command ``ktls``: one module per command, loaded when it is asked for.

Needs ``click`` and ``rich`` (the extra ``cli``); this module itself does not.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("main",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ktls`` with ``arguments`` (default: those of the process) and return its exit status."""
    try:
        import click
        import rich  # noqa: F401  # the commands need it; better said here than half way
    except ModuleNotFoundError as error:
        print(
            f"ktls: the command needs {error.name}, which is not installed: pip install 'ktls[cli]'",
            file=sys.stderr,
        )
        return 1
    from .app import run

    del click
    return run(arguments)
