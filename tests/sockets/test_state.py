"""A connection handed to another process: its descriptor by ``SCM_RIGHTS``, its state beside it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import select
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls
from ktls.protocol.enums import ContentType
from ktls.record.driver import Driver
from ktls.record.handover import take_driver
from ktls.waiting import for_write

from ..support import TLS12, TLS13, has_kernel_tls, has_rekey
from .helpers import PATIENCE, Case, Link, Net, fill, matrix, read_all, read_exactly
from .test_engine_layer import cbc_link

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..support import Authority

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
            with pytest.raises(ktls.LocalProtocolError):
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


# --- when it can't be done -----------------------------------------------------------------------------------------------


def refused(link: Link, message: str) -> None:
    with pytest.raises(ktls.LocalProtocolError, match=message):
        link.ours.export_state()


def clog(tls: ktls.KTLSSocket) -> None:
    """Send until TCP takes no more."""

    def send() -> None:
        while True:
            tls.send(bytes(100_000))

    with pytest.raises(ssl.SSLWantWriteError):
        send()


def works(link: Link) -> None:
    """Both directions, and the state can be exported after all."""
    link.ours.settimeout(PATIENCE)
    link.theirs.sendall(b"ping")
    assert read_exactly(link.ours, 4) == b"ping"
    link.ours.sendall(b"pong")
    assert read_exactly(link.theirs, 4) == b"pong"
    assert link.ours.export_state() is not None


def test_not_before_the_handshake(net: Net, ktls_client: ktls.SSLContext) -> None:
    sock, _ = net.tcp()
    tls = net.keep(
        ktls_client.wrap_socket(sock, do_handshake_on_connect=False, server_hostname="localhost")
    )
    with pytest.raises(ValueError, match="handshake not done yet"):
        tls.export_state()


def test_not_with_unsent_bytes(net: Net) -> None:
    link = net.link(Case(offload="userspace"), timeout=0.0, buffers=16 * 1024)
    clog(link.ours)
    refused(link, "repeated first")
    with pytest.raises(ktls.LocalProtocolError, match="has not been sent"):
        take_driver(driver_of(link.ours))
    unreported = link.ours._unreported
    received = net.spawn(read_exactly, link.theirs, 100_000)
    link.ours.settimeout(PATIENCE)
    link.ours.perform(driver_of(link.ours).flush, for_write)
    refused(link, "repeated first")  # sent, but the application does not know it
    assert link.ours.send(bytes(len(unreported))) == len(unreported)
    assert len(received.result(PATIENCE)) == 100_000
    while select.select([link.theirs], [], [], 0)[0]:
        link.theirs.recv(1 << 20)
    works(link)


def test_not_inside_a_key_change(net: Net) -> None:
    """The KeyUpdate is owed and can't go out: its key is not in force yet."""
    case = Case(peer="ktls", offload="auto" if has_rekey() else "userspace")
    link = net.link(case, timeout=0.0, buffers=16 * 1024, changing_peer=True)
    driver = driver_of(link.ours)
    with driver.sending._lock:  # as if another thread were sending
        with driver.sending._state_lock:
            driver.sending.owe(driver.connection.refresh_traffic_keys(now=0.0))
        refused(link, "another thread is sending")
        assert driver.owes
    driver.run_owed()
    works(link)


def test_what_is_owed_goes_out_first(net: Net) -> None:
    """Something owed is no obstacle as long as TCP takes it."""
    case = Case(peer="ktls", offload="auto" if has_rekey() else "userspace")
    link = net.link(case, timeout=PATIENCE, changing_peer=True)
    driver = driver_of(link.ours)
    driver.sending.owe(driver.connection.refresh_traffic_keys(now=0.0))
    tls = again(link.ours, net)
    assert tls.key_usage.tx.generation == 1
    tls.sendall(b"new key")
    assert read_exactly(link.theirs, 7) == b"new key"


def test_not_with_a_key_change_that_tcp_does_not_take(net: Net) -> None:
    case = Case(peer="ktls", offload="auto" if has_rekey() else "userspace")
    link = net.link(case, timeout=0.0, buffers=16 * 1024, changing_peer=True)
    clog(link.ours)
    driver = driver_of(link.ours)
    with pytest.raises(BlockingIOError):
        driver.refresh_traffic_keys()
    refused(link, "has not been sent|being changed|repeated first")
    assert driver.owes


@pytest.mark.parametrize("case", REFRESHABLE, ids=str)
def test_not_with_a_part_of_a_message(net: Net, case: Case) -> None:
    link = net.link(case, timeout=PATIENCE, changing_peer=True)
    sender = driver_of(link.theirs).sender
    sender.send_record(ContentType.HANDSHAKE, b"\x18\x00")
    link.ours.settimeout(0.0)
    while not driver_of(link.ours).connection.fragment_pending:
        select.select([link.ours], [], [], PATIENCE)
        with pytest.raises(ssl.SSLWantReadError):
            link.ours.recv(1)
    refused(link, "only a part of a handshake message")
    link.ours.settimeout(PATIENCE)
    sender.send_record(ContentType.HANDSHAKE, b"\x00\x01\x00")
    connection = driver_of(link.theirs).connection
    connection._tx.secret = connection._tx.secret.next()  # type: ignore[union-attr]  # TLS 1.3 has one
    sender.install(connection._tx.secret.keys())
    link.theirs.sendall(b"go on")
    assert read_exactly(link.ours, 5) == b"go on"
    works(link)


