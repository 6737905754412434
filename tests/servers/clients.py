"""Other people's clients, and what each must see; the kernel's counters beside them."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import httpx
from tests.peers.programs import PATIENCE, find_program
from tests.support import HOST, TLS12, Authority, TlsStat, has_kernel_tls, has_rekey
from websockets.asyncio.client import connect

from .programs import ServerProcess

__all__ = ("Visitor", "in_kernel")


_DEADLINE: Final = 10.0


def in_kernel(
    stat: TlsStat, connections: int, *, rx: bool | None = None, what: str = "TlsCurr"
) -> None:
    """Check that just now, or a moment later, ``connections`` connections are in the kernel, more than when ``stat`` was made. Where there is no kernel TLS: none.

    Of whom? The counters are those of all processes here; the other side uses plain ``ssl``, which stays in user space.
    """
    if rx is None:
        rx = has_rekey()
    expected = (
        connections if has_kernel_tls() else 0,
        connections if has_kernel_tls() and rx else 0,
    )
    deadline = time.monotonic() + _DEADLINE
    while (seen := (stat[f"{what}TxSw"], stat[f"{what}RxSw"])) != expected:
        assert time.monotonic() < deadline, (seen, expected)
        time.sleep(0.005)
    assert stat["TlsDecryptError"] == 0


class Visitor:
    """Uses the site that a server serves, with several clients."""

    def __init__(self, server: ServerProcess, authority: Authority, file: Path) -> None:
        self.server = server
        self.authority = authority
        self.contents: Final = file.read_bytes()
        #: Each visit leaves it as it found it: no connection in the kernel.
        self._stat = TlsStat()

    def url(self, path: str, scheme: str = "https") -> str:
        return f"{scheme}://{HOST}:{self.server.port}{path}"

    def connection(self, version: ssl.TLSVersion | None = None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1",
            self.server.port,
            timeout=PATIENCE,
            context=self.authority.client(version),
        )

    # --- the standard library --------------------------------------------------------------------------------------

    @staticmethod
    def _ask(
        client: http.client.HTTPConnection,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
    ) -> bytes:
        client.request(method, path, body)
        response = client.getresponse()
        answer = response.read()
        assert response.status == 200, (path, response.status, answer[:1000])
        return answer

    def use(self, client: http.client.HTTPConnection) -> dict[str, Any]:
        """Ask for everything that the site has, on one connection; return what the server says about itself."""
        assert self._ask(client, "/hello") == b"hello over https"
        assert self._ask(client, "/file") == self.contents
        expected = hashlib.sha256(self.contents).hexdigest().encode()
        assert self._ask(client, "/digest", "POST", self.contents) == expected
        assert self._ask(client, "/stream") == self.contents
        facts: dict[str, Any] = json.loads(self._ask(client, "/facts"))
        return facts

    def visit(self, version: ssl.TLSVersion | None = None) -> dict[str, Any]:
        """Use the site over one connection that is kept, and look at the kernel's counters while it is there."""
        client = self.connection(version)
        try:
            facts = self.use(client)
            in_kernel(self._stat, 1, rx=True if version is TLS12 else None)
        finally:
            client.close()
        in_kernel(self._stat, 0)
        return facts

    def visit_workers(self, count: int) -> None:
        """Visit until ``count`` processes have answered, all of them on a loop of ours."""
        seen: set[int] = set()
        deadline = time.monotonic() + PATIENCE
        while len(seen) < count:
            assert time.monotonic() < deadline, seen
            facts = self.visit()
            assert facts["loop"][0] == "ktls"
            seen.add(facts["pid"])
        assert self.server.pid not in seen

    # --- curl ------------------------------------------------------------------------------------------------------

    def curl(self, *arguments: object) -> bytes:
        """Run curl, which verifies the server; return what it prints."""
        done = subprocess.run(
            [
                *(find_program("curl"), "--silent", "--show-error", "--fail", "--noproxy", "*"),
                *("--cacert", str(self.authority.ca_file)),
                *("--resolve", f"{HOST}:{self.server.port}:127.0.0.1"),
                *map(str, arguments),
            ],
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), done
        return done.stdout

    def visit_with_curl(self, *options: str, protocol: str = "1.1") -> None:
        """Get the file twice on one connection. (A process that has made no connection before would count one more in the kernel: it tries what the kernel can do.)"""
        stat = TlsStat()
        answer = self.curl(
            *(*options, "--write-out", "<%{http_version} %{num_connects}>"),
            *(self.url("/file"), self.url("/file")),
        )
        expected = b"".join(
            self.contents + f"<{protocol} {connects}>".encode() for connects in (1, 0)
        )
        assert answer == expected
        in_kernel(stat, 1, rx=True if "1.2" in options else None, what="Tls")
        in_kernel(self._stat, 0)

    # --- httpx -----------------------------------------------------------------------------------------------------

    def visit_with_httpx(self, *, http2: bool = False) -> None:
        """Ask for several things, over the protocol that ALPN has chosen."""
        with httpx.Client(verify=self.authority.client(), http2=http2, trust_env=False) as client:
            answers = [client.get(self.url(path)) for path in ("/hello", "/file", "/stream")]
            answers.append(client.post(self.url("/digest"), content=self.contents))
            in_kernel(self._stat, 1)
        in_kernel(self._stat, 0)
        assert {answer.http_version for answer in answers} == {"HTTP/2" if http2 else "HTTP/1.1"}
        assert [answer.status_code for answer in answers] == [200] * 4
        hello, file, stream, digest = (answer.content for answer in answers)
        assert hello == b"hello over https"
        assert file == stream == self.contents
        assert digest == hashlib.sha256(self.contents).hexdigest().encode()

    # --- WebSocket -------------------------------------------------------------------------------------------------

    def visit_with_websocket(self) -> None:
        """Talk to the WebSocket of the site. (Not with the library's blocking client: it uses one ``SSLSocket`` in two threads, which hangs now and then.)"""
        asyncio.run(self._talk())
        in_kernel(self._stat, 0)

    async def _talk(self) -> None:
        async with connect(
            self.url("/echo", "wss"), ssl=self.authority.client(), proxy=None, max_size=None
        ) as websocket:
            for text in ("hello", "ä" * 40_000):
                await websocket.send(text)
                assert await websocket.recv() == text.upper()
            in_kernel(self._stat, 1)
