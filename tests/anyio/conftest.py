from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ..sockets.helpers import Case, Net, matrix
from .helpers import BACKENDS, Backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..support import Authority


@pytest.fixture
def net(authority: Authority) -> Iterator[Net]:
    net = Net(authority)
    yield net
    net.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each event loop that anyio runs on."""
    return Backend(request.param)


@pytest.fixture(params=matrix(), ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Everything: policy, version, our role, the peer's implementation."""
    case: Case = request.param
    return case


@pytest.fixture(params=matrix(roles=("client",), peers=("stdlib",)), ids=str)
def layer(request: pytest.FixtureRequest) -> Case:
    """Each record layer with each version, as a client of the ``ssl`` module."""
    case: Case = request.param
    return case
