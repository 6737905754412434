"""That the bytes of files go by ``sendfile``, and that it is the kernel that encrypts them."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from tests.support import HOST, TlsStat

from .helpers import (
    H11,
    KTLS,
    KTLS_UVLOOP,
    OURS,
    Front,
    Server,
    body,
    pathsend,
    request,
    sends,
    start,
    zerocopysend,
)


class Sendfile:
    """Counts the bytes that ``os.sendfile`` has sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = 0
        self._sendfile = os.sendfile
        monkeypatch.setattr(os, "sendfile", self)

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        sent = self._sendfile(*args, **kwargs)
        self.sent += sent
        return sent


@pytest.fixture
def sendfile(monkeypatch: pytest.MonkeyPatch) -> Sendfile:
    """What ``os.sendfile`` does from now on."""
    return Sendfile(monkeypatch)


def exchange(server: Server, big: Path, small: Path, contents: bytes) -> None:
    """Answer some requests on one connection, with two big files and a part of one, and a small file."""
    with server.client() as client, big.open("rb") as file:
        for length in (len(contents), None):
            server.app = sends(start(length), pathsend(big))
            client.request("GET", "/")
            assert client.getresponse().read() == contents
        server.app = sends(start(), pathsend(small))
        client.request("GET", "/")
        assert client.getresponse().read() == small.read_bytes()
        server.app = sends(
            start(), zerocopysend(file, offset=9, count=100_000, more_body=True), body(b"end")
        )
        client.request("GET", "/")
        assert client.getresponse().read() == contents[9:100_009] + b"end"


@pytest.mark.kernel
@pytest.mark.parametrize("server", OURS, ids=str, indirect=True)
def test_the_kernel_encrypts_what_sendfile_sends(
    server: Server,
    big: Path,
    small: Path,
    contents: bytes,
    sendfile: Sendfile,
    tls_stat: TlsStat,
) -> None:
    exchange(server, big, small, contents)
    assert sendfile.sent == 2 * len(contents) + 100_000
    assert tls_stat["TlsTxSw"] == 1
    assert tls_stat["TlsDecryptError"] == 0


def count_records(stream: bytes) -> int:
    """Count the records in ``stream``, which must be whole."""
    count = 0
    while stream:
        length = int.from_bytes(stream[3:5])
        assert len(stream) >= 5 + length
        stream = stream[5 + length :]
        count += 1
    return count


@pytest.mark.parametrize("server", OURS, ids=str, indirect=True)
def test_a_small_file_is_one_record_with_its_head(server: Server, small: Path) -> None:
    server.app = sends(start(small.stat().st_size), pathsend(small))
    assert server.context is not None
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = server.context.wrap_bio(inward, outward, server_hostname=HOST)
    with socket.create_connection(server.address) as sock:
        sock.settimeout(20)

        def receive() -> bytes:
            data = sock.recv(65536)
            assert data
            inward.write(data)
            return data

        def exchange() -> bytes:
            """Make a request; return what came over the wire for it."""
            tls.write(request())
            sock.sendall(outward.read())
            wire, received = b"", b""
            while not received.endswith(small.read_bytes()):
                try:
                    received += tls.read(65536)
                except ssl.SSLWantReadError:
                    wire += receive()
            return wire

        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outward.read())
                receive()
        exchange()  # there may be tickets before this response, never before the next
        assert count_records(exchange()) == 1


@pytest.mark.parametrize(
    "server",
    [Front("asyncio", tls=False), Front("asyncio", tls=False, http=H11), Front(KTLS, tls=False)],
    ids=str,
    indirect=True,
)
def test_plain_connections_use_sendfile_too(
    server: Server, big: Path, small: Path, contents: bytes, sendfile: Sendfile
) -> None:
    exchange(server, big, small, contents)
    assert sendfile.sent == 2 * len(contents) + 100_000


@pytest.mark.parametrize(
    "server",
    [
        Front("asyncio", tls=True),
        Front("uvloop", tls=False),
        Front("uvloop", tls=True),
        Front(KTLS_UVLOOP, tls=False),
    ],
    ids=str,
    indirect=True,
)
def test_other_transports_do_without(
    server: Server, big: Path, small: Path, contents: bytes, sendfile: Sendfile
) -> None:
    exchange(server, big, small, contents)
    assert sendfile.sent == 0
