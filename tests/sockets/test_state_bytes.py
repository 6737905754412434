"""States that are not states: damaged, of another version, of another connection; and what a state shows of itself."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import socket
import ssl
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls

from ..support import TLS12, TLS13, has_kernel_tls
from .helpers import PATIENCE, Case, Link, Net, read_exactly
from .test_state import driver_of, exported_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.record.driver import Driver


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
    ("driver.connection.role", []),
    ("driver.connection.tx_age", 10**400),
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


def locals_of_ours(error: BaseException) -> list[str]:
    """What crash reporters send of our frames."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame.f_globals["__name__"].startswith("ktls.")]
    return [repr(value) for frame in ours for value in frame.f_locals.values()]


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
        chain += [repr(error), *locals_of_ours(error)]
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


@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_states_that_contradict_themselves_leave_the_socket_alone(
    net: Net, version: ssl.TLSVersion
) -> None:
    """Found out only where layers and connection are put together: neither secret nor key."""
    link = net.link(Case(version=version, offload="userspace"), timeout=PATIENCE)
    snapshot = link.ours.export_state().snapshot
    driver = snapshot.driver
    if version is TLS13:
        driver = replace(driver, connection=replace(driver.connection, tx_secret=None))
    else:
        driver = replace(driver, sender=replace(driver.sender, keys=None))
    state = ktls.ExportedState(replace(snapshot, driver=driver)).to_bytes()
    with socket.socket(fileno=os.dup(link.ours.fileno())) as sock:
        with pytest.raises(ValueError):
            ktls.KTLSSocket.from_state(sock, state)
        assert sock.fileno() >= 0


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
