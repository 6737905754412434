"""Fixtures of the interoperability tests. Everything that is started here ends here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from .parties import KernelCounters, Pki
from .peers import Peers


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def peers(pki: Pki) -> Iterator[Peers]:
    counters = KernelCounters()
    with ExitStack() as stack:
        yield Peers(pki, counters, stack)
    counters.check()
