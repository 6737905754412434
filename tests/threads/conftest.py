from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from ..sockets.helpers import Net

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..support import Authority


@pytest.fixture
def net(authority: Authority) -> Iterator[Net]:
    net = Net(authority)
    yield net
    net.close()


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)
