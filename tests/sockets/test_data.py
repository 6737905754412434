"""Data in both directions: every call of ``ssl.SSLSocket`` that moves bytes."""

from __future__ import annotations

import socket
import threading
from array import array
from typing import TYPE_CHECKING, Any

import pytest

import ktls

from ..support import TLS13
from .helpers import PATIENCE, Case, Net, matrix, pattern, read_all, read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable

MEGABYTE = 1 << 20


def test_echo(net: Net, case: Case) -> None:
    link = net.link(case)
    assert link.ours.version() == case.version.name.replace("_", ".").replace("TLSv1.", "TLSv1.")
    for size in (1, 100, 16384, 16385):
        data = pattern(size)
        link.ours.sendall(data)
        assert read_exactly(link.theirs, size) == data
        link.theirs.sendall(data)
        assert read_exactly(link.ours, size) == data


def test_layers_are_the_expected(net: Net, case: Case) -> None:
    ours = net.link(case).ours
    assert (ours.offload.tx, ours.offload.rx) == (case.tx_layer, case.rx_layer)
    assert (ours.offload.reason is None) == (ours.offload.tx == ours.offload.rx == "kernel")


@pytest.mark.parametrize(
    "data",
    [
        memoryview(array("I", range(1000))),
        array("H", range(1000)),
        bytearray(pattern(5000)),
        memoryview(pattern(5000))[3:4001],
        memoryview(pattern(64)).cast("B", (8, 8)),
        b"",
        memoryview(b""),
        bytearray(),
    ],
    ids=["uint32", "array", "bytearray", "slice", "two-dimensional", "empty", "empty-view", "none"],
)
def test_any_buffer_can_be_sent(net: Net, version: Case, data: Any) -> None:
    link = net.link(version)
    expected = bytes(data)
    assert link.ours.sendall(data) is None  # type: ignore[func-returns-value]  # None is what is tested
    assert link.ours.send(data) == len(expected)
    assert link.ours.write(data) == len(expected)
    link.ours.sendall(b"end")
    assert read_exactly(link.theirs, 3 * len(expected) + 3) == expected * 3 + b"end"


def test_recv(net: Net, version: Case) -> None:
    link = net.link(version)
    link.theirs.sendall(pattern(20000))
    assert link.ours.recv(0) == b""
    assert link.ours.recv(1) == pattern(20000)[:1]
    assert read_exactly(link.ours, 19999) == pattern(20000)[1:]
    with pytest.raises(ValueError, match="negative buffersize"):
        link.ours.recv(-1)


def test_recv_has_the_default_size_of_ssl(net: Net, version: Case) -> None:
    link = net.link(version)
    link.theirs.sendall(pattern(3000))
    assert link.ours.recv() == pattern(3000)[:1024]
    assert link.ours.read() == pattern(3000)[1024:2048]


def test_recv_more_than_there_is(net: Net, version: Case) -> None:
    link = net.link(version)
    link.theirs.sendall(b"few")
    assert link.ours.recv(1 << 40) == b"few"


def test_recv_into(net: Net, version: Case) -> None:
    link = net.link(version)
    link.theirs.sendall(b"0123456789" * 10)
    buffer = bytearray(16)
    assert link.ours.recv_into(buffer) == 16
    assert buffer == b"0123456789012345"
    assert link.ours.recv_into(buffer, 4) == 4
    assert buffer == b"6789456789012345"
    assert link.ours.recv_into(buffer, 0) == 16
    numbers = array("I", [0, 0])
    assert link.ours.recv_into(numbers) == 8
    assert numbers.tobytes() == b"67890123"
    assert link.ours.recv_into(memoryview(buffer)[4:6]) == 2
    assert link.ours.recv_into(bytearray()) == 0
    with pytest.raises(ValueError, match="nbytes"):
        link.ours.recv_into(buffer, -1)


