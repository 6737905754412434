"""Timeouts: as those of ``ssl.SSLSocket``, and never fooled by a KeyUpdate that ``poll`` does not show."""

from __future__ import annotations

import io
import select
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from ..support import HOST, TLS13
from .helpers import LATE, Case, Net, matrix, pattern, read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHORT = 0.05


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
