"""What the tests of reading share: protocols that take data each in their way, and an end in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.enums import ContentType

from .helpers import BufferedKeeper, Keeper, Scripted, until

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("ALERT", "DATA", "HANDSHAKE", "KEEPERS", "KEEPER_NAMES", "finish", "keepers")

DATA = ContentType.APPLICATION_DATA
HANDSHAKE = ContentType.HANDSHAKE
ALERT = ContentType.ALERT
KEEPERS: list[Callable[..., Any]] = [
    Keeper,
    BufferedKeeper,
    lambda **options: BufferedKeeper(1, **options),
    lambda **options: BufferedKeeper(2**20, **options),
]
KEEPER_NAMES = ["protocol", "buffered", "buffered-1", "buffered-1M"]
keepers = pytest.mark.parametrize("keeper", KEEPERS, ids=KEEPER_NAMES)


async def finish(link: Scripted) -> None:
    """End the connection in order, from the peer's side."""
    link.peer.send_alert()
    await link.hear_all()
    await until(lambda: link.diary.lost)
    assert link.diary.error is None
