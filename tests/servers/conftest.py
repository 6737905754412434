"""Fixtures of the servers' tests: a file to serve, and the servers that a test starts, gone when it ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import pytest
from tests.support import Authority

from .clients import Visitor
from .programs import ServerProcess

Start = Callable[..., Visitor]


@pytest.fixture(scope="session")
def served_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough for several records and for a full TCP buffer."""
    path = tmp_path_factory.mktemp("site") / "contents.bin"
    path.write_bytes(random.Random(0).randbytes(700_001))
    return path


@pytest.fixture
def start(authority: Authority, served_file: Path) -> Iterator[Start]:
    """Start a server by its command line; return a visitor. It says its address on ``says``."""
    with ExitStack() as stack:

        def started(*argv: object, says: Literal["out", "err"] = "err") -> Visitor:
            server = ServerProcess(argv, served_file)
            stack.callback(server.clear)
            server.await_address(getattr(server, says))
            return Visitor(server, authority, served_file)

        yield started
