"""Non-blocking mode: as that of ``ssl.SSLSocket``, whatever TCP takes at a time."""

from __future__ import annotations

import io
import os
import select
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

import ktls

from ..support import HOST
from .helpers import LATE, Case, Net, fill, pattern, read_all, read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable


def test_nonblocking_receive(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=0.0)
    calls: list[Callable[[], object]] = [
        lambda: link.ours.recv(10),
        lambda: link.ours.recv_into(bytearray(10)),
        lambda: link.ours.read(10),
        lambda: link.ours.recvfile(io.BytesIO()),
    ]
    for call in calls:
        with pytest.raises(ssl.SSLWantReadError) as caught:
            call()
        assert caught.value.errno == ssl.SSL_ERROR_WANT_READ
    link.theirs.sendall(b"now")
    assert select.select([link.ours], [], [], LATE)[0]
    assert link.ours.recv(10) == b"now"


def test_nonblocking_send(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=0.0, buffers=8192)
    fill(link.ours)
    with pytest.raises(ssl.SSLWantWriteError) as caught:
        link.ours.send(bytes(16384))
    assert caught.value.errno == ssl.SSL_ERROR_WANT_WRITE
    with pytest.raises(ssl.SSLWantWriteError):
        link.ours.sendall(bytes(16384))


def test_nonblocking_send_tells_the_truth(net: Net, layer: Case) -> None:
    """Once all was accepted nothing more need be called for it to arrive: an event loop would only wait for the answer."""
    link = net.link(layer, timeout=0.0, buffers=8192)
    request = pattern(400_000)

    def answer() -> bytes:
        received = read_exactly(link.theirs, len(request))
        link.theirs.sendall(b"answer")
        return received

    answering = net.spawn(answer)
    sent = 0
    while sent < len(request):
        try:
            sent += link.ours.send(request[sent:])
        except ssl.SSLWantWriteError:
            assert select.select([], [link.ours], [], LATE)[1]
    assert sent == len(request)
    while True:
        assert select.select([link.ours], [], [], LATE)[0], "the request did not go out"
        try:
            assert link.ours.recv(100) == b"answer"
            break
        except ssl.SSLWantReadError:
            continue
    assert answering.result() == request


@pytest.mark.parametrize("size", [1000, 16384, 65536])
def test_nonblocking_echo_of_a_lot(net: Net, layer: Case, size: int) -> None:
    """A loop as people write it for ``ssl``: select, and drain what ``pending`` tells of."""
    link = net.link(layer, timeout=0.0)
    data = pattern(1 << 19)
    sending = net.spawn(link.theirs.sendall, data)
    received = bytearray()
    while len(received) < len(data):
        if not link.ours.pending():
            assert select.select([link.ours], [], [], 1.0)[0], "hangs"
        try:
            received += link.ours.recv(size)
        except ssl.SSLWantReadError:
            continue
    assert received == data
    sending.result()


def test_nonblocking_handshake(net: Net, role: Case) -> None:
    client, server = net.tcp()
    mine, their = (client, server) if role.role == "client" else (server, client)
    their_role: Any = "server" if role.role == "client" else "client"
    mine.setblocking(False)
    their.settimeout(LATE)
    ours = net.context("ktls", role.role, role.version).wrap_socket(
        mine,
        server_side=role.role == "server",
        server_hostname=HOST if role.role == "client" else None,
        do_handshake_on_connect=False,
    )
    net.keep(ours)
    with pytest.raises(ssl.SSLWantReadError):
        ours.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        ours.recv(1)
    theirs = net.spawn(
        net.context("stdlib", their_role, role.version).wrap_socket,
        their,
        server_side=their_role == "server",
        server_hostname=HOST if their_role == "client" else None,
    )
    while True:
        try:
            ours.do_handshake()
            break
        except ssl.SSLWantReadError:
            assert select.select([ours], [], [], LATE)[0]
        except ssl.SSLWantWriteError:
            assert select.select([], [ours], [], LATE)[1]
    peer = net.keep(theirs.result())
    ours.do_handshake()  # does nothing any more
    peer.sendall(b"x")
    while True:
        assert select.select([ours], [], [], LATE)[0]
        try:
            assert ours.recv(1) == b"x"
            break
        except ssl.SSLWantReadError:
            continue  # that was a session ticket


