from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ktls
from ktls.cli.local_ca import local_identity

from .helpers import DATA, LocalServer, RunningServer, ScriptedServer, running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktls.cli.local_ca import Identity


@pytest.fixture(scope="session")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests' local CA lives: never in the home directory of whoever runs them."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def identity(data_home: Path) -> Identity:
    return local_identity("127.0.0.1", data_home / "ktls")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, data_home: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(data_home))
    monkeypatch.setenv("PYTHONPATH", str(Path(ktls.__file__).parents[1]))
    monkeypatch.delenv("SSLKEYLOGFILE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ktls_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``ktls`` as a process of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ktls", *arguments],
            env=os.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    return run


@pytest.fixture
def server(identity: Identity, tmp_path: Path) -> Iterator[RunningServer]:
    """The server of ``ktls serve`` in a thread of this process, with an empty directory."""
    directory = tmp_path / "served"
    directory.mkdir()
    with running_server(identity, directory) as running:
        yield running


@pytest.fixture
def scripted(identity: Identity) -> Iterator[ScriptedServer]:
    """A TLS server that answers each connection with the next of its bytes."""
    with ScriptedServer(identity) as running:
        yield running


@pytest.fixture
def file(server: LocalServer) -> Path:
    """A file that the server has: ``DATA``."""
    path = server.directory / "file.bin"
    path.write_bytes(DATA)
    return path
