"""Run as a program: live under restrictions, make connections, and print as JSON what became of them.

    python -m tests.degraded.session DIRECTORY [proc] [nobody] [policy:NAME]...

Every connection carries data both ways and is closed in order; anything else is an exception, and exit status 1. The peer is the ``ssl`` module. DIRECTORY holds the certificates
(see ``write_certificates``).
"""

from __future__ import annotations

import asyncio
import encodings.ascii
import encodings.idna  # noqa: F401  # what is imported late may not be readable any more
import gc
import json
import logging
import os
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Final, cast

import trustme
from click.testing import CliRunner

import ktls
import ktls.aio
from ktls.cli.doctor import command

from . import restrictions

HOST: Final = "localhost"
PATIENCE: Final = 30
SIZE: Final = 100_000
#: With suites of TLS 1.2 by name, those of TLS 1.3 by OpenSSL's configuration.
KINDS: Final = {
    "TLS 1.3": (ssl.TLSVersion.TLSv1_3, None),
    "TLS 1.2 AES-GCM": (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-GCM-SHA256"),
    "TLS 1.2 ChaCha20": (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-CHACHA20-POLY1305"),
}
DATA: Final = bytes(range(250)) * (SIZE // 250)


def write_certificates(directory: Path) -> None:
    """Make what the program needs; readable for everybody."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(
        str(directory / "server.pem")
    )
    for name in ("ca.pem", "server.pem"):
        (directory / name).chmod(0o644)


def context(directory: Path, kind: str, *, server: bool, ours: bool = True) -> Any:
    """A context for one kind of connection."""
    version, ciphers = KINDS[kind]
    make = ktls.SSLContext if ours else ssl.SSLContext
    made = make(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = made.maximum_version = version
    if ciphers is not None:
        made.set_ciphers(ciphers)
    if server:
        made.load_cert_chain(directory / "server.pem")
    else:
        made.load_verify_locations(directory / "ca.pem")
    return made


def peer(sock: socket.socket, its_context: Any, *, server: bool) -> None:
    """Echo until close_notify, with the ``ssl`` module."""
    sock.settimeout(PATIENCE)
    name = None if server else HOST
    with sock, its_context.wrap_socket(sock, server_side=server, server_hostname=name) as tls:
        tls.suppress_ragged_eofs = False
        while data := tls.recv(65536):
            tls.sendall(data)
        tls.unwrap().close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def blocking(directory: Path, kind: str, *, server: bool, offload: Any = "auto") -> Any:
    """Make a connection with sockets; return where it was protected, and why."""
    ours, theirs = tcp_pair()
    its_context = context(directory, kind, server=not server, ours=False)
    our_context = context(directory, kind, server=server)
    our_context.offload = offload
    with ThreadPoolExecutor(1) as threads, closing(ours), closing(theirs):
        echo = threads.submit(peer, theirs, its_context, server=not server)
        ours.settimeout(PATIENCE)
        name = None if server else HOST
        try:
            tls = our_context.wrap_socket(ours, server_side=server, server_hostname=name)
        except ktls.OffloadError as error:
            return {"refused": error.reason}
        tls.sendall(DATA)
        back = bytearray()
        while len(back) < SIZE:
            back += tls.recv(65536)
        assert back == DATA
        usage = usage_of(tls)
        found = {**asdict(tls.offload), "cipher": tls.cipher()[0], "usage": usage}
        tls.unwrap().close()  # what is plain TCP again; in the kernel the same socket
        tls.close()
        echo.result(PATIENCE)
    return found


def usage_of(tls: Any) -> Any:
    """How many records were counted: sending, receiving; or what was said instead."""
    try:
        usage = tls.key_usage
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if usage is None else [usage.tx.records, usage.rx.records]


def asdict(offload: ktls.Offload) -> dict[str, str | None]:
    return {"tx": offload.tx, "rx": offload.rx, "reason": offload.reason}


async def asynchronous(directory: Path, kind: str) -> Any:
    """The same through asyncio's server, with a client in a thread."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(SIZE)
        writer.write(data)
        await writer.drain()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        done.set_result(asdict(writer.get_extra_info("ktls").offload))

    server = await ktls.aio.start_server(
        handle, "127.0.0.1", 0, ssl=context(directory, kind, server=True)
    )
    address = cast(Any, server).sockets[0].getsockname()

    def client() -> bytes:
        its_context = context(directory, kind, server=False, ours=False)
        with socket.create_connection(address, PATIENCE) as sock:
            tls = its_context.wrap_socket(sock, server_hostname=HOST)
            tls.sendall(DATA)
            back = bytearray()
            while len(back) < SIZE:
                back += tls.recv(65536)
            tls.unwrap().close()
            return bytes(back)

    assert await asyncio.to_thread(client) == DATA
    found = await done
    server.close()
    await server.wait_closed()
    return found


def doctor() -> Any:
    """What ``ktls doctor`` says, and its exit status."""
    result = CliRunner().invoke(command, ["--json"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    report = json.loads(result.stdout)
    return {"status": result.return_value, "verdict": report["verdict"]["text"]}


def restrict(words: list[str]) -> None:
    """Take away what the words say."""
    if "proc" in words:
        restrictions.hide_proc()
    if "nobody" in words:
        restrictions.become_nobody()
    for word in words:
        if word.startswith("policy:"):
            restrictions.forbid(restrictions.POLICIES[word.removeprefix("policy:")])


class _Lines(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.levelname}: {record.getMessage()}")


def main(directory: Path, words: list[str]) -> None:
    restrict(words)
    log = _Lines()
    logging.getLogger().addHandler(log)
    logging.getLogger().setLevel(logging.INFO)
    found: dict[str, Any] = {}
    descriptors = count_descriptors()
    for kind in KINDS:
        found[f"{kind}, server"] = blocking(directory, kind, server=True)
        found[f"{kind}, client"] = blocking(directory, kind, server=False)
        found[f"{kind}, asyncio"] = asyncio.run(asynchronous(directory, kind))
        found[f"{kind}, demanded"] = blocking(directory, kind, server=True, offload="kernel")
    found["doctor"] = doctor()
    found["log"] = log.lines
    gc.collect()
    found["descriptors"] = [descriptors, count_descriptors()]
    print(json.dumps(found), flush=True)


def count_descriptors() -> int:
    """By trying: there may be no /proc."""
    count = 0
    for fd in range(256):
        try:
            os.fstat(fd)
        except OSError:
            continue
        count += 1
    return count


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
