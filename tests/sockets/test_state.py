"""A connection handed to another process: its descriptor by ``SCM_RIGHTS``, its state beside it."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls
from ktls.record.driver import Driver

from ..support import TLS12, TLS13
from .helpers import PATIENCE, Case, Net, fill, matrix, read_all, read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


PROGRAM: Final = Path(__file__).with_name("receiving_process.py")


class Elsewhere:
    """Another process, and the channel to it."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(PATIENCE)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                close_fds=True,
            )

    def take(self, tls: ktls.KTLSSocket) -> None:
        """Hand ``tls`` over; it is gone from here."""
        state = tls.export_state()
        socket.send_fds(self.channel, [state.to_bytes()], [tls.fileno()])
        tls.close()
        self._answer()

    def do(self, *request: Any) -> Any:
        """Run one of ``receiving_process.Commands`` there."""
        self.channel.send(json.dumps(request).encode())
        return self._answer()

    def fails(self, *request: Any) -> str:
        """Run a command that raises; return the name of the exception."""
        self.channel.send(json.dumps(request).encode())
        answer = json.loads(self.channel.recv(1 << 20))
        assert "error" in answer, answer
        name: str = answer["error"]
        return name

    def _answer(self) -> Any:
        answer = json.loads(self.channel.recv(1 << 20) or b'{"error": "it has died"}')
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        self.channel.close()
        self.process.wait(PATIENCE)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    elsewhere = Elsewhere()
    yield elsewhere
    elsewhere.close()


def exported_bytes(tls: ktls.KTLSSocket) -> bytes:
    return tls.export_state().to_bytes()


def again(tls: ktls.KTLSSocket, net: Net, **arguments: Any) -> ktls.KTLSSocket:
    """Hand ``tls`` over to ourselves."""
    state = exported_bytes(tls)
    sock = socket.socket(fileno=os.dup(tls.fileno()))
    sock.settimeout(PATIENCE)
    tls.close()
    successor: ktls.KTLSSocket = net.keep(ktls.KTLSSocket.from_state(sock, state, **arguments))
    return successor


def driver_of(tls: ktls.KTLSSocket) -> Driver:
    driver = tls._driver
    assert isinstance(driver, Driver)
    return driver


# --- another process goes on ---------------------------------------------------------------------------------------------


def facts_of(tls: ktls.KTLSSocket) -> Any:
    from .receiving_process import Commands

    return json.loads(json.dumps(Commands(tls).facts()))


def test_another_process_goes_on(net: Net, case: Case, elsewhere: Elsewhere) -> None:
    link = net.link(case, timeout=PATIENCE)
    link.theirs.sendall(b"before")
    assert read_exactly(link.ours, 6) == b"before"
    link.ours.sendall(b"from here")
    assert read_exactly(link.theirs, 9) == b"from here"
    facts, usage = facts_of(link.ours), link.ours.key_usage

    elsewhere.take(link.ours)
    assert elsewhere.do("facts") == facts
    assert elsewhere.do("usage") == [0, usage.tx.records, 0, usage.rx.records]
    link.theirs.sendall(b"after")
    assert elsewhere.do("recv", 5) == "after"
    elsewhere.do("send", "from there", 3)
    assert read_exactly(link.theirs, 30) == b"from there" * 3
    assert elsewhere.do("usage") == [0, usage.tx.records + 3, 0, usage.rx.records + 1]
    elsewhere.do("close")
    assert read_all(link.theirs) == b""  # an end without close_notify would be an error


#: Where both sides can change keys; without rekey see test_a_kernel_without_rekey_goes_on_without.
REFRESHABLE: Final = [
    case for case in matrix(versions=(TLS13,), peers=("ktls",)) if case.may_refresh
]


@pytest.mark.parametrize("case", REFRESHABLE, ids=str)
def test_keys_change_in_the_other_process(net: Net, case: Case, elsewhere: Elsewhere) -> None:
    """It has the secrets: it follows the peer's KeyUpdate, answers it, and makes its own."""
    link = net.link(case, timeout=PATIENCE, changing_peer=True)
    link.ours.refresh_traffic_keys()
    link.theirs.refresh_traffic_keys()
    link.theirs.sendall(b"one")
    assert read_exactly(link.ours, 3) == b"one"
    elsewhere.take(link.ours)
    link.theirs.refresh_traffic_keys(request_peer=True)
    link.theirs.sendall(b"two")
    assert elsewhere.do("recv", 3) == "two"
    elsewhere.do("send", "three")
    assert read_exactly(link.theirs, 5) == b"three"
    assert elsewhere.do("usage")[::2] == [2, 2]
    elsewhere.do("refresh", True)
    elsewhere.do("send", "four")
    assert read_exactly(link.theirs, 4) == b"four"
    link.theirs.sendall(b"five")
    assert elsewhere.do("recv", 4) == "five"
    assert elsewhere.do("usage") == [3, 1, 3, 1]
    assert link.theirs.key_usage.tx.generation == 3
    elsewhere.do("close")
    assert read_all(link.theirs) == b""


