"""A server for each kind of loop and transport, shared by the tests of the session."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.support import Authority

from .helpers import FRONTS, Front, Server, sends, wait_for

SMALL: Final = 5_000
BIG: Final = 3 * 1024 * 1024 + 17


@pytest.fixture(scope="session")
def _servers() -> Iterator[tuple[ExitStack, dict[Front, Server]]]:
    with ExitStack() as stack:
        yield stack, {}


@pytest.fixture(params=FRONTS, ids=str)
def server(
    request: pytest.FixtureRequest,
    _servers: tuple[ExitStack, dict[Front, Server]],
    authority: Authority,
) -> Iterator[Server]:
    """A running server; the test sets its ``app``. At the end of the test no connection may be left."""
    stack, servers = _servers
    front: Front = request.param
    if front not in servers:
        servers[front] = stack.enter_context(Server(front, authority))
    running = servers[front]
    yield running
    running.app = sends()
    wait_for(lambda: not running.server_state.connections)


@pytest.fixture(scope="session")
def contents() -> bytes:
    """What the big file holds."""
    return random.Random(0).randbytes(BIG)


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory, contents: bytes) -> Path:
    """A file that is sent by ``sendfile``. Not to be changed."""
    path = tmp_path_factory.mktemp("asgi") / "big.bin"
    path.write_bytes(contents)
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, contents: bytes) -> Path:
    """A file that is sent together with its head. Not to be changed."""
    path = tmp_path_factory.mktemp("asgi") / "small.txt"
    path.write_bytes(contents[:SMALL])
    return path


@pytest.fixture
def growing(tmp_path: Path, contents: bytes) -> Path:
    """A file that the test may change."""
    path = tmp_path / "changing.bin"
    path.write_bytes(contents)
    return path
