"""A browser, which knows nothing of us, loads a page with pictures from ``ktls serve``; the kernel protects every record of the server."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

import ktls

from ..peers.programs import Program
from ..support import TlsStat, has_rekey
from .page import WINDOW, Page, parse_report
from .png import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture
def browser() -> str:
    """The browser; a missing one is a failure, because tests that did not run are not tests that passed."""
    path = os.environ.get("KTLS_BROWSER")
    if not path:
        pytest.fail("KTLS_BROWSER is not set: lab/browser gets one, and prints its path")
    return path


@pytest.fixture(autouse=True)
def steady_network() -> None:
    """Have IPv6 loaded. It gives the loopback interface an address, and a browser drops its connections when addresses change (ERR_NETWORK_CHANGED)."""
    with suppress(OSError):  # a kernel without it will not change either
        socket.socket(socket.AF_INET6).close()


@pytest.fixture
def served(tmp_path: Path) -> Path:
    directory = tmp_path / "served"
    directory.mkdir()
    return directory


@pytest.fixture
def server(tmp_path: Path, served: Path) -> Iterator[Program]:
    """``ktls serve``, listening, with a certificate of its local CA."""
    program = Program(
        [sys.executable, "-m", "ktls", "serve", served, "--port", "0"],
        {
            "XDG_DATA_HOME": str(tmp_path / "data"),
            "PYTHONPATH": str(Path(ktls.__file__).parents[1]),
            "PYTHONUNBUFFERED": "1",
        },
    )
    try:
        try:
            listening = program.out.expect(rb"listening on https://127\.0\.0\.1:(\d+)/")
        except AssertionError as error:
            error.add_note(bytes(program.err).decode())
            raise
        program.port = int(listening[1])
        yield program
    finally:
        program.stop()


def take_picture(browser: str, url: str, directory: Path, screenshot: Path) -> str:
    """Load ``url``; write what the window shows to ``screenshot``, and return the document as the browser has it then."""
    width, height = WINDOW
    result = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",  # which wants namespaces, and not to be root
            "--disable-gpu",
            "--disable-software-rasterizer",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            f"--window-size={width},{height}",
            f"--user-data-dir={directory / 'profile'}",
            f"--ignore-certificate-errors-spki-list={pin(directory / 'data/ktls/cert.pem')}",
            f"--screenshot={screenshot}",
            "--dump-dom",
            url,
        ],
        env={**os.environ, "HOME": str(directory), "XDG_CACHE_HOME": str(directory / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert screenshot.exists(), result.stderr
    return result.stdout


def pin(certificate: Path) -> str:
    """Return what makes the browser trust exactly this certificate's key."""
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return base64.b64encode(digest.finalize()).decode("ascii")


def test_page_with_pictures(
    browser: str, server: Program, served: Path, tmp_path: Path, tls_stat: TlsStat
) -> None:
    page = Page(served)
    screenshot = Path(os.environ.get("KTLS_SCREENSHOT") or tmp_path / "screenshot.png")

    url = f"https://127.0.0.1:{server.port}/page.html"
    report = parse_report(take_picture(browser, url, tmp_path, screenshot))

    assert report.images == {
        image.name: (image.picture.width, image.picture.height) for image in page.images
    }
    assert report.resources == {path: (200, size) for path, size in page.sizes.items()}

    window = decode(screenshot.read_bytes())
    assert (window.width, window.height) == WINDOW
    different = [image.name for image in page.images if image.cut_from(window) != image.picture]
    assert not different

    assert log_of(server, page) == dict.fromkeys(
        page.sizes, "tx=kernel rx=kernel" if has_rekey() else "tx=kernel rx=userspace"
    )
    # The browser protects its own records, so whatever the kernel has counted was the server's.
    assert tls_stat["TlsTxSw"] > 0
    assert (tls_stat["TlsRxSw"] > 0) == has_rekey()
    assert tls_stat["TlsDecryptError"] == 0


def log_of(server: Program, page: Page) -> dict[str, str]:
    """Return who protected the answer, by path, as soon as all of ``page`` has been logged. A line comes after its answer, perhaps after the browser's end."""
    found: dict[str, str] = {}
    while len(found) < len(page.sizes):
        line = server.out.expect(rb'"GET (\S+) HTTP/1\.1" 200 .*\b(tx=\w+ rx=\w+)\b.*\n')
        found[line[1].decode()] = line[2].decode()
    return found
