"""Timeouts and non-blocking mode: as ``ssl.SSLSocket``, and never fooled by a KeyUpdate that ``poll`` does not show."""

from __future__ import annotations

import io
import os
import select
import socket
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

import ktls

from ..support import HOST, TLS13
from .helpers import Case, Net, fill, matrix, pattern, read_all, read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHORT = 0.05
#: Much longer than SHORT: what takes this long did not keep its deadline.
LATE = 5.0


def timed_out(call: Callable[[], object], message: str) -> None:
    """See that ``call`` ends with ``TimeoutError`` after SHORT seconds."""
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=message):
        call()
    assert SHORT <= time.monotonic() - start < LATE


def test_settimeout(net: Net) -> None:
    ours = net.link().ours
    assert ours.gettimeout() is None
    assert ours.getblocking()
    ours.settimeout(1.5)
    assert ours.gettimeout() == 1.5
    assert ours.getblocking()
    ours.setblocking(False)
    assert ours.gettimeout() == 0.0
    assert not ours.getblocking()
    ours.setblocking(True)
    assert ours.gettimeout() is None


def test_timeout_of_the_wrapped_socket_is_kept(net: Net) -> None:
    client, _ = net.tcp()
    client.settimeout(3.25)
    context = net.context("ktls", "client")
    ours = context.wrap_socket(client, do_handshake_on_connect=False, server_hostname=HOST)
    assert net.keep(ours).gettimeout() == 3.25


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.recv(10),
        lambda s: s.recv_into(bytearray(10)),
        lambda s: s.read(10),
        lambda s: s.makefile("rb").read(10),
        lambda s: s.recvfile(io.BytesIO()),
        lambda s: s.unwrap(),
    ],
    ids=["recv", "recv_into", "read", "makefile", "recvfile", "unwrap"],
)
def test_receiving_times_out(net: Net, layer: Case, call: Callable[[Any], object]) -> None:
    timed_out(lambda: call(net.link(layer, timeout=SHORT).ours), "The read operation timed out")


def test_recvfile_to_a_file_times_out(net: Net, layer: Case, tmp_path: Path) -> None:
    link = net.link(layer, timeout=SHORT)
    link.theirs.sendall(b"beginning")
    with open(tmp_path / "file", "wb") as file:
        timed_out(lambda: link.ours.recvfile(file), "The read operation timed out")
        assert file.tell() == 9
    assert (tmp_path / "file").read_bytes() == b"beginning"


def test_sending_times_out(net: Net, layer: Case) -> None:
    ours = net.link(layer, timeout=SHORT, buffers=8192).ours
    timed_out(lambda: ours.sendall(bytes(1 << 24)), "The write operation timed out")


def test_sendfile_times_out(net: Net, layer: Case, tmp_path: Path) -> None:
    ours = net.link(layer, timeout=SHORT, buffers=8192).ours
    (tmp_path / "file").write_bytes(bytes(1 << 22))
    with open(tmp_path / "file", "rb") as file:
        timed_out(lambda: ours.sendfile(file), "The write operation timed out")
        assert 0 < file.tell() < 1 << 22


def test_handshake_times_out(net: Net, role: Case) -> None:
    client, server = net.tcp()
    sock = client if role.role == "client" else server
    sock.settimeout(SHORT)
    context = net.context("ktls", role.role, role.version)
    timed_out(
        lambda: context.wrap_socket(
            sock,
            server_side=role.role == "server",
            server_hostname=HOST if role.role == "client" else None,
        ),
        "The handshake operation timed out",
    )


def test_deadline_is_kept_though_the_peer_keeps_busy(net: Net) -> None:
    """A handshake that drips never finishes in time, and a record that drips is no data."""
    client, server = net.tcp()
    client.settimeout(4 * SHORT)
    context = net.context("ktls", "client")
    ended: list[bool] = []

    def drip() -> None:
        hello = b"\x16\x03\x03\x40\x00" + bytes(1000)
        for byte in hello:
            if ended:
                return
            server.send(bytes((byte,)))
            select.select([], [], [], 0.01)

    dripping = net.spawn(drip)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        context.wrap_socket(client, server_hostname=HOST)
    ended.append(True)
    assert time.monotonic() - start < LATE
    dripping.result()


def test_after_a_timeout_the_connection_goes_on(net: Net, layer: Case) -> None:
    link = net.link(layer, timeout=SHORT)
    with pytest.raises(TimeoutError):
        link.ours.recv(1)
    link.ours.sendall(b"hello")
    assert link.theirs.recv(100) == b"hello"
    link.theirs.sendall(b"world")
    assert link.ours.recv(100) == b"world"


