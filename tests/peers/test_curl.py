"""``curl`` against ``http.server`` on our sockets."""

from __future__ import annotations

import hashlib
import http.server
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ktls

from .parties import HOST, TLS12, TLS13, digest, payload
from .peers import Peers
from .programs import Program

SIZE = 256 * 1024


@dataclass
class Seen:
    """What the server saw."""

    versions: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


class Server(http.server.ThreadingHTTPServer):
    """``http.server`` whose listening socket is ours, as it would be with ``ssl``."""

    def __init__(self, peers: Peers, context: ktls.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.peers, self.seen = peers, Seen()
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    server: Server

    def setup(self) -> None:
        super().setup()
        tls = self.connection
        assert isinstance(tls, ktls.KTLSSocket)
        tls.do_handshake()
        self.server.peers.counters.established(tls)
        self.server.seen.versions.append(tls.version())

    def _answer(self, body: bytes) -> None:
        self.server.seen.paths.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer(payload(int(self.path[1:])))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(hashlib.sha256(body).hexdigest().encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Say nothing."""


@dataclass
class Site:
    """A server at work, and curl on its way to it."""

    peers: Peers
    server: Server

    def url(self, path: object) -> str:
        return f"https://{HOST}:{self.server.server_port}/{path}"

    def curl(self, *arguments: object) -> tuple[int, bytes, bytes]:
        """Run curl, which verifies our certificate; return its exit status, output and complaints."""
        port = self.server.server_port
        program: Program = self.peers.start(
            [
                *("curl", "--silent", "--show-error", "--fail", "--http1.1", "--noproxy", "*"),
                *("--cacert", self.peers.pki.ca, "--resolve", f"{HOST}:{port}:127.0.0.1"),
                *arguments,
            ]
        )
        status = program.wait()
        return status, program.out.all(), program.err.all()


@pytest.fixture
def site(peers: Peers, request: pytest.FixtureRequest) -> Site:
    """Serves all versions, or the one that the test asks for by ``indirect``."""
    server = Server(peers, peers.pki.server(getattr(request, "param", None)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    peers.stack.callback(server.server_close)
    peers.stack.callback(thread.join)
    peers.stack.callback(server.shutdown)
    return Site(peers, server)


VERSIONS = pytest.mark.parametrize(
    ("words", "version"),
    [
        pytest.param(("--tlsv1.2", "--tls-max", "1.2"), "TLSv1.2", id="1.2"),
        pytest.param(("--tlsv1.3",), "TLSv1.3", id="1.3"),
        pytest.param((), "TLSv1.3", id="best"),
    ],
)


@VERSIONS
def test_get(site: Site, words: tuple[str, ...], version: str) -> None:
    status, body, errors = site.curl(*words, site.url(SIZE))
    assert (status, errors) == (0, b"")
    assert digest(body) == digest(payload(SIZE))
    assert site.server.seen.versions == [version]


@VERSIONS
def test_keep_alive(site: Site, words: tuple[str, ...], version: str) -> None:
    sizes = [0, 1, 16_383, 16_384, 16_385, 100_000]
    status, body, errors = site.curl(*words, *map(site.url, sizes))
    assert (status, errors) == (0, b"")
    assert digest(body) == digest(b"".join(map(payload, sizes)))
    assert site.server.seen.paths == [f"/{size}" for size in sizes]
    assert site.server.seen.versions == [version]  # one connection


@VERSIONS
def test_upload(site: Site, words: tuple[str, ...], version: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(payload(SIZE))
    status, body, errors = site.curl(*words, "--data-binary", f"@{path}", site.url("upload"))
    assert (status, errors) == (0, b"")
    assert body.decode() == hashlib.sha256(payload(SIZE)).hexdigest()


def test_upload_and_download_on_one_connection(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(payload(SIZE))
    status, body, errors = site.curl(
        *("--data-binary", f"@{path}", site.url("upload"), "--next"),
        *("--silent", "--show-error", "--fail", "--cacert", site.peers.pki.ca, site.url(SIZE)),
    )
    assert (status, errors) == (0, b"")
    expected = hashlib.sha256(payload(SIZE)).hexdigest().encode() + payload(SIZE)
    assert digest(body) == digest(expected)
    assert len(site.server.seen.versions) == 1


def test_tls_max(site: Site) -> None:
    status, _, _ = site.curl("--tls-max", "1.2", site.url(10))
    assert status == 0
    assert site.server.seen.versions == ["TLSv1.2"]


@pytest.mark.parametrize(
    ("site", "words"),
    [(TLS13, ("--tls-max", "1.2")), (TLS12, ("--tlsv1.3",))],
    indirect=["site"],
    ids=["too-old", "too-new"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_common_version(site: Site, words: tuple[str, ...]) -> None:
    site.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # it prints
    status, body, errors = site.curl(*words, site.url(10))
    assert (status, body) == (35, b""), errors  # CURLE_SSL_CONNECT_ERROR
    assert site.server.seen.versions == []
