"""``ktls serve`` as a target: one process for each record layer, and clients of it."""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from ktls.protocol.enums import ContentType

from ..cli.helpers import Command, serve_command
from ..peers.parties import HOST, payload
from ..peers.peers import Peers
from ..peers.programs import PATIENCE
from ..peers.scripted import ScriptedPeer, _settings
from .matrix import Cell
from .scene import DIRECTIONS, CellPki, policy_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports asyncore
    from tlslite.api import TLSConnection

#: The files that are served: name, content. The second needs several records.
SMALL: Final = payload(500, seed=1)
LARGE: Final = payload(100_000, seed=2)
FILES: Final = {"small": SMALL, "large": LARGE}
#: Suites of TLS 1.2 that a server has by default.
SUITES12: Final = ("AES-128-GCM", "AES-256-GCM", "ChaCha20-Poly1305")


def request(name: str = "small", *fields: str) -> bytes:
    """Return a request for one of the files."""
    lines = (f"GET /{name} HTTP/1.1", f"Host: {HOST}", *fields, "", "")
    return "\r\n".join(lines).encode()


class Servers:
    """``ktls serve`` with each policy, started when it is needed."""

    def __init__(self, pki: CellPki, directory: Path, stack: contextlib.ExitStack) -> None:
        self._pki, self._directory, self._stack = pki, directory, stack
        self._running: dict[str, Command] = {}
        for name, content in FILES.items():
            (directory / name).write_bytes(content)

    def get(self, cell: Cell) -> Command:
        """The server whose connections use the layer of ``cell``."""
        policy = policy_for(cell.layer, cell.version)
        if policy not in self._running:
            options = ("--offload", policy, "--cert", str(self._pki.ecdsa), "--metrics", "0")
            server = serve_command(self._directory, self._directory, *options)
            self._running[policy] = self._stack.enter_context(server)
        return self._running[policy]


@dataclass
class Target:
    """The server of ``cell``, and a check that connections were where the cell says."""

    cell: Cell
    server: Command
    peers: Peers

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}/"

    def _connections(self) -> float:
        tx, rx = DIRECTIONS[self.cell.layer]
        words = (f'tx="{tx}"', f'rx="{rx}"', f'version="TLSv{self.cell.version}"')
        return sum(
            value
            for series, value in self.server.metrics.items()
            if series.startswith("ktls_connections_total{")
            and all(word in series for word in words)
        )

    @contextlib.contextmanager
    def one_connection(self) -> Iterator[None]:
        """One more connection was made meanwhile, with its records in the layer of the cell; and the server still serves."""
        before = self._connections()
        yield
        assert self._connections() == before + 1
        assert self.server.process.poll() is None

    def may_fail_to_decrypt(self) -> None:
        """The kernel's counter of records that it could not open may grow."""
        self.peers.counters.may_fail_to_decrypt = True

    def client(self) -> HttpPeer:
        """A scripted client, connected."""
        sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        self.peers.stack.enter_context(sock)
        connection = TLSConnection(sock)
        settings = _settings(self.cell.tls_version, self.cell.suite)
        connection.handshakeClientCert(serverName=HOST, settings=settings)
        return HttpPeer(ScriptedPeer(sock, connection, "client"))


@dataclass
class HttpPeer:
    """A scripted client of HTTP."""

    peer: ScriptedPeer

    def get(self, name: str = "small") -> None:
        """Ask for a file, and get it."""
        self.peer.send_data(request(name))
        self.gets(FILES[name])

    def gets(self, content: bytes) -> None:
        """The answer is ``content``, in records of data only."""
        data = bytearray()
        while b"\r\n\r\n" not in data:
            data += self._data()
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        while len(body) < len(content):
            body += self._data()
        assert body == content

    def _data(self) -> bytes:
        record = self.peer.read()
        assert record is not None, "FIN inside an answer"
        kind, fragment = record
        assert kind == ContentType.APPLICATION_DATA, record
        return fragment

    def ends(self) -> list[tuple[int, bytes]]:
        """The server ends the connection; return the records that came first."""
        records: list[tuple[int, bytes]] = []
        with contextlib.suppress(ConnectionResetError):
            while (record := self.peer.read()) is not None:
                records.append(record)
        return records


@pytest.fixture(scope="session")
def serve_processes(
    matrix_pki: CellPki, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Processes of ``ktls serve``; they end with the session."""
    with contextlib.ExitStack() as stack:
        yield Servers(matrix_pki, tmp_path_factory.mktemp("served"), stack)


@pytest.fixture
def target(cell: Cell, cell_peers: Peers, serve_processes: Servers) -> Target:
    """The server of the cell at hand."""
    return Target(cell, serve_processes.get(cell), cell_peers)
