"""The peers of ``long_run``: threads, each making one connection after the other with a random peer that does random things.

Told by JSON in its argument; says what every connection should have come to as a line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import pytest

import ktls

from ..peers import scripted as peers
from ..peers.parties import HOST, TLS12, TLS13, payload
from ..peers.programs import Program
from ..peers.scripted import CIPHERS, UPDATE, ScriptedPeer
from .misdeeds import BEHAVIOURS, CLEAN, Behaviour
from .victim import NAME, PIECE

PATIENCE: Final = 120.0
#: Bytes of a connection.
SMALLEST, LARGEST = 2_000, 300_000
#: Programs at a time: each is three threads and a process.
PROGRAMS: Final = threading.BoundedSemaphore(12)

TLSConnection: Final[Any] = vars(peers)["TLSConnection"]

_printing = threading.Lock()


def say(facts: dict[str, Any]) -> None:
    with _printing:
        print(json.dumps(facts), flush=True)


@dataclass
class Plan:
    """One connection: what is sent, and what must come of it."""

    name: str
    kind: str
    #: How much of the text has to arrive.
    size: int
    seed: int
    expected: str = CLEAN
    #: Records that our kernel can't open.
    bad: int = 0
    #: Bytes that came back, all of them the right ones.
    received: int = 0
    error: str | None = None
    #: Of the text, if that is more.
    length: int = 0

    def text(self) -> bytes:
        """What is sent: the name first."""
        self.length = self.size
        return text_of(self.name, self.length, self.seed)


def text_of(name: str, length: int, seed: int) -> bytes:
    """The name, and what looks like noise."""
    return name.encode() + payload(length - NAME, seed)


class World:
    """What all threads share."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.echo, self.files, self.orders = options["ports"]
        self.chain = Path(options["chain"])
        self.authority = options["authority"]
        self.file = Path(options["file"])
        self.seed: int = options["seed"]
        self.ends = time.monotonic() + options["seconds"]
        self.ecdsa = self.chain  # as ``_serve`` calls it
        self.clients = {v: self._client(ssl.SSLContext, v) for v in (TLS12, TLS13)}
        self.servers = {v: self._server(ssl.SSLContext, v) for v in (TLS12, TLS13)}
        settings = {"offload": "userspace", "key_limits": ktls.KeyLimits(records=150)}
        self.our_client = self._client(ktls.SSLContext, TLS13)
        self.our_server = self._server(ktls.SSLContext, TLS13)
        for context in (self.our_client, self.our_server):
            for name, value in settings.items():
                setattr(context, name, value)

    def _client(self, make: Any, version: ssl.TLSVersion) -> Any:
        context = make(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.authority)
        context.minimum_version = context.maximum_version = version
        return context

    def _server(self, make: Any, version: ssl.TLSVersion) -> Any:
        context = make(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.chain)
        context.minimum_version = context.maximum_version = version
        return context

    def order(self, plan: Plan, port: int) -> socket.socket:
        """Have the other process connect to ``port``."""
        orders = socket.create_connection(("127.0.0.1", self.orders), PATIENCE)
        orders.sendall(json.dumps({"port": port, "text": plan.text().decode()}).encode() + b"\n")
        return orders


