"""``curl`` against ``http.server`` on our sockets."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any, Final

from ..peers.parties import digest, payload
from ..peers.peers import Peers
from ..peers.test_curl import Server, Site
from .matrix import Cell, Mark
from .programs import FOLLOWED, SIZE, openssl_suite, restrict, row

_PEER: Final = "curl"


def _row(name: str, expected: str, **options: Any) -> Mark:
    return row(_PEER, name, expected, roles=("server",), engine=True, **options)


def _site(cell: Cell, peers: Peers) -> Site:
    restrict(cell, peers)
    server = Server(peers, peers.pki.server(cell.tls_version))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    peers.stack.callback(server.server_close)
    peers.stack.callback(thread.join)
    peers.stack.callback(server.shutdown)
    return Site(peers, server)


def _words(cell: Cell) -> tuple[str, ...]:
    if cell.version == "1.3":
        return "--tlsv1.3", "--tls13-ciphers", openssl_suite(cell)
    return "--tlsv1.2", "--tls-max", "1.2", "--ciphers", openssl_suite(cell)


@_row("downloads six files on one connection", FOLLOWED)
def test_downloads(cell: Cell, cell_peers: Peers) -> None:
    site, sizes = _site(cell, cell_peers), (0, 1, 16_383, 16_384, 16_385, SIZE)
    status, body, errors = site.curl(*_words(cell), *map(site.url, sizes))
    assert (status, errors) == (0, b"")
    assert digest(body) == digest(b"".join(map(payload, sizes)))
    assert site.server.seen.versions == [f"TLSv{cell.version}"]


@_row("uploads", FOLLOWED)
def test_uploads(cell: Cell, cell_peers: Peers, tmp_path: Path) -> None:
    site, path = _site(cell, cell_peers), tmp_path / "upload"
    path.write_bytes(payload(SIZE))
    words = *_words(cell), "--data-binary", f"@{path}"
    status, body, errors = site.curl(*words, site.url("upload"))
    assert (status, errors) == (0, b"")
    assert body.decode() == hashlib.sha256(payload(SIZE)).hexdigest()
    assert site.server.seen.versions == [f"TLSv{cell.version}"]
