"""What is left of a connection's secrets: in what a process shows (nothing), in its live objects (what it needs), in its memory (measured).

The process is another one, with a connection that lives its whole life; the peer is here and knows all secrets from its own key log.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from ktls.protocol.suites import suite_by_openssl_name
from ktls.record.userspace import UserspaceReceiver, UserspaceSender

from ..sockets.helpers import PATIENCE, Case, matrix, read_all, read_exactly, tcp_pair
from ..support import TLS12
from .finding import Secrets, key_logs_of, memory_of
from .living_process import ROUNDS

if TYPE_CHECKING:
    import ktls

    from ..support import Authority

PROGRAM: Final = Path(__file__).with_name("living_process.py")
STAGES: Final = ("established", "changed", "closed", "over")


@dataclass
class Stage:
    """What was found at one stage."""

    #: In reprs, strings, tracebacks with locals, and logs of all loggers.
    shown: set[str]
    length: int
    #: In live Python objects.
    live: set[str]
    #: In all memory of the process, whether in use or free.
    memory: set[str]
    #: In the memory files of its key logs.
    key_log: bytes
    descriptors: set[str]


class Life:
    """A life from beginning to end."""

    def __init__(self, authority: Authority, case: Case, directory: Path) -> None:
        self.case = case
        self.secrets = Secrets()
        self.stages: dict[str, Stage] = {}
        self._directory = directory
        client, server = tcp_pair()
        mine, theirs = (client, server) if case.role == "server" else (server, client)
        with theirs:
            self._process = self._start(authority, theirs)
        try:
            self._live(authority, mine)
        finally:
            self._process.kill()
            self._process.communicate()

    def _start(self, authority: Authority, sock: socket.socket) -> subprocess.Popen[str]:
        server = self.case.role == "server"
        plan = {
            "server": server,
            "offload": self.case.offload,
            "version": "TLSv1_2" if self.case.version is TLS12 else "TLSv1_3",
            "changes": self.case.may_refresh,
            "certificate": str(authority.server_chain if server else authority.ca_file),
            "directory": str(self._directory),
            "descriptor": sock.fileno(),
        }
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(PROGRAM), json.dumps(plan)],
            pass_fds=[sock.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _live(self, authority: Authority, sock: socket.socket) -> None:
        we_serve = self.case.role == "client"
        make = authority.ktls_server if we_serve else authority.ktls_client
        context = make(self.case.version)
        context.offload = "userspace"  # so that we can change keys on every kernel, and know them
        log = self._directory / "keys"
        context.keylog_filename = str(log)
        sock.settimeout(PATIENCE)
        tls = context.wrap_socket(sock, we_serve, server_hostname=None if we_serve else "localhost")
        with tls:
            self._learn(log, tls)
            self._look("established")
            for _ in range(ROUNDS):
                assert read_exactly(tls, 4) == b"ping"
                if self.case.version is not TLS12:
                    tls.refresh_traffic_keys()
                tls.sendall(b"pong")
            assert read_exactly(tls, 4) == b"done"
            self._learn(log, tls)
            self._look("changed", lambda: self._misbehave(tls))
            assert read_all_or_nothing(tls) == b""
            for stage in ("closed", "over"):
                self._learn(log, tls)
                self._look(stage)

    def _misbehave(self, tls: ktls.KTLSSocket) -> None:
        """Send a record that can't be opened."""
        os.write(tls.fileno(), b"\x17\x03\x03\x00\x30" + bytes(48))

    def _learn(self, log: Path, tls: ktls.KTLSSocket) -> None:
        cipher = tls.cipher()
        suite = suite_by_openssl_name(cipher[0]) if cipher is not None else None
        assert suite is not None
        self.secrets.read_key_log(log, suite)
        driver: Any = tls._driver
        if self.case.version is TLS12 and driver is not None:
            for name, layer in (("theirs", driver.sender), ("ours", driver.receiver)):
                assert isinstance(layer, UserspaceSender | UserspaceReceiver)
                self.secrets.known[f"{name}.key"] = layer._protection.keys.key

    def _look(self, name: str, before_going_on: Any = None) -> None:
        pid, pipe = self._process.pid, self._process
        assert pipe.stdout is not None
        assert pipe.stdin is not None
        assert pipe.stdout.readline() == f"{name}\n"
        shown, live = (self._directory / f"{name}.{kind}" for kind in ("shown", "live"))
        texts = json.loads(shown.read_text())
        shown_text = "\n".join([*texts["notes"], texts["log"]])
        memory: set[str] = set()
        for piece in memory_of(pid):
            memory |= self.secrets.found_in(piece)
        self.stages[name] = Stage(
            shown=self.secrets.shown_in(shown_text),
            length=len(shown_text),
            live=self.secrets.found_in(live.read_bytes()),
            memory=memory,
            key_log=b"".join(key_logs_of(pid)),
            descriptors=set(os.listdir(f"/proc/{pid}/fd")),
        )
        if before_going_on is not None:
            before_going_on()
        pipe.stdin.write("on\n")
        pipe.stdin.flush()


