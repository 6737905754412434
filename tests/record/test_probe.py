"""The probe against kernels as they are (the lab's), as they were (scripted), and against machines where nothing can be found out."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.suites import AEAD
from ktls.record import probe
from ktls.record.linux import (
    ALL_AEADS,
    CRYPTO_INFO,
    SOL_TLS,
    TCP_ULP,
    TLS_RX,
    TLS_RX_EXPECT_NO_PAD,
    TLS_TX,
    TLS_TX_MAX_PAYLOAD_LEN,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

TLS12, TLS13 = ProtocolVersion.TLSv1_2, ProtocolVersion.TLSv1_3


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    probe.cache_clear()
    yield
    probe.cache_clear()


class ScriptedKernel:
    """Answers ``setsockopt`` as some kernel would. ``refuse`` maps what is refused to an errno."""

    def __init__(self) -> None:
        self.ulp_error: int | None = None
        self.versions = {TLS12, TLS13}
        self.missing: set[tuple[AEAD, int]] = set()
        self.rekey = True
        self.options: dict[int, int] = {}
        self.counter_error: int | None = None
        self.delivers: bytes | None = b"probe"
        self.pairs = 0
        self.pair_error: OSError | None = None

    def pair(self, stack: ExitStack) -> tuple[Any, Any]:
        del stack
        self.pairs += 1
        if self.pair_error is not None:
            raise self.pair_error
        return ScriptedSocket(self), ScriptedSocket(self)


class ScriptedSocket:
    def __init__(self, kernel: ScriptedKernel) -> None:
        self.kernel = kernel
        self.keyed: set[int] = set()

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        error = self.refusal(level, option, value)
        if error:
            raise OSError(error, os.strerror(error))

    def refusal(self, level: int, option: int, value: bytes) -> int | None:
        if (level, option) == (socket.IPPROTO_TCP, TCP_ULP):
            return self.kernel.ulp_error
        assert level == SOL_TLS
        if option not in (TLS_TX, TLS_RX):
            return self.kernel.options.get(option)
        version, cipher = struct.unpack_from("=HH", value)
        aead = next(aead for aead, layout in CRYPTO_INFO.items() if layout.cipher_type == cipher)
        assert len(value) == CRYPTO_INFO[aead].size
        if version not in self.kernel.versions:
            return errno.EINVAL
        if (aead, option) in self.kernel.missing:
            return errno.ENOENT
        if option in self.keyed and not self.kernel.rekey:
            return errno.EBUSY
        self.keyed.add(option)
        return None

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option in self.keyed, size) == (SOL_TLS, True, 4)
        if self.kernel.counter_error:
            raise OSError(self.kernel.counter_error, os.strerror(self.kernel.counter_error))
        return bytes(size)

    def sendall(self, data: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        if self.kernel.delivers is None:
            raise TimeoutError("timed out")
        return self.kernel.delivers


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ScriptedKernel:
    scripted = ScriptedKernel()
    monkeypatch.setattr(probe, "_tcp_pair", scripted.pair)
    return scripted


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_counters_that_may_not_be_read(kernel: ScriptedKernel, error: int) -> None:
    """Then nobody could keep the limits of a key: no kernel TLS."""
    assert probe.counters_unreadable() is None
    probe.cache_clear()
    kernel.counter_error = error
    reason = "a security policy forbids reading the record counters (getsockopt)"
    assert probe.counters_unreadable() == probe.kernel_tls_unavailable() == reason
    found = probe.probe()
    assert not any((found.kernel_tls, *found.tx.values(), *found.rx.values()))


def test_why_a_receiving_key_stays(kernel: ScriptedKernel) -> None:
    assert probe.rekey_unsupported() is None
    probe.cache_clear()
    kernel.rekey = False
    assert probe.rekey_unsupported() == "this kernel can't change a receiving key"
    probe.cache_clear()
    kernel.missing = {(aead, TLS_RX) for aead in ALL_AEADS}
    kernel.rekey = True
    reason = "a receiving key can't be changed: the kernel has no such crypto algorithm"
    assert probe.rekey_unsupported() == reason


def test_everything_works(kernel: ScriptedKernel) -> None:
    found = probe.probe()
    assert found.kernel_tls
    assert set(found.tx) == set(found.rx) == {(v, a) for v in ProtocolVersion for a in ALL_AEADS}
    assert all(found.tx.values())
    assert all(found.rx.values())
    assert found.rekey_tx
    assert found.rekey_rx
    assert found.zerocopy_sendfile
    assert found.expect_no_pad
    assert found.max_payload
    assert probe.kernel_tls_unavailable() is None
    assert probe.rekey_supported()
    assert probe.max_payload_supported()


def test_kernel_without_rekey(kernel: ScriptedKernel) -> None:
    kernel.rekey = False
    kernel.options[TLS_TX_MAX_PAYLOAD_LEN] = errno.ENOPROTOOPT
    found = probe.probe()
    assert all(found.tx.values())
    assert found.rekey_tx == found.rekey_rx == probe.Finding("this kernel can't change keys")
    assert found.max_payload.reason == "this kernel does not know the option"
    assert probe.kernel_tls_unavailable() is None
    assert not probe.rekey_supported()
    assert not probe.max_payload_supported()


def test_kernel_that_cannot_receive(kernel: ScriptedKernel) -> None:
    """Linux 4.13 to 4.16 had TLS_TX only."""
    kernel.missing = {(aead, TLS_RX) for aead in AEAD}
    found = probe.probe()
    assert all(found.tx.values())
    assert not any(found.rx.values())
    assert found.rekey_tx
    assert found.rekey_rx.reason == "the kernel has no such crypto algorithm"
    assert not found.expect_no_pad
    assert not probe.rekey_supported()


def test_kernel_without_tls13(kernel: ScriptedKernel) -> None:
    kernel.versions = {TLS12}
    found = probe.probe()
    assert found.kernel_tls
    assert found.tx[TLS12, AEAD.AES_128_GCM]
    assert not found.tx[TLS13, AEAD.AES_128_GCM]
    assert found.rekey_tx.reason == "the kernel takes no TLS 1.3 cipher"
    assert probe.kernel_tls_unavailable() is None
    assert not probe.rekey_supported()


def test_missing_algorithm_hides_nothing_else(kernel: ScriptedKernel) -> None:
    kernel.missing = {(AEAD.AES_128_GCM, direction) for direction in (TLS_TX, TLS_RX)}
    found = probe.probe()
    assert found.tx[TLS13, AEAD.AES_128_GCM].reason == "the kernel has no such crypto algorithm"
    assert found.tx[TLS13, AEAD.AES_256_GCM]
    assert found.rekey_tx


def test_option_refused(kernel: ScriptedKernel) -> None:
    kernel.options[TLS_RX_EXPECT_NO_PAD] = errno.EPERM
    assert probe.probe().expect_no_pad.reason == "a security policy forbids it"


@pytest.mark.parametrize("delivered", [None, b"", b"other"])
def test_accepted_keys_that_do_not_work(kernel: ScriptedKernel, delivered: bytes | None) -> None:
    kernel.delivers = delivered
    found = probe.probe()
    for finding in (*found.tx.values(), *found.rx.values()):
        assert finding.reason is not None
        assert finding.reason.startswith("a record does not come through")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errno.ENOPROTOOPT, "this kernel does not know TCP_ULP"),
        (errno.EPERM, "a security policy forbids it"),
        (errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)),
    ],
)
def test_no_ulp(kernel: ScriptedKernel, error: int, said: str) -> None:
    kernel.ulp_error = error
    found = probe.probe()
    assert found.kernel_tls.reason == said
    assert {*found.tx.values(), *found.rx.values(), found.max_payload} == {probe.Finding(said)}
    assert probe.kernel_tls_unavailable() == said
    assert not probe.rekey_supported()
    assert not probe.max_payload_supported()


@pytest.mark.parametrize(
    ("privileged", "said"), [(True, "has no tls module"), (False, "only an administrator may load")]
)
def test_no_module(
    kernel: ScriptedKernel, monkeypatch: pytest.MonkeyPatch, privileged: bool, said: str
) -> None:
    kernel.ulp_error = errno.ENOENT
    monkeypatch.setattr(probe, "_may_load_modules", lambda: privileged)
    assert said in (probe.kernel_tls_unavailable() or "")


def test_privileges_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    monkeypatch.setattr("builtins.open", no_proc)
    for uid, may in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert probe._may_load_modules() is may


def test_found_once(kernel: ScriptedKernel) -> None:
    for _ in range(3):
        probe.rekey_supported()
        probe.max_payload_supported()
        probe.kernel_tls_unavailable()
    assert kernel.pairs == 1
    first = probe.probe()
    after = kernel.pairs
    assert probe.probe() is first
    assert kernel.pairs == after


def test_found_once_by_many_threads(kernel: ScriptedKernel) -> None:
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait(10)
        probe.rekey_supported()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernel.pairs == 1


def test_no_connection_is_not_remembered(kernel: ScriptedKernel) -> None:
    kernel.pair_error = OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
    assert probe.kernel_tls_unavailable() == (
        "no TCP connection over 127.0.0.1 to try it on: Cannot assign requested address"
    )
    assert probe.probe().transient
    kernel.pair_error = None
    assert probe.kernel_tls_unavailable() is None
    assert probe.probe().kernel_tls


def test_silent_loopback_is_waited_for_once(kernel: ScriptedKernel) -> None:
    """An interface ``lo`` that is down answers nothing, and every connection would wait for that."""
    kernel.pair_error = TimeoutError("timed out")
    for _ in range(3):
        assert (probe.kernel_tls_unavailable() or "").endswith("timed out")
        assert not probe.rekey_supported()
    assert kernel.pairs == 1


def test_lack_of_memory_is_not_remembered(kernel: ScriptedKernel) -> None:
    kernel.ulp_error = errno.ENOMEM
    assert (probe.kernel_tls_unavailable() or "").startswith("it can't be tried now")
    kernel.ulp_error = None
    assert probe.kernel_tls_unavailable() is None


def test_no_descriptors_left() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        found = probe.probe()
        said = probe.kernel_tls_unavailable()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.transient
    assert found.kernel_tls.reason == said
    assert "Too many open files" in (said or "")


def test_leaves_no_descriptors_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    probe.probe()
    probe.rekey_supported()
    assert descriptors() == before


def test_strangers_who_connect_are_not_taken_for_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any process may connect to the probe's listener before the probe does."""
    strangers = []
    listen = socket.socket.listen

    def listen_and_let_in(self: socket.socket, backlog: int) -> None:
        listen(self, backlog)
        strangers.append(socket.create_connection(self.getsockname(), 5))

    monkeypatch.setattr(socket.socket, "listen", listen_and_let_in)
    with ExitStack() as stack:
        client, server = probe._tcp_pair(stack)
        assert server.getpeername() == client.getsockname()
    assert client.fileno() == server.fileno() == -1
    for stranger in strangers:
        stranger.close()


def test_child_of_a_fork_is_not_stuck(kernel: ScriptedKernel) -> None:
    """The lock may be held by a thread that the child does not have."""
    with probe._essentials._lock:
        probe.cache_clear()  # what the child does
        assert probe.kernel_tls_unavailable() is None


@pytest.mark.kernel
def test_lab_has_every_cipher() -> None:
    found = probe.probe()
    assert found.kernel_tls
    assert all(found.tx.values()), found.tx
    assert all(found.rx.values()), found.rx
    assert found.zerocopy_sendfile
    assert found.expect_no_pad


@pytest.mark.kernel
@pytest.mark.rekey
def test_lab_with_rekey() -> None:
    found = probe.probe()
    assert found.rekey_tx
    assert found.rekey_rx
    assert found.max_payload
    assert probe.rekey_supported()
    assert probe.max_payload_supported()


@pytest.mark.kernel
@pytest.mark.norekey
def test_lab_without_rekey() -> None:
    found = probe.probe()
    assert not found.rekey_tx
    assert not found.rekey_rx
    assert not found.max_payload
    assert not probe.rekey_supported()
    assert not probe.max_payload_supported()
