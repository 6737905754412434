"""The process of the secrets tests: a connection lives its whole life in it, and others look at what it shows and keeps.

It is told what to do, never a secret: what is found in it, it has kept by itself. It stops at each stage, until it is told to go on.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import socket
import ssl
import sys
import traceback
from pathlib import Path
from typing import Any, Final

import ktls

ROUNDS: Final = 3


def live_values() -> bytes:
    """Everything that a live Python object has as bytes or as text."""
    seen: set[int] = set()
    found: list[bytes] = []
    waiting = gc.get_objects()
    while waiting:
        item = waiting.pop()
        if id(item) in seen or item is seen or item is found or item is waiting:
            continue
        seen.add(id(item))
        if isinstance(item, bytes | bytearray):
            found.append(bytes(item))
        elif isinstance(item, memoryview):
            with contextlib.suppress(ValueError):  # released
                found.append(item.tobytes())
        elif isinstance(item, str):
            found.append(item.encode(errors="surrogatepass"))
        else:
            waiting += gc.get_referents(item)
    return b"\n".join(found)


class Life:
    """What the process says and shows on its way."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.notes: list[str] = []
        self.log = io.StringIO()

    def show(self, *things: object) -> None:
        """Note how ``things`` print."""
        for thing in things:
            self.notes += [repr(thing), str(thing)]

    def fails(self, call: Any) -> None:
        """Note the exception of ``call``: everything that a crash reporter would send."""
        try:
            call()
        except Exception as error:
            self.show(error, vars(error))
            shown = traceback.TracebackException.from_exception(error, capture_locals=True)
            self.notes += shown.format()
        else:
            raise AssertionError("there was to be an exception")

    def stage(self, name: str) -> None:
        """Tell what was shown so far, and wait."""
        gc.collect()
        shown = json.dumps({"notes": self.notes, "log": self.log.getvalue()})
        (self._directory / f"{name}.shown").write_text(shown)
        self.notes.clear()
        (self._directory / f"{name}.live").write_bytes(live_values())
        print(name, flush=True)
        if sys.stdin.readline() != "on\n":
            raise SystemExit(1)


def walk(life: Life, thing: object, depth: int = 6) -> None:
    """Show everything of ours that ``thing`` leads to."""
    if depth and type(thing).__module__.startswith("ktls"):
        life.show(thing)
        for inner in gc.get_referents(thing):
            walk(life, inner, depth - 1)


def live(life: Life, tls: ktls.KTLSSocket, *, changes: bool) -> None:
    """Data, key changes, data; everything that can be asked; errors of several kinds."""
    life.stage("established")
    for _ in range(ROUNDS):
        tls.sendall(b"ping")
        if tls.recv(4) != b"pong":
            raise AssertionError("there was to be an answer")
        if changes:
            tls.refresh_traffic_keys()
        life.show(tls, tls.offload, tls.key_usage, tls.session)
        walk(life, tls._driver)
    tls.sendall(b"done")
    life.fails(lambda: tls.recv(1, 5))
    life.fails(lambda: tls.sendfile(io.StringIO("text")))  # type: ignore[arg-type]  # a mistake
    life.stage("changed")
    life.fails(lambda: tls.recv(1))  # a record that can't be opened
    life.fails(lambda: tls.send(b"x"))
    life.fails(tls.refresh_traffic_keys)
    tls.close()
    life.show(tls)
    life.fails(lambda: tls.recv(1))


def run(life: Life, plan: dict[str, Any], sock: socket.socket) -> None:
    server: bool = plan["server"]
    context = ktls.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.offload = plan["offload"]
    context.minimum_version = context.maximum_version = ssl.TLSVersion[plan["version"]]
    if server:
        context.load_cert_chain(plan["certificate"])
    else:
        context.load_verify_locations(plan["certificate"])
    tls = context.wrap_socket(sock, server, server_hostname=None if server else "localhost")
    live(life, tls, changes=plan["changes"])
    del tls, sock
    life.stage("closed")
    del context
    life.stage("over")


def main() -> None:
    plan: dict[str, Any] = json.loads(sys.argv[1])
    life = Life(Path(plan["directory"]))
    logging.basicConfig(stream=life.log, level=logging.DEBUG)
    run(life, plan, socket.socket(fileno=plan["descriptor"]))


if __name__ == "__main__":
    main()
