"""Ends of connections: nothing that was accepted is lost, nothing that was not sent is taken for an end."""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

import ktls

from ..support import HOST, TLS12, TLS13
from .helpers import (
    LATE,
    PATIENCE,
    Case,
    Net,
    cut,
    fill,
    matrix,
    pattern,
    read_all,
    read_exactly,
    reset,
    slowly,
)

# --- in order --------------------------------------------------------------------------------------------------------


def test_close_says_close_notify(net: Net, case: Case) -> None:
    link = net.link(case)
    link.ours.sendall(b"last words")
    link.ours.close()
    assert read_all(link.theirs) == b"last words"
    assert link.ours.fileno() == -1


def test_peer_closes(net: Net, case: Case) -> None:
    link = net.link(case, suppress_ragged_eofs=False)

    def end() -> None:
        link.theirs.sendall(b"last words")
        with suppress(OSError):
            net.keep(link.theirs.unwrap())

    ending = net.spawn(end)
    assert read_all(link.ours) == b"last words"
    assert link.ours.recv(1) == b""
    assert link.ours.recv_into(bytearray(1)) == 0
    link.ours.close()
    ending.result()


def test_half_close(net: Net) -> None:
    """TLS 1.3: after our close_notify the peer may go on for as long as it likes."""
    for case in matrix(versions=(TLS13,)):
        link = net.link(case)
        link.ours.sendall(b"question")
        link.ours.shutdown(socket.SHUT_WR)
        assert read_all(link.theirs) == b"question"
        link.theirs.sendall(pattern(100_000))
        assert read_exactly(link.ours, 100_000) == pattern(100_000)
        with pytest.raises(ktls.LocalProtocolError, match="the sending side is closed"):
            link.ours.send(b"more")
        if case.peer == "ktls":
            link.theirs.close()
            assert link.ours.recv(1) == b""


def test_half_close_loses_nothing(net: Net, case: Case) -> None:
    if case.version is TLS12:
        case = Case(version=TLS13, role=case.role, peer=case.peer, offload=case.offload)
    link = net.link(case, buffers=8192)
    data = pattern(300_000)
    receiving = net.spawn(slowly, link.theirs)
    link.ours.sendall(data)
    link.ours.shutdown(socket.SHUT_WR)
    assert receiving.result() == data
    link.theirs.sendall(b"thanks")
    assert link.ours.recv(100) == b"thanks"