def test_not_while_another_thread_reads(net: Net) -> None:
    link = net.link(Case(), timeout=None)
    read = net.spawn(read_exactly, link.ours, 4)
    receiving = driver_of(link.ours).receiving
    while not receiving._lock.locked():  # type: ignore[union-attr]  # not an RLock here
        assert not read.done()
        threading.Event().wait(0.001)
    refused(link, "another thread is receiving")
    link.theirs.sendall(b"data")
    assert read.result(PATIENCE) == b"data"
    works(link)


def test_not_after_an_error(net: Net) -> None:
    link = net.link(Case(peer="ktls"), timeout=PATIENCE)
    driver_of(link.theirs).sender.send_record(ContentType.ALERT, b"\x02\x50")
    with pytest.raises(ktls.AlertReceived):
        link.ours.recv(1)
    refused(link, "failed")


def test_not_after_the_network_has_gone(net: Net) -> None:
    link = net.link(Case(offload="userspace"), timeout=PATIENCE)
    link.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    os.close(link.theirs.detach())  # a reset
    with pytest.raises(ConnectionResetError):
        link.ours.recv(1)
    refused(link, "failed")


def test_not_with_the_engine(net: Net, authority: Authority) -> None:
    link = cbc_link(net, authority, "AES128-SHA", "client", timeout=PATIENCE)
    refused(link, "engine")
    link.ours.sendall(b"pong")
    assert read_exactly(link.theirs, 4) == b"pong"


# --- states that are not states ------------------------------------------------------------------------------------------


def secrets_in(driver: Driver) -> list[bytes]:
    tx, rx = driver.connection._tx.secret, driver.connection._rx.secret
    assert tx is not None
    assert rx is not None
    return [tx.secret, tx.keys().key, tx.keys().iv, rx.secret, rx.keys().key, rx.keys().iv]


def spelled(secret: bytes) -> set[str]:
    return {secret.hex(), repr(secret)[2:-1], str(list(secret))[1:-1]}


def test_states_do_not_show_what_they_hold(net: Net) -> None:
    link = net.link(Case(offload="userspace"), timeout=PATIENCE)
    secrets = secrets_in(driver_of(link.ours))
    secrets.append(link.ours.get_channel_binding("tls-exporter") or b"")
    state = link.ours.export_state()
    shown = [repr(state), str(state), f"{state}", repr(state.snapshot), repr(vars(type(state)))]
    for secret in secrets:
        for spelling in spelled(secret):
            assert not any(spelling in text for text in shown)
    assert secrets[0] in state.to_bytes()  # else this would prove nothing
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="secret"):
            copying(state)


