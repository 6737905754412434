"""When a connection's state can't be exported; the connection is then as it was."""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from typing import TYPE_CHECKING, NoReturn

import pytest

import ktls
from ktls.protocol.enums import ContentType
from ktls.record.handover import take_driver
from ktls.waiting import for_write

from ..support import has_rekey
from .helpers import PATIENCE, Case, Link, Net, read_exactly
from .test_engine_layer import cbc_link
from .test_state import REFRESHABLE, again, driver_of

if TYPE_CHECKING:
    from ..support import Authority


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


class Interruption(Exception):
    """Raised by a signal handler."""


def test_not_after_an_interruption_amid_a_key_change(net: Net) -> None:
    """The secret may have moved on, and its key has not: whoever went on from there would use the wrong one."""
    link = net.link(Case(offload="userspace"), timeout=PATIENCE)
    driver = driver_of(link.ours)
    half = driver.connection._tx

    def change_half() -> NoReturn:
        assert half.secret is not None
        half.secret = half.secret.next()
        raise Interruption

    with driver.sending._state_lock, pytest.raises(Interruption):
        driver.sending.follow(change_half)
    refused(link, "failed")
    with pytest.raises(ConnectionAbortedError):
        link.ours.send(b"x")


def test_not_after_an_interruption_amid_a_record(net: Net) -> None:
    link = net.link(Case(offload="userspace"), timeout=PATIENCE)
    driver_of(link.ours).receiving._reading = True
    refused(link, "failed")
    with pytest.raises(ConnectionAbortedError):
        link.ours.recv(1)


def test_not_with_the_engine(net: Net, authority: Authority) -> None:
    link = cbc_link(net, authority, "AES128-SHA", "client", timeout=PATIENCE)
    refused(link, "engine")
    link.ours.sendall(b"pong")
    assert read_exactly(link.theirs, 4) == b"pong"
