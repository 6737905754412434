"""What ends a command with one line on stderr."""

from __future__ import annotations

import re
from typing import Final, final

import click

__all__ = ("Failure", "reason")

#: "[SSL: REASON] reason text (_ssl.c:1006)"
_OPENSSL_FRAME: Final = re.compile(r"^\[[A-Z0-9_]+(?:: [A-Z0-9_]+)?\] | \(_ssl\.c:[0-9]+\)$")


@final
class Failure(click.ClickException):
    """The command can't do what was asked. The message says why, and what would help; the exit status is 1."""

    exit_code = 1


def reason(error: OSError) -> str:
    """Return what the system or OpenSSL says about ``error``, without numbers and file names."""
    text = error.strerror or str(error) or type(error).__name__
    return _OPENSSL_FRAME.sub("", text) or text