def test_shutdown_of_both(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.ours.sendall(b"bye")
    link.ours.shutdown(socket.SHUT_RDWR)
    assert read_all(link.theirs) == b"bye"


def test_shutdown_of_reading_only(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.ours.shutdown(socket.SHUT_RD)
    link.ours.sendall(b"we go on sending")
    assert link.theirs.recv(100) == b"we go on sending"


def test_unwrap(net: Net, case: Case) -> None:
    link = net.link(case, timeout=PATIENCE)
    link.theirs.sendall(b"not read")
    unwrapping = net.spawn(link.theirs.unwrap)
    plain = net.keep(link.ours.unwrap())
    their_plain = net.keep(unwrapping.result())
    assert isinstance(plain, socket.socket)
    if "kernel" in (case.tx_layer, case.rx_layer):
        assert plain is link.ours
        assert plain.recv(1) == b""
        return
    assert not isinstance(plain, ktls.KTLSSocket)
    assert plain.gettimeout() == PATIENCE
    assert link.ours.fileno() == -1
    if case.peer == "ktls" and their_plain is link.theirs:
        return  # that end has kernel TLS
    plain.sendall(b"in plain text")
    assert their_plain.recv(100) == b"in plain text"
    their_plain.sendall(b"here too")
    assert plain.recv(100) == b"here too"


def test_unwrap_without_an_answer(net: Net, layer: Case) -> None:
    link = net.link(layer)
    cut(link.theirs)
    with pytest.raises(ssl.SSLEOFError):
        link.ours.unwrap()


def test_unwrap_does_not_lose_plain_text_in_silence(net: Net) -> None:
    """In user space it may be read together with the peer's close_notify; then it can't be put back."""
    net.context("ktls", "server").offload = "userspace"
    link = net.link(Case(offload="userspace", peer="ktls"))
    theirs = link.theirs
    theirs._driver.close_notify()
    theirs._driver.flush()
    socket.socket.send(theirs, b"220 plain text at once")
    readable = select.poll()
    readable.register(link.ours, select.POLLIN)
    assert readable.poll(PATIENCE * 1000)
    with pytest.raises(ssl.SSLError, match="plain text came together with close_notify"):
        link.ours.unwrap()


def wait_until_stuck(sock: socket.socket) -> None:
    """Wait until there is no room to send, and none appears: a thread that still sends is stuck."""
    while select.select([], [sock], [], 0.05)[1]:
        os.sched_yield()


def test_close_does_not_wait_for_a_sender_that_is_stuck(net: Net, layer: Case) -> None:
    settings = ktls.Settings(offload=layer.offload, shutdown_timeout=0.5)
    link = net.link(layer, settings=settings, buffers=8192)

    def send_for_ever() -> None:
        with suppress(OSError):
            link.ours.sendall(bytes(2**22))

    stuck = net.spawn(send_for_ever)
    wait_until_stuck(link.ours)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        link.ours.close()
    assert time.monotonic() - started < LATE
    with suppress(OSError):
        reset(link.theirs)
    stuck.result()


def test_unwrap_before_the_handshake_is_refused(net: Net) -> None:
    client, _ = net.tcp()
    ours = net.context("ktls", "client").wrap_socket(
        client, do_handshake_on_connect=False, server_hostname=HOST
    )
    with pytest.raises(ValueError, match="handshake not done yet"):
        net.keep(ours).unwrap()


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, PATIENCE, 0.0], ids=["blocking", "timeout", "nonblock"])
@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
@pytest.mark.parametrize("offload", ["auto", "userspace"])
def test_close_loses_nothing(
    net: Net, offload: Any, version: ssl.TLSVersion, timeout: float | None
) -> None:
    """Small buffers, a slow reader, and a close right behind the last byte."""
    trials = 8
    for trial in range(trials):
        link = net.link(Case(version=version, offload=offload), timeout=timeout, buffers=4608)
        data = pattern(60_000 + 1777 * trial, trial)
        receiving = net.spawn(slowly, link.theirs) if timeout != 0.0 else None
        sent = 0
        with suppress(ssl.SSLWantWriteError):
            while sent < len(data):
                sent += link.ours.send(data[sent : sent + 16384])
        link.ours.close()
        received = receiving.result() if receiving is not None else slowly(link.theirs)
        # The piece for which SSLWantWriteError was raised may have been taken all the same.
        assert received in (data[:sent], data[: sent + 16384])
    for thread in threading.enumerate():
        if thread.name == "ktls-close":
            thread.join(LATE)
            assert not thread.is_alive()


def test_close_in_the_background_returns_the_descriptor(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=0.0, buffers=8192)
    fill(link.ours)
    fd = link.ours.fileno()
    inode = os.fstat(fd).st_ino
    start = time.monotonic()
    link.ours.close()
    assert time.monotonic() - start < LATE
    assert link.ours.fileno() == -1
    read_all(link.theirs)
    for thread in threading.enumerate():
        if thread.name == "ktls-close":
            thread.join(LATE)
    with suppress(OSError):
        assert os.fstat(fd).st_ino != inode


def test_close_where_no_thread_can_be_started(
    net: Net, layer: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the interpreter, for instance: then ``close`` itself waits."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    link = net.link(layer, timeout=0.0, buffers=8192)
    accepted = fill(link.ours)
    receiving = net.spawn(read_all, link.theirs)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    link.ours.close()
    assert receiving.result() in (bytes(accepted), bytes(accepted + 16384))


def test_close_with_unread_data_does_not_reset(net: Net, layer: Case) -> None:
    """TCP would answer unread data with RST, which destroys what we sent."""
    link = net.link(layer, buffers=65536)
    link.theirs.sendall(pattern(30_000))
    link.ours.sendall(pattern(30_000))
    link.ours.close()
    assert read_all(link.theirs) == pattern(30_000)


def test_close_is_bounded(net: Net, layer: Case) -> None:
    settings = ktls.Settings(offload=layer.offload, shutdown_timeout=0.1)
    link = net.link(layer, timeout=0.0, buffers=8192, settings=settings)
    fill(link.ours)
    link.ours.settimeout(None)
    fd = link.ours.fileno()
    inode = os.fstat(fd).st_ino
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"the peer did not take all data within 0\.1 seconds"):
        link.ours.close()
    assert time.monotonic() - start < LATE
    with suppress(OSError):
        assert os.fstat(fd).st_ino != inode


