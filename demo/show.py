"""What ``make demo`` shows: one server, several clients, and after each step what the kernel counted.

``show.py kernel`` fails unless the kernel's counters prove every line; ``show.py userspace`` runs the same on the userspace record layer.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ktls

SIZE = 64 * 2**20
NAME = "random.bin"
TLS_STAT = Path("/proc/net/tls_stat")
REFRESHES = 3


@dataclass
class Line:
    """One line of the table: what was done, whether it came out right, and what proves it."""

    what: str
    good: bool
    evidence: str


def tls_stat() -> dict[str, int]:
    """Return the kernel's counters."""
    if not TLS_STAT.exists():
        return {}
    return {name: int(value) for name, value in map(str.split, TLS_STAT.read_text().splitlines())}


class Demo:
    """The steps, each one a line of the table."""

    def __init__(self, directory: Path, port: int, trust: Path, digest: str, mode: str) -> None:
        self.directory = directory
        self.port = port
        self.trust = trust
        self.digest = digest
        self.mode = mode
        self.url = f"https://localhost:{port}/{NAME}"
        self.lines: list[Line] = []

    def step(self, what: str, wanted: dict[str, int], run: Callable[[], str]) -> None:
        """Run one step. ``wanted``: by how much each kernel counter must have grown, at least."""
        print(f"- {what} ...", flush=True)
        before, started = tls_stat(), time.monotonic()
        try:
            result, good = run(), True
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            result, good = f"{type(error).__name__}: {error}", False
        seconds = time.monotonic() - started
        self.lines.append(Line(what, good, f"{result} ({seconds:.1f} s)"))
        if self.mode != "kernel":
            self.lines.append(Line("  kernel counters", True, "not run: no kernel TLS here"))
            return
        after = tls_stat()
        grown = {name: after.get(name, 0) - before.get(name, 0) for name in wanted}
        errors = after.get("TlsDecryptError", 0) - before.get("TlsDecryptError", 0)
        enough = all(grown[name] >= least for name, least in wanted.items())
        evidence = ", ".join(f"{name} +{count}" for name, count in grown.items())
        self.lines.append(
            Line(
                "  kernel counters", enough and not errors, f"{evidence}, TlsDecryptError +{errors}"
            )
        )

    def ktls_get(self) -> str:
        """Download with our own command: splice from the kernel into the file."""
        target = self.directory / "by-ktls"
        command = [sys.executable, "-m", "ktls", "get", self.url, "-o", str(target)]
        command += ["--cacert", str(self.trust)]
        output = subprocess.run(command, check=True, capture_output=True, text=True)
        said = (output.stdout + output.stderr).strip().splitlines()
        return f"{self.compare(target)}; {said[-1] if said else 'it said nothing'}"

    def curl(self) -> str:
        """Download with curl."""
        target = self.directory / "by-curl"
        command = [
            "curl",
            "-sS",
            "--fail",
            "--cacert",
            str(self.trust),
            "-o",
            str(target),
            self.url,
        ]
        subprocess.run(command, check=True)
        return self.compare(target)

    def openssl(self) -> str:
        """Download with openssl s_client, speaking HTTP by hand."""
        target = self.directory / "by-openssl"
        command = ["openssl", "s_client", "-connect", f"localhost:{self.port}", "-quiet"]
        command += ["-servername", "localhost", "-CAfile", str(self.trust), "-verify_return_error"]
        request = f"GET /{NAME} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = subprocess.run(
            command, check=True, input=request.encode(), capture_output=True, timeout=300
        ).stdout
        target.write_bytes(answer.partition(b"\r\n\r\n")[2])
        return self.compare(target)

    def refresh(self) -> str:
        """Download with the library, changing both keys in the middle, several times."""
        seen = hashlib.sha256()
        with self.connect(self.context()) as tls:
            left = self.request(tls)
            while left:
                data = tls.recv(min(left, 2**18))
                if not data:
                    raise RuntimeError(f"{left} bytes are missing")
                seen.update(data)
                left -= len(data)
                done = SIZE - left
                if done * (REFRESHES + 1) // SIZE > tls.key_usage.tx.generation < REFRESHES:
                    tls.refresh_traffic_keys(request_peer=True)
            usage = tls.key_usage
        if seen.hexdigest() != self.digest:
            raise RuntimeError("the SHA-256 differs")
        if usage.tx.generation < REFRESHES or usage.rx.generation < 1:
            raise RuntimeError(f"keys were not changed: {usage}")
        return (
            f"SHA-256 equal; our key is generation {usage.tx.generation},"
            f" the server's {usage.rx.generation}"
        )

    def resume(self) -> str:
        """Connect twice with one context; the second connection must resume the first's session."""
        context = self.context()
        with self.connect(context) as first:
            self.drain(first)
            if first.session_reused:
                raise RuntimeError("the first connection can't have resumed anything")
        with self.connect(context) as second:
            self.drain(second)
            if not second.session_reused:
                raise RuntimeError("a full handshake was made")
            return f"session_reused is {second.session_reused}, by a ticket that came after the hand-off"

    def offload(self) -> str:
        """Say where the records of a connection are."""
        with self.connect(self.context()) as tls:
            offload = tls.offload
            if self.mode == "kernel" and (offload.tx, offload.rx) != ("kernel", "kernel"):
                raise RuntimeError(f"not in the kernel: {offload}")
            return (
                f"{tls.version()} {(tls.cipher() or ('?',))[0]}, tx={offload.tx}, rx={offload.rx}"
            )

    def context(self) -> ktls.SSLContext:
        """Make a client's context that trusts the demo's server."""
        return ktls.create_default_context(cafile=str(self.trust))

    def connect(self, context: ktls.SSLContext) -> ktls.KTLSSocket:
        """Connect to the demo's server."""
        sock = socket.create_connection(("localhost", self.port), timeout=60)
        return context.wrap_socket(sock, server_hostname="localhost")

    def request(self, tls: ktls.KTLSSocket, method: str = "GET") -> int:
        """Ask for the file; read the header of the answer, and return the length of the body."""
        tls.sendall(f"{method} /{NAME} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        header = b""
        while not header.endswith(b"\r\n\r\n"):
            byte = tls.recv(1)
            if not byte:
                raise RuntimeError("no answer")
            header += byte
        length = re.search(rb"(?i)^content-length: *(\d+)", header, re.MULTILINE)
        if not header.startswith(b"HTTP/1.1 200 ") or length is None:
            raise RuntimeError(header.split(b"\r\n")[0].decode())
        return int(length[1])

    def drain(self, tls: ktls.KTLSSocket) -> None:
        """Make a request, so that tickets have been read when it is answered."""
        self.request(tls, "HEAD")

    def compare(self, target: Path) -> str:
        """Compare a downloaded file with what was served."""
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.digest:
                raise RuntimeError("the SHA-256 differs")
        size = target.stat().st_size
        target.unlink()
        return f"SHA-256 of {size // 2**20} MiB equal"


@contextmanager
def served(directory: Path, data: Path) -> Iterator[tuple[int, Path]]:
    """Run ``ktls serve`` on a free port; yield the port and the certificate to trust."""
    environment = {**os.environ, "XDG_DATA_HOME": str(data), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ktls", "serve", str(directory), "--port", "0"]
    log = data / "server.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as server,
    ):
        assert server.stdout is not None
        try:
            port = None
            for line in server.stdout:
                found = re.search(r"listening on https://\S+?:(\d+)", line)
                if found is not None:
                    port = int(found[1])
                    break
            if port is None:
                raise RuntimeError(f"ktls serve did not start: {log.read_text()}")
            # The access log goes on in the pipe; a demo's worth of lines fits into it.
            yield port, next(data.rglob("ca*.pem"))
        finally:
            server.terminate()


def main() -> int:
    """Show everything; return 0 if every line of the table is good."""
    mode = sys.argv[1]
    print(f"Linux {platform.release()}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}")
    with tempfile.TemporaryDirectory() as scratch:
        root, out, data = (Path(scratch, name) for name in ("www", "out", "data"))
        for directory in (root, out, data):
            directory.mkdir()
        digest = hashlib.sha256()
        with (root / NAME).open("wb") as file:
            for _ in range(SIZE // 2**20):
                piece = os.urandom(2**20)
                digest.update(piece)
                file.write(piece)
        with served(root, data) as (port, trust):
            demo = Demo(out, port, trust, digest.hexdigest(), mode)
            both = {"TlsTxSw": 2, "TlsRxSw": 2}
            server = {"TlsTxSw": 1, "TlsRxSw": 1}
            keys = {"TlsTxRekeyOk": 2 * REFRESHES, "TlsRxRekeyOk": 2 * REFRESHES}
            demo.step("connect", both, demo.offload)
            demo.step("download with ktls get", both, demo.ktls_get)
            demo.step("download with curl", server, demo.curl)
            demo.step("download with openssl s_client", server, demo.openssl)
            demo.step("change both keys while downloading", both | keys, demo.refresh)
            demo.step("resume a session", {"TlsTxSw": 4, "TlsRxSw": 4}, demo.resume)
    print()
    width = max(len(line.what) for line in demo.lines)
    for line in demo.lines:
        print(f"{'ok ' if line.good else 'BAD'}  {line.what:<{width}}  {line.evidence}")
    bad = sum(not line.good for line in demo.lines)
    print(f"\n{bad} of {len(demo.lines)} lines are not so." if bad else "\nAll of it is so.")
    return 1 if bad else 0


if __name__ == "__main__":
    if shutil.which("curl") is None or shutil.which("openssl") is None:
        sys.exit("the demo needs curl and openssl (lab/peers gets them)")
    sys.exit(main())