def resealed(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A state that was changed on purpose: with the right digest."""
    body = change(data[:-32])
    return body + hashlib.sha256(body).digest()


def rewritten(data: bytes, change: Callable[[Any], None]) -> bytes:
    """A state whose JSON text was changed on purpose."""
    magic, rest = data[:11], data[11:-32]
    length = int.from_bytes(rest[2:6], "big")
    value = json.loads(rest[6 : 6 + length])
    change(value)
    text = json.dumps(value, separators=(",", ":")).encode()
    body = magic + rest[:2] + len(text).to_bytes(4, "big") + text + rest[6 + length :]
    return body + hashlib.sha256(body).digest()


#: Paths into the text, and what is put there.
WRONG: Final[list[tuple[str, Any]]] = [
    ("version", 3),
    ("extra", 1),
    ("cipher", ["a", "b"]),
    ("cipher", {"a": 1}),
    ("shutdown_timeout", float("nan")),
    ("shutdown_timeout", True),
    ("offload", "sometimes"),
    ("suppress_ragged_eofs", 1),
    ("info.session_reused", None),
    ("info.certificate_dict", 5),
    ("driver.early", -1),
    ("driver.early", 10**30),
    ("driver.tx_octets", -1),
    ("driver.sender.layer", "catchup"),
    ("driver.sender.max_fragment", 0),
    ("driver.sender.max_fragment", 16385),
    ("driver.sender.sequence_number", 2**64),
    ("driver.receiver.layer", "engine"),
    ("driver.receiver.content_type", 256),
    ("driver.connection.role", "PEER"),
    ("driver.connection.suite", "TLS_NULL"),
    ("driver.connection.tx_state", "FAILED"),
    ("driver.connection.rx_state", "failed"),
    ("driver.connection.limits.records", 0),
    ("driver.connection.tx_secret", None),
    ("driver.connection.tx_secret.generation", -1),
    ("driver.connection.tx_secret.suite", "TLS_CHACHA20_POLY1305_SHA256"),
    ("driver.connection.tx_secret.secret", 8),
    ("driver.connection.suite", "TLS_RSA_WITH_AES_256_GCM_SHA384"),
]


@pytest.fixture
def idle(net: Net) -> Link:
    """A connection in user space whose state is about to be ill-treated."""
    return net.link(Case(offload="userspace"), timeout=PATIENCE)


def check_refused(net: Net, idle: Link, data: bytes, secrets: list[bytes]) -> None:
    """``data`` is refused, quoting nothing; the socket is as it was."""
    sock = net.keep(socket.socket(fileno=os.dup(idle.ours.fileno())))
    with pytest.raises(ValueError) as caught:
        ktls.KTLSSocket.from_state(sock, data)
    error: BaseException | None = caught.value
    assert error is not None
    assert error.__cause__ is None
    assert error.__context__ is None or not hasattr(error.__context__, "doc")
    chain = []
    while error is not None:
        chain.append(repr(error))
        error = error.__context__
    for secret in secrets:
        for spelling in spelled(secret):
            assert not any(spelling in text for text in chain)
    assert sock.fileno() >= 0
    sock.close()


def test_damaged_states_are_refused(net: Net, idle: Link) -> None:
    secrets = secrets_in(driver_of(idle.ours))
    data = exported_bytes(idle.ours)
    for length in range(0, len(data), 7):
        check_refused(net, idle, data[:length], secrets)
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        check_refused(net, idle, bytes(damaged), secrets)
    check_refused(net, idle, data + b"\0", secrets)
    check_refused(net, idle, resealed(data, lambda body: body + b"\0"), secrets)
    check_refused(net, idle, resealed(data, lambda body: body[:-1]), secrets)
    check_refused(net, idle, resealed(data, lambda body: body[:17] + b"[" * 9000), secrets)
    check_refused(net, idle, resealed(data, lambda body: body[:20] + b"\xff" + body[21:]), secrets)
    # The state itself was good all the time.
    sock = socket.socket(fileno=os.dup(idle.ours.fileno()))
    net.keep(ktls.KTLSSocket.from_state(sock, data)).sendall(b"fine")
    assert read_exactly(idle.theirs, 4) == b"fine"


def test_states_of_another_version_are_refused(idle: Link) -> None:
    data = exported_bytes(idle.ours)
    assert data[11:13] == b"\0\1"
    other = resealed(data, lambda body: body[:11] + b"\0\2" + body[13:])
    with pytest.raises(ValueError, match="of format 2, and only 1 is known"):
        ktls.ExportedState.from_bytes(other)


def test_states_that_can_not_be_are_refused(net: Net, idle: Link) -> None:
    secrets = secrets_in(driver_of(idle.ours))
    data = exported_bytes(idle.ours)
    ktls.ExportedState.from_bytes(rewritten(data, lambda value: None))

    for path, wrong in WRONG:

        def change(value: Any, path: str = path, wrong: Any = wrong) -> None:
            *way, last = path.split(".")
            for name in way:
                value = value[name]
            value[last] = wrong

        check_refused(net, idle, rewritten(data, change), secrets)


def test_only_stream_sockets(idle: Link) -> None:
    state = idle.ours.export_state()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(NotImplementedError),
    ):
        ktls.KTLSSocket.from_state(sock, state)


@pytest.mark.kernel
@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_states_of_another_connection_are_refused(net: Net, version: ssl.TLSVersion) -> None:
    """The kernel has the keys: they tell whose state it is."""
    ours = net.link(Case(version=version), timeout=PATIENCE).ours
    other = net.link(Case(version=version), timeout=PATIENCE).ours
    plain, _ = net.tcp()
    user_space = net.link(Case(version=version, offload="userspace"), timeout=PATIENCE).ours
    states = {tls: tls.export_state() for tls in (ours, user_space)}
    wrong = [(ours, plain), (ours, user_space), (user_space, ours)]
    if version is TLS13:
        wrong.append((ours, other))
    for mine, its in wrong:
        sock = net.keep(socket.socket(fileno=os.dup(its.fileno())))
        with pytest.raises(ValueError, match="not of this connection"):
            ktls.KTLSSocket.from_state(sock, states[mine])
        assert sock.fileno() >= 0
    assert has_kernel_tls()
    sock = socket.socket(fileno=os.dup(ours.fileno()))
    net.keep(ktls.KTLSSocket.from_state(sock, states[ours])).sendall(b"right")


@pytest.mark.rekey
def test_a_state_that_is_too_old_is_refused(net: Net) -> None:
    """Somebody has gone on, and changed a key."""
    link = net.link(Case(peer="ktls"), timeout=PATIENCE)
    state = link.ours.export_state()
    first = socket.socket(fileno=os.dup(link.ours.fileno()))
    net.keep(ktls.KTLSSocket.from_state(first, state)).refresh_traffic_keys()
    with pytest.raises(ValueError, match="not of this connection"):
        ktls.KTLSSocket.from_state(
            net.keep(socket.socket(fileno=os.dup(link.ours.fileno()))), state
        )
