"""Where the records are protected, what the kernel's own counters say to that, and how often the keys change."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

import ktls

from ..support import TLS12, TLS13, TlsStat, has_kernel_tls
from .helpers import Case, Net, matrix, pattern, read_exactly

if TYPE_CHECKING:
    from pathlib import Path


def test_offload_userspace_never_uses_the_kernel(net: Net, tls_stat: TlsStat) -> None:
    for version in (TLS12, TLS13):
        ours = net.link(Case(version=version, offload="userspace")).ours
        assert ours.offload == ktls.Offload("userspace", "userspace", "user space was asked for")
    assert tls_stat["TlsTxSw"] == tls_stat["TlsRxSw"] == 0


def test_reason_is_told(net: Net, version: Case) -> None:
    offload = net.link(version).ours.offload
    if version.tx_layer == "userspace":
        assert offload.reason is not None
        assert "module" in offload.reason
    elif version.rx_layer == "userspace":
        assert offload.reason is not None
        assert "can't change a receiving key" in offload.reason
    else:
        assert offload.reason is None


def test_kernel_is_demanded(net: Net, role: Case) -> None:
    """Both directions, or an error: also with TLS 1.3 on a kernel without rekey, for who asks for it knows what that means."""
    case = Case(version=role.version, role=role.role, offload="kernel")
    if not has_kernel_tls():
        with pytest.raises(ktls.OffloadError, match="kernel TLS was demanded") as caught:
            net.link(case)
        assert "module" in caught.value.reason
        return
    link = net.link(case)
    assert link.ours.offload == ktls.Offload("kernel", "kernel", None)
    link.ours.sendall(b"x")
    assert link.theirs.recv(1) == b"x"
    link.theirs.sendall(b"y")
    assert link.ours.recv(1) == b"y"


def test_policy_is_checked() -> None:
    context = ktls.SSLContext()
    with pytest.raises(ValueError, match="offload must be auto, kernel or userspace"):
        context.offload = "hardware"  # type: ignore[assignment]  # that is the mistake
    assert context.offload == "auto"


@pytest.mark.kernel
def test_counters_prove_the_kernel(net: Net, role: Case, tls_stat: TlsStat) -> None:
    link = net.link(role)
    assert tls_stat["TlsTxSw"] == 1
    assert tls_stat["TlsRxSw"] == (1 if role.rx_layer == "kernel" else 0)
    link.ours.sendall(pattern(100_000))
    assert read_exactly(link.theirs, 100_000) == pattern(100_000)
    link.theirs.sendall(pattern(100_000))
    assert read_exactly(link.ours, 100_000) == pattern(100_000)
    link.ours.close()
    assert tls_stat["TlsDecryptError"] == 0
    assert tls_stat["TlsRxRekeyError"] == tls_stat["TlsTxRekeyError"] == 0


# --- counts and keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", matrix(roles=("client",), peers=("ktls",)), ids=str)
def test_key_usage_agrees_at_both_ends(net: Net, case: Case) -> None:
    link = net.link(case)
    link.ours.sendall(pattern(50_000))  # three records and a rest
    link.ours.sendall(b"one")
    assert len(read_exactly(link.theirs, 50_003)) == 50_003
    ours, theirs = link.ours.key_usage, link.theirs.key_usage
    finished = 1 if case.version is TLS12 else 0
    assert ours.tx.records == theirs.rx.records == 5 + finished
    link.theirs.sendall(b"back")
    assert link.ours.recv(100) == b"back"
    tickets = theirs.tx.records
    assert link.theirs.key_usage.tx.records == link.ours.key_usage.rx.records == tickets + 1
    assert ours.tx.generation == theirs.rx.generation == 0


@pytest.mark.parametrize("request_peer", [False, True])
def test_refresh(net: Net, case: Case, request_peer: bool) -> None:
    link = net.link(case, changing_peer=case.peer == "ktls")
    if not case.may_refresh:
        with pytest.raises(ktls.LocalProtocolError) as caught:
            link.ours.refresh_traffic_keys(request_peer)
        assert caught.value.recoverable
    else:
        for _ in range(3):
            link.ours.refresh_traffic_keys(request_peer)
        assert link.ours.key_usage.tx.generation == 3
    # The connection goes on, whatever happened.
    link.ours.sendall(b"ping")
    assert link.theirs.recv(100) == b"ping"
    link.theirs.sendall(b"pong")
    assert link.ours.recv(100) == b"pong"
    if case.may_refresh and request_peer:
        assert link.ours.key_usage.rx.generation == 1
    elif not request_peer:
        assert link.ours.key_usage.rx.generation == 0


@pytest.mark.norekey
def test_key_update_of_the_peer_on_a_kernel_without_rekey(net: Net) -> None:
    """That is why the receiving direction stays in user space there."""
    context = net.context("ktls", "server")
    link = net.link(Case(peer="ktls"), their_context=context)
    assert link.ours.offload.tx == "kernel"
    context.offload = "userspace"
    other = net.link(Case(peer="ktls"), their_context=context)
    for _ in range(3):
        other.theirs.refresh_traffic_keys()
        other.theirs.sendall(b"new key")
        assert other.ours.recv(100) == b"new key"
    assert other.ours.key_usage.rx.generation == 3
    other.ours.sendall(b"we can still send")
    assert other.theirs.recv(100) == b"we can still send"


@pytest.mark.norekey
def test_request_that_can_not_be_answered_ends_our_sending(net: Net) -> None:
    context = net.context("ktls", "server")
    context.offload = "userspace"
    link = net.link(Case(peer="ktls"), their_context=context, suppress_ragged_eofs=False)
    link.theirs.refresh_traffic_keys(request_peer=True)
    link.theirs.sendall(b"x")
    assert link.ours.recv(1) == b"x"
    with pytest.raises(ktls.KeyLimitError):
        link.ours.sendall(b"under the old key, which the peer did not want any more")
    assert link.theirs.recv(1) == b""  # closed in order
    link.theirs.sendall(b"y")
    assert link.ours.recv(1) == b"y"


@pytest.mark.parametrize("case", matrix(versions=(TLS13,), peers=("stdlib",)), ids=str)
def test_limits_are_kept_by_sendfile(net: Net, case: Case, tmp_path: Path) -> None:
    """The peer gets every byte, under a new key every hundred records."""
    if not case.may_refresh:
        expect_key_limit(net, case)
        return
    settings = ktls.Settings(offload=case.offload, key_limits=ktls.KeyLimits(records=100))
    records = 1000 if case.role == "client" else 300
    if not has_kernel_tls():
        records *= 10  # the lab is slow
    link = net.link(case, settings=settings)
    size = records * 16384
    content = pattern(size)
    (tmp_path / "file").write_bytes(content)
    receiving = net.spawn(read_exactly, link.theirs, size)
    with open(tmp_path / "file", "rb") as file:
        assert link.ours.sendfile(file) == size
    assert receiving.result() == content
    generations = link.ours.key_usage.tx.generation
    assert records // 100 <= generations <= records // 50
    assert link.ours.key_usage.tx.limit == 100
    assert link.ours.key_usage.tx.records <= 100


def expect_key_limit(net: Net, case: Case) -> None:
    """A kernel without rekey: the limit ends the sending side, in order."""
    settings = ktls.Settings(offload=case.offload, key_limits=ktls.KeyLimits(records=20))
    link = net.link(case, settings=settings)
    receiving = net.spawn(read_exactly, link.theirs, 1 << 20)
    with pytest.raises(ktls.KeyLimitError):
        link.ours.sendall(bytes(100 * 16384))
    received = receiving.result()
    assert 0 < len(received) <= 20 * 16384
    link.theirs.sendall(b"x")
    assert link.ours.recv(1) == b"x"


@pytest.mark.parametrize("case", matrix(versions=(TLS12,), peers=("stdlib",)), ids=str)
def test_limit_ends_sending_in_tls12(net: Net, case: Case) -> None:
    settings = ktls.Settings(offload=case.offload, key_limits=ktls.KeyLimits(records=20))
    link = net.link(case, settings=settings)
    receiving = net.spawn(read_exactly, link.theirs, 1 << 20)
    with pytest.raises(ktls.KeyLimitError):
        link.ours.sendall(bytes(100 * 16384))
    assert 0 < len(receiving.result()) <= 20 * 16384


def test_limit_by_octets(net: Net) -> None:
    limits = ktls.KeyLimits(octets=100_000)
    case = Case(offload="userspace")
    link = net.link(case, settings=ktls.Settings(offload="userspace", key_limits=limits))
    receiving = net.spawn(read_exactly, link.theirs, 1_000_000)
    link.ours.sendall(pattern(1_000_000))
    assert receiving.result() == pattern(1_000_000)
    assert 9 <= link.ours.key_usage.tx.generation <= 20


def test_receiving_limit_asks_the_peer(net: Net) -> None:
    limits = ktls.KeyLimits(records=50)
    case = Case(offload="userspace")
    link = net.link(case, settings=ktls.Settings(offload="userspace", key_limits=limits))

    def talk() -> None:
        for _ in range(30):
            link.theirs.sendall(pattern(100_000))
            assert link.theirs.recv(1) == b"."

    talking = net.spawn(talk)
    for _ in range(30):
        assert read_exactly(link.ours, 100_000) == pattern(100_000)
        link.ours.sendall(b".")
    talking.result()
    assert link.ours.key_usage.rx.generation >= 2


def test_settings_of_a_context_are_those_of_its_sockets(net: Net) -> None:
    context = net.context("ktls", "client")
    context.key_limits = ktls.KeyLimits(records=7)
    context.shutdown_timeout = 1.5
    ours = net.link(context=context).ours
    assert ours.key_usage.tx.limit == 7
    assert context.shutdown_timeout == 1.5


def test_half_close_while_keys_change(net: Net) -> None:
    case = Case(peer="ktls")
    link = net.link(case)
    link.ours.shutdown(socket.SHUT_WR)
    sent: Any = 0
    for _ in range(5):
        if case.may_refresh:
            link.theirs.refresh_traffic_keys(request_peer=True)
        link.theirs.sendall(b"12345")
        sent += 5
    assert read_exactly(link.ours, sent) == b"12345" * 5
    if case.may_refresh:
        assert link.ours.key_usage.rx.generation == 5