def test_recv_into_takes_a_size_beyond_the_buffer_as_ssl_does(net: Net, version: Case) -> None:
    link = net.link(version)
    link.theirs.sendall(b"0123456789")
    buffer = bytearray(4)
    assert link.ours.recv_into(buffer, 100) == 4
    assert link.ours.read(buffer=buffer) == 4
    assert buffer == b"4567"


def test_read_and_write(net: Net, version: Case) -> None:
    link = net.link(version)
    assert link.ours.write(b"question") == 8
    assert link.theirs.recv(100) == b"question"
    link.theirs.sendall(b"answer")
    assert link.ours.read(3) == b"ans"
    buffer = bytearray(8)
    assert link.ours.read(8, buffer) == 3
    assert buffer == b"wer\0\0\0\0\0"


def test_pending_tells_what_poll_does_not(net: Net, layer: Case) -> None:
    link = net.link(layer)
    link.theirs.sendall(b"0123456789")
    assert link.ours.recv(4) == b"0123"
    if layer.rx_layer == "userspace":
        assert link.ours.pending() == 6
    else:
        assert link.ours.pending() == 0  # the kernel shows it to poll
    assert link.ours.recv(10) == b"456789"
    assert link.ours.pending() == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.recv(1, 1),
        lambda s: s.recv_into(bytearray(1), 1, 1),
        lambda s: s.send(b"x", 1),
        lambda s: s.sendall(b"x", 1),
    ],
    ids=["recv", "recv_into", "send", "sendall"],
)
def test_flags_are_refused(net: Net, call: Callable[[ktls.KTLSSocket], object]) -> None:
    with pytest.raises(ValueError, match="non-zero flags not allowed"):
        call(net.link().ours)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dup", ()),
        ("recvfrom", (1,)),
        ("recvfrom_into", (bytearray(1),)),
        ("recvmsg", (1,)),
        ("recvmsg_into", ([bytearray(1)],)),
        ("sendmsg", ([b"x"],)),
        ("sendto", (b"x", ("127.0.0.1", 1))),
    ],
)
def test_what_makes_no_sense_on_tls_is_refused(net: Net, name: str, arguments: Any) -> None:
    link = net.link()
    with pytest.raises(NotImplementedError, match=f"{name} not allowed on instances of KTLSSocket"):
        getattr(link.ours, name)(*arguments)
    link.ours.sendall(b"still fine")
    assert link.theirs.recv(100) == b"still fine"


# --- makefile --------------------------------------------------------------------------------------------------------


def test_makefile_reads_lines(net: Net, role: Case) -> None:
    link = net.link(role)
    lines = [b"line %d of many\n" % number for number in range(2000)]
    sending = net.spawn(link.theirs.sendall, b"".join(lines) + b"no newline")
    with link.ours.makefile("rb") as reader:
        for line in lines:
            assert reader.readline() == line
        assert reader.read(10) == b"no newline"
    sending.result()


def test_makefile_writes(net: Net, role: Case) -> None:
    link = net.link(role)
    with link.ours.makefile("wb") as writer:
        for number in range(100):
            writer.write(b"%d\n" % number)
        writer.flush()
        assert link.theirs.makefile("rb").readline() == b"0\n"


def test_makefile_both_ways(net: Net, role: Case) -> None:
    link = net.link(role)
    with link.ours.makefile("rwb") as ours, link.theirs.makefile("rwb") as theirs:
        for number in range(20):
            ours.write(b"request %d\n" % number)
            ours.flush()
            assert theirs.readline() == b"request %d\n" % number
            theirs.write(b"response %d\n" % number)
            theirs.flush()
            assert ours.readline() == b"response %d\n" % number


def test_makefile_in_text(net: Net, version: Case) -> None:
    link = net.link(version)
    with link.ours.makefile("rw", encoding="utf-8", newline="\n") as ours:
        ours.write("grüße\n")
        ours.flush()
        assert link.theirs.recv(100) == "grüße\n".encode()
        link.theirs.sendall("zurück\n".encode())
        assert ours.readline() == "zurück\n"


