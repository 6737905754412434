from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .helpers import Case, Net, matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..support import Authority


@pytest.fixture
def net(authority: Authority) -> Iterator[Net]:
    net = Net(authority)
    yield net
    net.close()


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
