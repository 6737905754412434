"""The driver whose records stay with the handshake engine, against the ``ssl`` module's own sockets."""

from __future__ import annotations

import errno
import functools
import os
import socket
import ssl
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.errors import LocalProtocolError, TruncatedError
from ktls.record.engine import EngineDriver
from ktls.testing import RecordPeer, fill_up, loopback_pair, pattern, turns
from ktls.testing.bench import reset_noticed

from .layers import TLS13
from .rig import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_WAIT = socket.MSG_DONTWAIT


class Sender(socket.socket):
    """A socket whose sends do as they are told first."""

    orders: list[OSError]

    def send(self, data: Any, flags: int = 0) -> int:
        if self.orders:
            raise self.orders.pop(0)
        return super().send(data, flags)


class Connection:
    """Ours with an engine, theirs a socket of ``ssl``."""

    def __init__(
        self,
        sock: socket.socket,
        theirs: socket.socket,
        client: ssl.SSLContext,
        server: ssl.SSLContext,
    ) -> None:
        self.sock = Sender(fileno=sock.detach())
        self.sock.orders = []
        self.peer = server.wrap_socket(theirs, server_side=True, do_handshake_on_connect=False)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        engine = client.wrap_bio(incoming, outgoing, server_hostname="localhost")
        handshake = Worker(self.peer.do_handshake)
        while True:
            try:
                engine.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(outgoing.read())
                incoming.write(self.sock.recv(65536))
        self.sock.sendall(outgoing.read())
        handshake.result()
        self.driver = EngineDriver(self.sock, engine, incoming, outgoing)

    def read(self, size: int) -> bytes:
        data = bytearray()
        buffer = bytearray(65536)
        while len(data) < size:
            count = self.driver.recv_into(buffer, min(len(buffer), size - len(data)))
            assert count, "ended"
            data += buffer[:count]
        return bytes(data)

    def peer_reads(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += self.peer.recv(size - len(data))
        return bytes(data)


@pytest.fixture(params=["TLSv1.2", "TLSv1.3"])
def connection(
    request: pytest.FixtureRequest,
    authority: Any,
) -> Iterator[Connection]:
    client, server = authority.client(), authority.server()
    version = ssl.TLSVersion.TLSv1_2 if request.param == "TLSv1.2" else ssl.TLSVersion.TLSv1_3
    client.minimum_version = client.maximum_version = version
    with loopback_pair(sndbuf=16 * 1024, rcvbuf=16 * 1024) as (sock, theirs):
        made = Connection(sock, theirs, client, server)
        assert made.peer.version() == request.param
        with made.sock, made.peer:
            yield made


def test_data_both_ways(connection: Connection) -> None:
    for size in (1, 16384, 300_000):
        reader = Worker(functools.partial(connection.peer_reads, size))
        sent = 0
        while sent < size:
            sent += connection.driver.send(pattern(size)[sent:])
        connection.driver.flush()
        assert reader.result() == pattern(size)
        writer = Worker(functools.partial(connection.peer.sendall, pattern(size)))
        assert connection.read(size) == pattern(size)
        writer.result()


def test_sendfile(connection: Connection) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(pattern(1000))
        file.flush()
        assert connection.driver.sendfile(file.fileno(), 10, 100) == 100
        assert connection.peer_reads(100) == pattern(100, 10)
        assert connection.driver.sendfile(file.fileno(), 1000, 100) == 0


def test_blocks_and_goes_on(connection: Connection) -> None:
    driver = connection.driver
    total = fill_up(lambda: driver.send(bytes(16384), NO_WAIT), connection.sock)
    assert driver.owes
    assert driver.unsent
    with pytest.raises(BlockingIOError):
        driver.recv_into(bytearray(9), 0, NO_WAIT)
    reader = Worker(lambda: connection.peer_reads(total + 1))
    assert driver.send(b"x") == 1
    driver.flush()
    assert reader.result() == bytes(total) + b"x"
    assert not driver.owes


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EAGAIN])
def test_error_that_passes_repeats_nothing(connection: Connection, number: int) -> None:
    connection.driver.flush()
    connection.sock.orders = [OSError(number, os.strerror(number))]
    assert connection.driver.send(b"once") == 4
    connection.driver.send(b"twice")
    assert connection.peer_reads(9) == b"oncetwice"


def test_close(connection: Connection) -> None:
    driver = connection.driver
    driver.send(b"last")
    for _ in range(2):
        driver.close_notify()
    with pytest.raises(LocalProtocolError):
        driver.send(b"more")
    assert connection.peer_reads(4) == b"last"
    assert connection.peer.recv(9) == b""
    if connection.peer.version() == "TLSv1.3":
        connection.peer.sendall(b"theirs")
        assert connection.read(6) == b"theirs"


def test_peer_closes(connection: Connection) -> None:
    connection.peer.sendall(b"last")
    closer = Worker(connection.peer.unwrap)
    assert connection.read(4) == b"last"
    for _ in range(3):
        assert connection.driver.recv_into(bytearray(9)) == 0
    assert connection.driver.peer_closed
    connection.driver.close_notify()
    closer.result()


def test_truncated(connection: Connection) -> None:
    connection.peer.sendall(b"data")
    connection.peer.shutdown(socket.SHUT_WR)
    assert connection.read(4) == b"data"
    for _ in range(3):
        with pytest.raises(TruncatedError):
            connection.read(1)


def test_reset_is_told_again_and_again(connection: Connection) -> None:
    RecordPeer(connection.peer, TLS13).reset()
    reset_noticed(connection.sock)
    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            connection.read(1)
    for _ in turns("sending fails"):
        try:
            connection.driver.send(b"x")
        except OSError as error:
            first = error.errno
            break
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            connection.driver.send(b"x")
        assert caught.value.errno == first


def test_bad_record_is_answered_with_an_alert(connection: Connection) -> None:
    raw = os.dup(connection.peer.fileno())
    with socket.socket(fileno=raw) as wire:
        wire.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(ssl.SSLError):
        connection.read(1)
    with pytest.raises(ssl.SSLError, match=r"(?i)alert|bad.record.mac"):
        connection.peer.recv(9)


@pytest.mark.parametrize(
    "call",
    [
        lambda driver: driver.splice(1, 1),
        lambda driver: driver.refresh_traffic_keys(),
    ],
    ids=["splice", "refresh"],
)
def test_what_it_cannot_do(connection: Connection, call: Callable[[EngineDriver], object]) -> None:
    with pytest.raises(LocalProtocolError):
        call(connection.driver)
    connection.driver.settle()
    assert (connection.driver.tx_layer, connection.driver.rx_layer) == ("engine", "engine")
    usage = connection.driver.key_usage()
    assert (usage.tx.records, usage.rx.records) == (0, 0)
    assert connection.driver.send(b"") == 0