@pytest.mark.norekey
def test_a_kernel_without_rekey_goes_on_without(net: Net, elsewhere: Elsewhere) -> None:
    """Sending in the kernel, receiving in user space: the peer may change its key, we can't."""
    link = net.link(Case(peer="ktls"), timeout=PATIENCE, changing_peer=True)
    elsewhere.take(link.ours)
    link.theirs.refresh_traffic_keys()
    link.theirs.sendall(b"new")
    assert elsewhere.do("recv", 3) == "new"
    assert elsewhere.do("usage")[::2] == [0, 1]
    assert elsewhere.fails("refresh", False) == "LocalProtocolError"
    elsewhere.do("send", "on")
    assert read_exactly(link.theirs, 2) == b"on"
    link.theirs.refresh_traffic_keys(request_peer=True)
    link.theirs.sendall(b"!")
    assert elsewhere.do("recv", 1) == "!"
    assert elsewhere.fails("send", "what was demanded can't be done") == "KeyLimitError"


def test_limits_are_kept_in_the_other_process(net: Net, elsewhere: Elsewhere) -> None:
    """What was sent here counts there."""
    settings = ktls.Settings(offload="userspace", key_limits=ktls.KeyLimits(records=20))
    link = net.link(
        Case(peer="ktls", offload="userspace"),
        settings=settings,
        timeout=PATIENCE,
        changing_peer=True,
    )
    for _ in range(15):
        link.ours.sendall(b"x")
    elsewhere.take(link.ours)
    elsewhere.do("send", "x", 5)
    assert elsewhere.do("usage")[0] == 0
    elsewhere.do("send", "x", 2)
    assert elsewhere.do("usage")[:2] == [1, 2]
    assert read_exactly(link.theirs, 22) == b"x" * 22


