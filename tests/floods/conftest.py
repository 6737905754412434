from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ..aio.conftest import open_sockets
from ..aio.helpers import Loop
from ..sockets.helpers import Net

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..support import Authority


@pytest.fixture
def net(authority: Authority) -> Iterator[Net]:
    """Makes connections; at the end of the test no socket may be left that was not there before."""
    before = open_sockets()
    net = Net(authority)
    yield net
    net.close()
    assert open_sockets() <= before, "sockets are left open"


@pytest.fixture(params=("functions", "uvloop"))
def loop(request: pytest.FixtureRequest) -> Loop:
    """asyncio's loop and uvloop's."""
    return Loop(request.param)