def test_close_is_bounded_by_the_timeout_of_the_socket(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=0.0, buffers=8192)
    fill(link.ours)
    link.ours.settimeout(0.1)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        link.ours.close()
    assert time.monotonic() - start < LATE


def test_close_is_bounded_though_the_peer_takes_a_little(net: Net, layer: Case) -> None:
    """The bound is for the whole, not for each byte that goes out."""
    settings = ktls.Settings(offload=layer.offload, shutdown_timeout=0.5)
    link = net.link(layer, timeout=0.0, buffers=8192, settings=settings)
    fill(link.ours, bytes(1 << 17))
    link.ours.settimeout(None)
    ended = threading.Event()

    def sip() -> None:
        with suppress(OSError):
            while not ended.wait(0.05):
                if not socket.socket.recv(link.theirs, 1024):
                    return

    theirs = socket.socket(fileno=link.theirs.detach())
    theirs.settimeout(PATIENCE)
    link.theirs = net.keep(theirs)
    sipping = net.spawn(sip)
    start = time.monotonic()
    try:
        with suppress(TimeoutError):
            link.ours.close()
        assert time.monotonic() - start < 2.0
    finally:
        ended.set()
    sipping.result()


def test_shutdown_that_timed_out_leaves_the_timeout_as_it_was(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=0.0, buffers=8192)
    fill(link.ours)
    link.ours.settimeout(0.1)
    with pytest.raises(TimeoutError):
        link.ours.shutdown(socket.SHUT_WR)
    reading = net.spawn(link.ours.recv, 1)
    with pytest.raises(TimeoutError, match="The read operation timed out"):
        reading.result(timeout=LATE)


def test_close_when_the_peer_is_gone(net: Net, layer: Case) -> None:
    link = net.link(layer)
    reset(link.theirs)
    link.ours.close()
    link.ours.close()
    assert link.ours.fileno() == -1


# --- not in order ----------------------------------------------------------------------------------------------------


def test_truncation(net: Net, case: Case) -> None:
    link = net.link(case, suppress_ragged_eofs=False)
    link.theirs.sendall(b"half a mess")
    cut(link.theirs)
    assert link.ours.recv(100) == b"half a mess"
    for _ in range(2):
        with pytest.raises(ssl.SSLEOFError) as caught:
            link.ours.recv(100)
        assert isinstance(caught.value, ktls.TruncatedError)
        assert not caught.value.recoverable


def test_truncation_that_is_not_to_be_told(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.theirs.sendall(b"half a mess")
    cut(link.theirs)
    assert read_all(link.ours) == b"half a mess"
    assert link.ours.recv(1) == b""
    link.ours.sendall(b"we may go on")
    assert link.theirs.recv(100) == b"we may go on"


def test_truncation_inside_a_record(net: Net, layer: Case) -> None:
    link = net.link(layer, suppress_ragged_eofs=False)
    link.theirs.sendall(b"whole")
    raw = net.keep(socket.socket(fileno=link.theirs.detach()))
    raw.sendall(b"\x17\x03\x03\x00\x50only a part of it")
    raw.shutdown(socket.SHUT_WR)
    assert link.ours.recv(100) == b"whole"
    with pytest.raises(ktls.TruncatedError):
        link.ours.recv(100)


def test_truncation_with_a_timeout(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=PATIENCE, suppress_ragged_eofs=False)
    cut(link.theirs)
    with pytest.raises(ktls.TruncatedError):
        link.ours.recv(100)


def test_reset(net: Net, layer: Case) -> None:
    link = net.link(layer)
    reset(link.theirs)
    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            link.ours.recv(1)
    for _ in range(3):
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            link.ours.sendall(b"x")


def test_record_that_was_tampered_with(net: Net, layer: Case) -> None:
    link = net.link(layer)
    raw = net.keep(socket.socket(fileno=link.theirs.detach()))
    raw.settimeout(PATIENCE)
    raw.sendall(b"\x17\x03\x03\x00\x50" + bytes(0x50))
    for _ in range(2):
        with pytest.raises(ktls.RemoteProtocolError) as caught:
            link.ours.recv(1)
        assert caught.value.alert == 20  # bad_record_mac
    with pytest.raises(ktls.KTLSError):
        link.ours.send(b"x")
    assert raw.recv(1) == (b"\x15" if layer.version is TLS12 else b"\x17")  # the alert
    link.ours.close()