class Worker(threading.Thread):
    """One connection after the other."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(name=f"worker {number}")
        self.world = world
        self.number = number

    def run(self) -> None:
        count = 0
        while time.monotonic() < self.world.ends:
            rng = random.Random(f"{self.world.seed} {self.number} {count}")
            name = f"{self.number:05}-{count:06}"
            count += 1
            kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
            plan = Plan(name, kind, rng.randrange(SMALLEST, LARGEST), rng.getrandbits(32))
            try:
                with ExitStack() as stack:
                    KINDS[kind][1](self.world, plan, rng, stack)
            except (Exception, pytest.fail.Exception) as error:
                plan.error = f"{type(error).__name__}: {error}"
                if not isinstance(error, OSError):
                    plan.error += "\n" + "".join(traceback.format_exception(error)[-4:])
            say(asdict(plan))


def pause(rng: random.Random) -> None:
    time.sleep(rng.random() ** 4 * 3)


def talk(tls: Any, plan: Plan, rng: random.Random, between: Callable[[], None]) -> None:
    """Send the text in pieces; all of it comes back."""
    text, at = plan.text(), 0
    while at < len(text):
        piece = text[at : at + rng.randrange(1, 60_000)]
        at += len(piece)
        tls.sendall(piece)
        back = bytearray()
        while len(back) < len(piece) and (data := tls.recv(65536)):
            back += data
        if back != piece:
            raise AssertionError(f"{len(back)} bytes of {len(piece)} came back, or wrong ones")
        plan.received += len(back)
        pause(rng)
        between()


def finish(tls: Any) -> None:
    """Say goodbye and wait for the answer."""
    tls.unwrap().close()


def with_stdlib(world: World, plan: Plan, rng: random.Random, stack: ExitStack) -> None:
    context = world.clients[rng.choice((TLS12, TLS13))]
    sock = socket.create_connection(("127.0.0.1", world.echo), PATIENCE)
    tls = stack.enter_context(context.wrap_socket(sock, server_hostname=HOST))
    talk(tls, plan, rng, lambda: None)
    finish(tls)


def with_ktls(world: World, plan: Plan, rng: random.Random, stack: ExitStack) -> None:
    sock = socket.create_connection(("127.0.0.1", world.echo), PATIENCE)
    tls = stack.enter_context(world.our_client.wrap_socket(sock, server_hostname=HOST))
    talk(tls, plan, rng, lambda: tls.refresh_traffic_keys(rng.random() < 0.5))
    finish(tls)


def with_openssl(world: World, plan: Plan, rng: random.Random, stack: ExitStack) -> None:
    version = rng.choice(("-tls1_3", "-tls1_2"))
    plan.size = min(plan.size, 60_000)
    with PROGRAMS:
        program = Program(
            [
                *("openssl", "s_client", "-brief", "-verify_return_error", version),
                *("-connect", f"127.0.0.1:{world.echo}", "-servername", HOST),
                *("-CAfile", world.authority),
            ]
        )
        stack.callback(program.stop)
        program.err.expect(b"Verification: OK")
        text = plan.text()
        for at in range(0, len(text), 7_000):
            if version == "-tls1_3" and at and rng.random() < 0.5:
                # A command is a line that it reads alone: everything before it has come back.
                program.type(rng.choice((b"k\n", b"K\n")))
                time.sleep(0.5)
            piece = text[at : at + 7_000]
            program.type(piece)
            alphabet = bytes(set(text))
            plan.received += len(piece)
            back = program.out.wait_for(alphabet, plan.received)
            assert back == text[: plan.received], "not what was sent"
        program.end_input()
        program.wait()


def with_gnutls(world: World, plan: Plan, rng: random.Random, stack: ExitStack) -> None:
    plan.size = min(plan.size, 60_000)
    with PROGRAMS:
        program = Program(
            [
                *("gnutls-cli", "127.0.0.1", "--port", world.echo, "--x509cafile", world.authority),
                *("--verify-hostname", HOST, "--sni-hostname", HOST, "--inline-commands"),
            ]
        )
        stack.callback(program.stop)
        program.out.expect(b"Handshake was completed")
        text = plan.text()
        before = bytes(program.out)
        alphabet = bytes(set(text))
        noise = len(before.translate(None, bytes(set(range(256)) - set(alphabet))))
        for at in range(0, len(text), 5_000):
            piece = text[at : at + 5_000]
            program.type(piece)
            plan.received += len(piece)
            program.out.wait_for(alphabet, noise + plan.received)
        program.end_input()
        program.wait()


def with_curl(world: World, plan: Plan, rng: random.Random, stack: ExitStack) -> None:
    plan.size = NAME
    with PROGRAMS:
        program = Program(
            [
                *("curl", "-sS", "--cacert", world.authority),
                *("--resolve", f"{HOST}:{world.files}:127.0.0.1"),
                f"https://{HOST}:{world.files}/{plan.name}",
            ]
        )
        stack.callback(program.stop)
        got = program.out.all()
        assert program.wait() == 0, bytes(program.err)
        assert got == world.file.read_bytes(), f"{len(got)} bytes, or wrong ones"
        plan.received = len(got)


def as_server(world: World, plan: Plan, rng: random.Random, stack: ExitStack) -> None:
    """The other process is the client; we echo, with ``ssl`` or with ``ktls`` in user space."""
    ours = rng.random() < 0.5
    context = world.our_server if ours else world.servers[rng.choice((TLS12, TLS13))]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        orders = stack.enter_context(world.order(plan, listener.getsockname()[1]))
        sock, _ = listener.accept()
    sock.settimeout(PATIENCE)
    tls = stack.enter_context(context.wrap_socket(sock, server_side=True))
    while data := tls.recv(65536):
        plan.received += len(data)
        if ours and rng.random() < 0.2:
            tls.refresh_traffic_keys(rng.random() < 0.5)
        tls.sendall(data)
        pause(rng)
    finish(tls)
    assert orders.recv(1) == b""


def scripted(world: World, plan: Plan, rng: random.Random, stack: ExitStack) -> None:
    """A peer that follows no rules: data first, then one thing."""
    role = rng.choice(("client", "server"))
    version = rng.choice(("1.3", "1.2"))
    fitting = [b for b in BEHAVIOURS if version in b.versions and role in b.roles]
    behaviour = rng.choice(fitting)
    plan.kind = f"scripted {role}, {version}: {behaviour.name}"
    plan.expected, plan.bad = behaviour.expected, behaviour.bad
    plan.size = rng.randrange(25_000, 50_000)  # more than our client sends at once
    tls_version = TLS13 if version == "1.3" else TLS12
    cipher = rng.choice([c for c in CIPHERS if "CCM" not in c])
    settings: Any = peers._settings(tls_version, cipher)
    if role == "client":
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", world.echo), PATIENCE))
        connection: Any = TLSConnection(sock)
        connection.handshakeClientCert(serverName=HOST, settings=settings)
        act_as_client(ScriptedPeer(sock, connection, "client"), plan, behaviour, rng)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(PATIENCE)
            orders = stack.enter_context(world.order(plan, listener.getsockname()[1]))
            sock = stack.enter_context(listener.accept()[0])
        sock.settimeout(PATIENCE)
        connection = TLSConnection(sock)
        peers._serve(connection, cast(Any, world), settings)  # only ``ecdsa`` is wanted of it
        act_as_server(ScriptedPeer(sock, connection, "server"), plan, behaviour, rng)
        sock.close()
        orders.recv(1)


def act_as_client(peer: ScriptedPeer, plan: Plan, behaviour: Behaviour, rng: random.Random) -> None:
    text = plan.text()
    half = len(text) // 2
    exchange(peer, plan, text[:half])
    behaviour.act(peer, rng)
    if behaviour.expected == CLEAN:
        exchange(peer, plan, text[half:])
        peer.close_notify()
        assert next_record(peer) in (None, (21, b"\x01\x00")), "no close_notify"
    else:
        plan.size = half
        wait_for_the_end(peer, behaviour)


def act_as_server(peer: ScriptedPeer, plan: Plan, behaviour: Behaviour, rng: random.Random) -> None:
    text = text_of(plan.name, plan.length, plan.seed)
    while plan.received < PIECE:
        echo_one(peer, plan)
    # The next piece comes when all of this one has been read: so nothing that the kernel refuses comes together with good data, which would make it try twice.
    record = next_record(peer)
    behaviour.act(peer, rng)
    if behaviour.expected != CLEAN:
        plan.size = plan.received
        wait_for_the_end(peer, behaviour)
        return
    echo(peer, plan, record)
    while plan.received < len(text):
        echo_one(peer, plan)
    assert next_record(peer) == (21, b"\x01\x00"), "no close_notify"
    peer.close_notify()


def echo_one(peer: ScriptedPeer, plan: Plan) -> None:
    echo(peer, plan, next_record(peer))


def echo(peer: ScriptedPeer, plan: Plan, record: tuple[int, bytes] | None) -> None:
    assert record is not None, "closed early"
    assert record[0] == 23, f"{record[0]} in place of data"
    plan.received += len(record[1])
    peer.send_data(record[1])


def exchange(peer: ScriptedPeer, plan: Plan, text: bytes) -> None:
    """Send some, get it back."""
    for at in range(0, len(text), 8_000):
        piece = text[at : at + 8_000]
        peer.send_data(piece)
        back = b""
        while len(back) < len(piece):
            record = next_record(peer)
            assert record is not None, "closed early"
            back += record[1]
        assert back == piece, "wrong bytes came back"
        plan.received += len(back)


def next_record(peer: ScriptedPeer) -> tuple[int, bytes] | None:
    """The next record that is no KeyUpdate; those are followed."""
    while (record := peer.read()) is not None:
        if record[0] != 22:
            return record
        assert record[1][:4] == UPDATE[:4], "a handshake message that is no KeyUpdate"
        peer.change_rx_key()
        if record[1][-1] == 1:
            peer.send_update(UPDATE)
    return None


def wait_for_the_end(peer: ScriptedPeer, behaviour: Behaviour) -> None:
    if behaviour.name == "RST":
        return  # closing is the reset
    try:
        while next_record(peer) is not None:
            pass
    except (OSError, AssertionError):
        pass  # a connection that we have broken


Kind = Callable[[World, Plan, random.Random, ExitStack], None]
#: How often, and what.
KINDS: Final[dict[str, tuple[int, Kind]]] = {
    "stdlib client": (4, with_stdlib),
    "ktls client, user space": (4, with_ktls),
    "openssl s_client": (1, with_openssl),
    "gnutls-cli": (1, with_gnutls),
    "curl": (1, with_curl),
    "server": (4, as_server),
    "scripted": (10, scripted),
}


def main(options: dict[str, Any]) -> None:
    world = World(options)
    workers = [Worker(world, number) for number in range(options["connections"])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    say({"done": len(workers), "descriptors": len(os.listdir("/proc/self/fd"))})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
