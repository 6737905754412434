from __future__ import annotations

import pytest

from ..aio.helpers import Loop
from ..sockets.fixtures import watched_net

__all__ = ("loop", "watched_net")


@pytest.fixture(params=("functions", "uvloop"))
def loop(request: pytest.FixtureRequest) -> Loop:
    """asyncio's loop and uvloop's."""
    return Loop(request.param)
