"""What ends a command with one line on stderr."""

from __future__ import annotations

from typing import final

import click

__all__ = ("Failure", "reason")


@final
class Failure(click.ClickException):
    """The command can't do what was asked. The message says why, and what would help; the exit status is 1."""

    exit_code = 1


def reason(error: OSError) -> str:
    """Return what the system says about ``error``, without number and file name."""
    return error.strerror or str(error) or type(error).__name__