@pytest.mark.parametrize("limit", [ktls.KeyLimits(octets=1000), ktls.KeyLimits(age=3600.0)])
def test_other_limits_are_carried(
    net: Net, limit: ktls.KeyLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes and age of a key: counted from where the predecessor was."""
    link = net.link(
        Case(peer="ktls", offload="userspace"),
        settings=ktls.Settings(offload="userspace", key_limits=limit),
        timeout=PATIENCE,
    )
    link.ours.sendall(bytes(900))
    half = driver_of(link.ours).connection._tx
    half.since -= 3000.0
    tls = again(link.ours, net)
    tls.sendall(b"1")
    assert tls.key_usage.tx.generation == 0
    tls.sendall(bytes(99))  # 1000: from here on a new key is due
    driver_of(tls).connection._tx.since -= 601.0
    driver_of(tls).sending._meter._since -= 601.0
    tls.sendall(b"!")
    assert tls.key_usage.tx.generation == 1
    assert read_exactly(link.theirs, 1001) == bytes(900) + b"1" + bytes(99) + b"!"


# --- what goes along -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", matrix(versions=(TLS13,), roles=("client",), peers=("stdlib",)), ids=str
)
def test_half_closed_connections(net: Net, case: Case) -> None:
    """Both halves' states go along (TLS 1.2 has no half close)."""
    link = net.link(case, timeout=PATIENCE)
    link.ours.shutdown(socket.SHUT_WR)
    assert read_all(link.theirs) == b""
    tls = again(link.ours, net)
    link.theirs.sendall(b"late")
    assert read_exactly(tls, 4) == b"late"
    with pytest.raises(ktls.LocalProtocolError, match="closed"):
        tls.send(b"no more")


def test_a_peer_that_has_closed(net: Net) -> None:
    link = net.link(Case(peer="ktls"), timeout=PATIENCE)
    link.theirs.shutdown(socket.SHUT_WR)
    assert link.ours.recv(1) == b""
    tls = again(link.ours, net)
    assert tls.recv(1) == b""
    tls.sendall(b"still here")
    assert read_exactly(link.theirs, 10) == b"still here"


@pytest.mark.parametrize("case", matrix(roles=("client",), peers=("ktls",)), ids=str)
def test_data_that_was_read_and_not_delivered(net: Net, case: Case) -> None:
    """Decrypted bytes, and in user space whole and half records that were read ahead."""
    link = net.link(case, timeout=PATIENCE)
    link.theirs.sendall(b"first")
    link.theirs.sendall(b"second")
    assert read_exactly(link.ours, 2) == b"fi"
    tls = again(link.ours, net)
    assert read_exactly(tls, 2) == b"rs"
    tls = again(tls, net)
    link.theirs.sendall(b"third")
    assert read_exactly(tls, 12) == b"tsecondthird"


def test_data_met_by_a_look_at_control_records(net: Net) -> None:
    link = net.link(Case(peer="ktls"), timeout=PATIENCE)
    driver_of(link.ours).receiving._early = b"early"
    driver_of(link.ours).receiving._mark()
    tls = again(link.ours, net)
    link.theirs.sendall(b", late")
    assert read_exactly(tls, 11) == b"early, late"


def test_settings_go_along_or_are_replaced(net: Net) -> None:
    settings = ktls.Settings(
        offload="userspace", key_limits=ktls.KeyLimits(records=7), shutdown_timeout=5
    )
    link = net.link(
        Case(offload="userspace"),
        settings=settings,
        suppress_ragged_eofs=False,
        timeout=PATIENCE,
    )
    tls = again(link.ours, net)
    assert tls._settings.shutdown_timeout == 5.0
    assert tls.key_usage.tx.limit == 7
    assert tls._suppress_ragged_eofs is False
    tls = again(tls, net, settings=ktls.Settings(key_limits=ktls.KeyLimits(records=9)))
    assert tls.key_usage.tx.limit == 9
    assert tls.session is None


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append(name)


def test_observers_are_told_of_begin_and_end(net: Net) -> None:
    here: Any = Told()
    there: Any = Told()
    link = net.link(Case(), settings=ktls.Settings(observer=here), timeout=PATIENCE)
    tls = again(link.ours, net, settings=ktls.Settings(observer=there))
    assert here.calls == ["handshake_completed", "connection_ended"]
    tls.close()
    assert there.calls == ["handshake_completed", "connection_ended"]


@pytest.mark.kernel
def test_closing_there_loses_nothing_that_was_sent_here(net: Net, elsewhere: Elsewhere) -> None:
    """What the kernel holds above TCP is counted on, so that closing waits for all of it."""
    link = net.link(Case(), timeout=0.0, buffers=16 * 1024)
    accepted = fill(link.ours)
    received = net.spawn(read_all, link.theirs)
    elsewhere.take(link.ours)
    elsewhere.do("send", "and this")
    elsewhere.do("close")
    data = received.result(PATIENCE)
    assert len(data) == accepted + 8
    assert data.endswith(b"and this")


# --- the end of the exporting object -------------------------------------------------------------------------------------


def test_the_exporting_object_is_dead(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer, timeout=PATIENCE)
    driver = driver_of(link.ours)
    link.theirs.sendall(b"not for us")
    state = link.ours.export_state()
    assert "exported" in repr(link.ours)
    tls = link.ours
    file = (tmp_path / "file").open("w+b")
    calls: dict[str, Callable[[], Any]] = {
        "recv": lambda: tls.recv(1),
        "recv_into": lambda: tls.recv_into(bytearray(1)),
        "send": lambda: tls.send(b"x"),
        "sendall": lambda: tls.sendall(b"x"),
        "sendfile": lambda: tls.sendfile(file),
        "recvfile": lambda: tls.recvfile(file),
        "refresh": lambda: tls.refresh_traffic_keys(),
        "usage": lambda: tls.key_usage,
        "offload": lambda: tls.offload,
        "half close": lambda: tls.shutdown(socket.SHUT_WR),
        "shutdown": lambda: tls.shutdown(socket.SHUT_RD),
        "unwrap": lambda: tls.unwrap(),
        "handshake": lambda: tls.do_handshake(),
        "again": lambda: tls.export_state(),
        # Whoever is inside a call of the driver in another thread.
        "driver: read": lambda: driver.recv_into(bytearray(1)),
        "driver: send": lambda: driver.send(b"x"),
        "driver: refresh": lambda: driver.refresh_traffic_keys(),
    }
    with file:
        for name, call in calls.items():
            text = None if name == "driver: refresh" else "exported"
            with pytest.raises(ktls.LocalProtocolError, match=text):
                pytest.fail(f"{name} gave {call()!r}")
    assert driver.connection._tx.secret is None
    assert driver.connection._rx.secret is None
    # What it is told is still known, and nothing has been said to the peer.
    assert tls.version() == ("TLSv1.2" if layer.version is TLS12 else "TLSv1.3")
    sock = socket.socket(fileno=os.dup(tls.fileno()))
    tls.close()
    tls.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        tls.recv(1)
    readable, _, _ = select.select([link.theirs], [], [], 0)
    assert readable == []
    successor = net.keep(ktls.KTLSSocket.from_state(sock, state))
    assert read_exactly(successor, 10) == b"not for us"


def test_if_nobody_goes_on_the_peer_sees_a_cut(net: Net) -> None:
    """No close_notify in our name: whoever has the state would be the one to send it."""
    link = net.link(Case(peer="ktls", role="server"), timeout=PATIENCE)
    link.ours.export_state()
    link.ours.close()
    with pytest.raises(ktls.TruncatedError):
        link.theirs.recv(1)