def read_all_or_nothing(tls: ktls.KTLSSocket) -> bytes:
    """What comes until the end, whichever end it is."""
    try:
        return read_all(tls)
    except OSError:
        return b""


#: Without kernel TLS that is user space.
CASES: Final = matrix(peers=("ktls",), offloads=("auto",))


@pytest.fixture(scope="module", params=CASES, ids=str)
def life(
    request: pytest.FixtureRequest, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Life:
    """One life for all tests that look at it."""
    return Life(authority, request.param, tmp_path_factory.mktemp("life"))


def of_connection(case: Case, tx: int, rx: int) -> set[str]:
    """What a connection needs at these generations of its keys."""
    if case.version is TLS12:
        keys = {"ours.key": case.tx_layer, "theirs.key": case.rx_layer}
        return {name for name, layer in keys.items() if layer == "userspace"}
    ours, theirs = ("CLIENT", "SERVER") if case.role == "client" else ("SERVER", "CLIENT")
    names = set()
    for who, layer, generation in ((ours, case.tx_layer, tx), (theirs, case.rx_layer, rx)):
        secret = f"{who}_TRAFFIC_SECRET_{generation}"
        names.add(secret)
        # The kernel has the keys; for a client of generation 0 the relay of tickets has those of the server, too.
        if layer == "userspace" or (case.role == "client" and who == theirs and not generation):
            names |= {f"{secret}.key", f"{secret}.iv"}
    return names


def test_the_secrets_are_known(life: Life) -> None:
    """Else nothing below would mean anything."""
    if life.case.version is TLS12:
        assert set(life.secrets.known) == {"CLIENT_RANDOM", "ours.key", "theirs.key"}
        return
    changes = ROUNDS if life.case.may_refresh else 0
    secrets = {name for name in life.secrets.known if "." not in name}
    ours, theirs = ("CLIENT", "SERVER") if life.case.role == "client" else ("SERVER", "CLIENT")
    assert secrets == {
        "EXPORTER_SECRET",
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        *(f"{ours}_TRAFFIC_SECRET_{generation}" for generation in range(changes + 1)),
        *(f"{theirs}_TRAFFIC_SECRET_{generation}" for generation in range(ROUNDS + 1)),
    }


def test_nothing_shows_a_secret(life: Life) -> None:
    """Reprs and strings of all our objects, exceptions with all locals of their frames, logs of all loggers."""
    assert {name: stage.shown for name, stage in life.stages.items()} == {
        name: set() for name in STAGES
    }
    assert life.stages["changed"].length > 2000
    assert life.stages["closed"].length > 2000


def test_the_key_log_is_erased(life: Life) -> None:
    """At every stage; and it is gone with its context."""
    for stage in life.stages.values():
        assert stage.key_log.strip(b"\0") == b""
    assert len(life.stages["established"].key_log) > 100
    assert life.stages["over"].key_log == b""


def test_live_objects_hold_what_is_needed_and_no_more(life: Life) -> None:
    """Secrets and keys of the present generation; with kernel TLS no keys, and with TLS 1.2 in the kernel nothing at all."""
    changes = ROUNDS if life.case.may_refresh else 0
    assert life.stages["established"].live == of_connection(life.case, 0, 0)
    assert life.stages["changed"].live == of_connection(life.case, changes, ROUNDS)


def test_live_objects_hold_nothing_after_the_end(life: Life) -> None:
    assert life.stages["closed"].live == set()
    assert life.stages["over"].live == set()


def test_no_descriptor_is_left(life: Life) -> None:
    assert life.stages["over"].descriptors == {"0", "1", "2"}


def test_what_remains_in_memory(life: Life) -> None:
    """Measured, not promised: freed memory is not erased by Python. Shown with ``-s``; the table of docs/security.md is made of it."""
    for name in ("changed", "closed", "over"):
        print(f"{life.case} {name}: {', '.join(sorted(life.stages[name].memory)) or 'nothing'}")
    # What never passes through our hands OpenSSL has erased.
    for name in ("closed", "over"):
        found = life.stages[name].memory
        assert not {secret for secret in found if "HANDSHAKE" in secret}
