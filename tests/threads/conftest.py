from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from ..sockets.fixtures import net

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("net", "restless")


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)
