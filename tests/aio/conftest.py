from __future__ import annotations

import pytest

from ..sockets.fixtures import layer, watched_net
from ..sockets.helpers import Case, matrix
from .helpers import LOOPS, Loop

__all__ = ("case", "layer", "loop", "one_of_each", "watched_net")


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    """Each event loop, with each way to ask it for kernel TLS."""
    return Loop(request.param)


@pytest.fixture(params=("functions", "uvloop"))
def one_of_each(request: pytest.FixtureRequest) -> Loop:
    """asyncio's loop and uvloop's: for what does not depend on how kernel TLS was asked for."""
    return Loop(request.param)


@pytest.fixture(params=matrix(peers=("stdlib",)), ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Each record layer, version and role, with a peer of the ``ssl`` module."""
    case: Case = request.param
    return case