def test_sendall_with_a_timeout_leaves_nothing_behind(net: Net, layer: Case) -> None:
    """What was sent is on its way when ``sendall`` returns: who then only listens must not wait for ever."""
    link = net.link(layer, timeout=LATE, buffers=8192)
    request = pattern(300_000)

    def answer() -> bytes:
        received = read_exactly(link.theirs, len(request))
        link.theirs.sendall(b"answer")
        return received

    answering = net.spawn(answer)
    link.ours.sendall(request)
    assert link.ours.recv(100) == b"answer"
    assert answering.result() == request


def test_sendfile_with_a_timeout_leaves_nothing_behind(
    net: Net, layer: Case, tmp_path: Path
) -> None:
    link = net.link(layer, timeout=LATE, buffers=8192)
    (tmp_path / "file").write_bytes(pattern(300_000))

    def answer() -> bytes:
        received = read_exactly(link.theirs, 300_000)
        link.theirs.sendall(b"answer")
        return received

    answering = net.spawn(answer)
    with open(tmp_path / "file", "rb") as file:
        assert link.ours.sendfile(file) == 300_000
    assert link.ours.recv(100) == b"answer"
    assert answering.result() == pattern(300_000)


def test_send_that_timed_out_is_repeated_without_doubling(net: Net, layer: Case) -> None:
    """As with ``ssl``: the same data again, and the peer gets it once."""
    link = net.link(layer, timeout=SHORT, buffers=8192)
    data = pattern(1 << 20)
    sent = 0
    with suppress(TimeoutError):
        while True:
            sent += link.ours.send(data[sent:])
    assert sent < len(data)
    receiving = net.spawn(read_exactly, link.theirs, len(data))
    link.ours.settimeout(LATE)
    while sent < len(data):
        sent += link.ours.send(data[sent:])
    assert sent == len(data)
    assert receiving.result() == data


# --- KeyUpdates that poll does not show ------------------------------------------------------------------------------

REKEYING = matrix(versions=(TLS13,), roles=("client",), peers=("ktls",))


@pytest.mark.parametrize("case", REKEYING, ids=str)
def test_key_update_behind_data_does_not_time_out(net: Net, case: Case) -> None:
    """Read together with the data in front of it, a KeyUpdate is invisible to poll: the reader must find it by itself."""
    link = net.link(case, timeout=1.0, changing_peer=True)
    for _ in range(3):
        link.theirs.sendall(b"in front")
        link.theirs.refresh_traffic_keys()
        assert link.ours.recv(65536) == b"in front"
        link.theirs.sendall(b"behind")
        assert link.ours.recv(65536) == b"behind"


@pytest.mark.parametrize("case", REKEYING, ids=str)
def test_answer_to_a_key_update_goes_out_while_we_only_read(net: Net, case: Case) -> None:
    link = net.link(case, timeout=SHORT, changing_peer=True)
    if not case.may_refresh:
        return  # see test_request_that_can_not_be_answered_ends_our_sending
    link.theirs.refresh_traffic_keys(request_peer=True)
    with pytest.raises(TimeoutError):
        link.ours.recv(1)
    link.theirs.settimeout(SHORT)
    with pytest.raises(TimeoutError):
        link.theirs.recv(1)
    assert link.theirs.key_usage.rx.generation == 1


@pytest.mark.parametrize("case", REKEYING, ids=str)
def test_select_loop_does_not_hang_on_a_hidden_key_update(net: Net, case: Case) -> None:
    link = net.link(case, timeout=0.0, changing_peer=True)
    received = bytearray()

    def wait_for(count: int) -> None:
        while len(received) < count:
            assert select.select([link.ours], [], [], LATE)[0], "hangs"
            try:
                received.extend(link.ours.recv(65536))
            except ssl.SSLWantReadError:
                continue

    for number in range(1, 6):
        link.theirs.sendall(b"data")
        # A kernel without rekey can't answer: we could not go on sending then, but that is another matter.
        link.theirs.refresh_traffic_keys(request_peer=number % 2 == 0)
        wait_for(8 * number - 4)
        link.theirs.sendall(b"more")
        wait_for(8 * number)
    assert received == b"datamore" * 5


# --- non-blocking ----------------------------------------------------------------------------------------------------


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
