"""Fixtures of the matrix, and the hook that writes down what came of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack

import pytest

from ..peers.peers import Peers
from .matrix import Cell
from .record import DIFFERS, Recorder, output_directory
from .scene import CellPki, Scene, make_peers

_recorder = Recorder()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _recorder.note(item, report)
    return report


def pytest_sessionfinish() -> None:
    directory = output_directory()
    if directory is not None:
        _recorder.write(directory)


@pytest.fixture(scope="session")
def matrix_pki(tmp_path_factory: pytest.TempPathFactory) -> CellPki:
    """Certificates and contexts of all cells."""
    return CellPki(tmp_path_factory.mktemp("matrix"))


@pytest.fixture
def differs(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say why the layer at hand does something else than the row says."""
    return lambda why: record_property(DIFFERS, why)


@pytest.fixture
def cell_peers(cell: Cell, matrix_pki: CellPki) -> Iterator[Peers]:
    """The desk that starts peers; our contexts and expectations are those of ``cell``."""
    with ExitStack() as stack:
        peers = make_peers(cell, matrix_pki, stack)
        yield peers
    peers.counters.check()


@pytest.fixture
def scene(cell: Cell, cell_peers: Peers, differs: Callable[[str], None]) -> Scene:
    """A connection of ``cell`` with a scripted peer."""
    return Scene.open(cell, cell_peers, differs)
