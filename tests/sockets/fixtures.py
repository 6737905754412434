"""Fixtures that several rooms take over into their ``conftest``: connections, and the matrix of cases."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from .helpers import Case, Net, matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..support import Authority


def open_sockets() -> set[str]:
    """The sockets of this process."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the directory itself
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {name for name in found if name.startswith("socket:")}


@pytest.fixture
def net(authority: Authority) -> Iterator[Net]:
    """Makes connections, which are gone at the end of the test."""
    net = Net(authority)
    yield net
    net.close()


@pytest.fixture(name="net")
def watched_net(authority: Authority) -> Iterator[Net]:
    """Makes connections; at the end of the test no socket may be left that was not there before."""
    before = open_sockets()
    net = Net(authority)
    yield net
    net.close()
    assert open_sockets() <= before, "sockets are left open"


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