def test_nonblocking_handshake_on_connect_is_refused_as_by_ssl(net: Net) -> None:
    client, _ = net.tcp()
    client.setblocking(False)
    with pytest.raises(ValueError, match="do_handshake_on_connect should not be specified"):
        net.context("ktls", "client").wrap_socket(client, server_hostname=HOST)


def test_handshake_that_shall_block(net: Net) -> None:
    client, server = net.tcp()
    client.setblocking(False)
    ours = net.context("ktls", "client").wrap_socket(
        client, server_hostname=HOST, do_handshake_on_connect=False
    )
    net.keep(ours)
    theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
    ours.do_handshake(block=True)
    assert ours.gettimeout() == 0.0
    net.keep(theirs.result())


def test_nonblocking_shutdown(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=0.0, buffers=8192)
    accepted = fill(link.ours)
    with pytest.raises(ssl.SSLWantWriteError):
        link.ours.shutdown(socket.SHUT_WR)
    receiving = net.spawn(read_all, link.theirs)
    while True:
        try:
            link.ours.shutdown(socket.SHUT_WR)
            break
        except ssl.SSLWantWriteError:
            assert select.select([], [link.ours], [], LATE)[1]
    received = receiving.result()
    # The last piece, for which SSLWantWriteError was raised, may have been taken by a layer in this process.
    assert received in (bytes(accepted), bytes(accepted + 16384))


def test_nonblocking_unwrap(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=0.0)
    with pytest.raises(ssl.SSLWantReadError):
        link.ours.unwrap()
    unwrapping = net.spawn(link.theirs.unwrap)
    while True:
        try:
            plain = net.keep(link.ours.unwrap())
            break
        except ssl.SSLWantReadError:
            assert select.select([link.ours], [], [], LATE)[0]
    net.keep(unwrapping.result())
    assert plain.gettimeout() == 0.0


def test_refresh_on_a_full_socket_happens_before_the_next_data(net: Net) -> None:
    case = Case(peer="ktls")
    link = net.link(case, timeout=0.0, buffers=8192)
    if not case.may_refresh:
        with pytest.raises(ktls.LocalProtocolError):
            link.ours.refresh_traffic_keys()
        return
    accepted = fill(link.ours) + 16384
    link.ours.refresh_traffic_keys()
    receiving = net.spawn(read_exactly, link.theirs, accepted + 5)
    rest = bytes(16384) + b"after"
    while rest:
        try:
            rest = rest[link.ours.send(rest) :]
        except ssl.SSLWantWriteError:
            assert select.select([], [link.ours], [], LATE)[1]
    assert receiving.result() == bytes(accepted) + b"after"
    assert link.theirs.key_usage.rx.generation == 1


def test_reader_keeps_its_timeout_while_another_thread_shuts_down(net: Net, layer: Case) -> None:
    """Shutting down makes the descriptor blocking for a while; that is none of the reader's business."""
    link = net.link(layer, timeout=0.0, buffers=8192)
    fill(link.ours)
    link.ours.settimeout(0.5)
    ending = net.spawn(link.ours.shutdown, socket.SHUT_WR)
    while not os.get_blocking(link.ours.fileno()) and not ending.done():
        pass
    reading = net.spawn(link.ours.recv, 1)
    with pytest.raises(TimeoutError):
        ending.result()
    with pytest.raises(TimeoutError, match="The read operation timed out"):
        reading.result(timeout=LATE)
    assert link.ours.gettimeout() == 0.5
    assert not os.get_blocking(link.ours.fileno())


def test_a_sender_takes_nothing_from_a_reader_that_polls(net: Net) -> None:
    """In user space a long ``sendall`` reads ahead, for control records; a reader that waits in ``poll`` would never hear of data that came with them."""
    link = net.link(Case(offload="userspace"), timeout=LATE)
    driver = link.ours._driver
    assert driver is not None
    with pytest.raises(BlockingIOError):  # as a reader does, and then it polls
        driver.recv_into(bytearray(1), 1, socket.MSG_DONTWAIT)
    link.theirs.sendall(b"data")
    for _ in range(2):
        assert select.select([link.ours], [], [], LATE)[0]
        driver.settle(read_ahead=True)
    assert link.ours.pending() == 0
    assert link.ours.recv(100) == b"data"
