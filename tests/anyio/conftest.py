from __future__ import annotations

import pytest

from ..sockets.fixtures import case, layer, net
from .helpers import BACKENDS, Backend

__all__ = ("backend", "case", "layer", "net")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each event loop that anyio runs on."""
    return Backend(request.param)
