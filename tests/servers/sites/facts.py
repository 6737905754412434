"""What a server says about itself: its process, its loop, and how many bytes ``os.sendfile`` has sent in it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Final

__all__ = ("FILE", "facts")

#: The file that all sites serve.
FILE: Final = Path(os.environ["SITE_FILE"])

_sendfile: Final = os.sendfile
_sent = 0


def _counting(*args: Any, **kwargs: Any) -> int:
    global _sent
    sent = _sendfile(*args, **kwargs)
    _sent += sent
    return sent


os.sendfile = _counting


def facts() -> dict[str, Any]:
    """Say it."""
    loop = type(asyncio.get_running_loop())
    return {
        "pid": os.getpid(),
        "loop": [base.__module__.partition(".")[0] for base in loop.__mro__],
        "sent": _sent,
    }