def test_makefile_unbuffered(net: Net, version: Case) -> None:
    link = net.link(version)
    with link.ours.makefile("rwb", buffering=0) as ours:
        assert ours.write(b"raw") == 3
        assert link.theirs.recv(100) == b"raw"
        link.theirs.sendall(b"cooked")
        assert ours.read(100) == b"cooked"


# --- a lot of it -----------------------------------------------------------------------------------------------------


def test_big_transfers_both_ways_at_once(net: Net, case: Case) -> None:
    size = 4 * MEGABYTE if case.role == "client" else MEGABYTE
    link = net.link(case)
    up, down = pattern(size, 1), pattern(size, 2)
    receiving = net.spawn(read_exactly, link.theirs, size)
    sending = net.spawn(link.theirs.sendall, down) if case.peer == "ktls" else None
    reading = net.spawn(read_exactly, link.ours, size)
    link.ours.sendall(up)
    assert receiving.result() == up
    if sending is None:  # ssl.SSLSocket has one lock for both directions
        sending = net.spawn(link.theirs.sendall, down)
    assert reading.result() == down
    sending.result()


@pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "timeout"])
@pytest.mark.parametrize("case", matrix(versions=(TLS13,), peers=("ktls",)), ids=str)
def test_full_duplex_with_a_thread_that_refreshes_keys(
    net: Net, case: Case, timeout: float | None
) -> None:
    """One reads, one writes, a third changes keys, at both ends; not a byte is lost, repeated or moved."""
    link = net.link(case, timeout=timeout, changing_peer=True)
    ends = (link.ours, link.theirs)
    may_refresh = case.may_refresh
    enough = threading.Event()
    block = pattern(100_003)

    def refresh(sock: ktls.KTLSSocket) -> None:
        for count in range(12):
            sock.refresh_traffic_keys(request_peer=count % 3 == 0)
            enough.wait(0.002)

    def write(sock: ktls.KTLSSocket) -> int:
        blocks = 0
        while blocks < 5 or not enough.is_set():
            sock.sendall(block)
            blocks += 1
        sock.shutdown(socket.SHUT_WR)
        return blocks

    def read(sock: ktls.KTLSSocket) -> int:
        blocks = 0
        while data := read_exactly(sock, len(block)):
            assert data == block
            blocks += 1
        return blocks

    readers = [net.spawn(read, end) for end in ends]
    writers = [net.spawn(write, end) for end in ends]
    keepers = [net.spawn(refresh, end) for end in ends] if may_refresh else []
    try:
        for keeper in keepers:
            keeper.result()
    finally:
        enough.set()
    sent = [writer.result() for writer in writers]
    assert [reader.result() for reader in readers] == sent[::-1]
    if may_refresh:
        for end in ends:
            assert end.key_usage.tx.generation >= 12
            assert end.key_usage.rx.generation >= 12


def test_reader_is_not_kept_by_a_sender_that_is_stuck(net: Net, layer: Case) -> None:
    """Full buffers in one direction stop nothing in the other."""
    link = net.link(layer, buffers=8192)
    sending = net.spawn(link.ours.sendall, pattern(MEGABYTE))
    link.theirs.sendall(b"meanwhile")
    assert link.ours.recv(100) == b"meanwhile"
    assert read_exactly(link.theirs, MEGABYTE) == pattern(MEGABYTE)
    sending.result()


def test_end_after_data(net: Net, case: Case) -> None:
    link = net.link(case)

    def talk() -> None:
        link.theirs.sendall(pattern(100_000))
        if case.peer == "ktls":
            link.theirs.close()
        else:
            link.theirs.unwrap()

    talking = net.spawn(talk)
    assert read_all(link.ours) == pattern(100_000)
    assert link.ours.recv(1) == b""
    link.ours.close()
    talking.result()
