from __future__ import annotations

import pytest

from .fixtures import case, layer, net
from .helpers import Case, matrix

__all__ = ("case", "layer", "net", "role", "version")


@pytest.fixture(params=matrix(roles=("client",), peers=("stdlib",), offloads=("auto",)), ids=str)
def version(request: pytest.FixtureRequest) -> Case:
    """Each version, as a client of the ``ssl`` module, wherever the policy ``auto`` puts the records."""
    case: Case = request.param
    return case


@pytest.fixture(params=matrix(peers=("stdlib",), offloads=("auto",)), ids=str)
def role(request: pytest.FixtureRequest) -> Case:
    """Each version in each role, wherever the policy ``auto`` puts the records."""
    case: Case = request.param
    return case
