"""What Linux says about kernel TLS, row by row, and that our layers make the right thing of it.

Each test shows what the kernel itself does, with a raw socket, and then what the layer or the driver over it does. If a newer kernel behaves otherwise, the first half says so.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ktls.record
from ktls.protocol.enums import AlertDescription, ContentType
from ktls.protocol.errors import KeyLimitError, RemoteProtocolError
from ktls.protocol.messages import build_alert
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.interface import ControlRecord
from ktls.record.kernel import KernelReceiver, KernelSender, attach
from ktls.record.linux import (
    CRYPTO_INFO,
    SOL_TLS,
    TCP_ULP,
    TLS_RX,
    TLS_SET_RECORD_TYPE,
    TLS_TX,
    TLS_TX_MAX_PAYLOAD_LEN,
    pack_crypto_info,
)
from ktls.testing import (
    RecordPeer,
    eventually,
    fill_up,
    is_key_update,
    loopback_pair,
    made_up_keys,
    pattern,
    turns,
    wait_readable,
)
from ktls.testing.bench import reset_noticed

from .layers import TLS12, TLS13, kernel_receiver, kernel_sender
from .rig import rig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.kernel

DATA, ALERT, HANDSHAKE = (
    ContentType.APPLICATION_DATA,
    ContentType.ALERT,
    ContentType.HANDSHAKE,
)
NO_WAIT = socket.MSG_DONTWAIT
WARNING = b"\x01\x5a"
SPACE = socket.CMSG_SPACE(1)
KEY_UPDATE = b"\x18\x00\x00\x01\x00"
TICKET = bytes.fromhex("04 00000e 00001c20 01020304 00 0001 78 0000")
both_versions = pytest.mark.parametrize("suite", [TLS12, TLS13], ids=lambda suite: suite.name)


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """Expect an ``OSError`` with this errno."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


@contextlib.contextmanager
def receiving(
    suite: CipherSuite = TLS13,
) -> Iterator[tuple[KernelReceiver, RecordPeer, socket.socket]]:
    with loopback_pair() as (sock, theirs):
        receiver = kernel_receiver(sock, suite, made_up_keys(suite, "peer"), 0)
        yield receiver, RecordPeer(theirs, suite), sock


@contextlib.contextmanager
def sending(
    suite: CipherSuite = TLS13, *, small: bool = False
) -> Iterator[tuple[KernelSender, RecordPeer, socket.socket]]:
    size = 16 * 1024 if small else None
    with loopback_pair(sndbuf=size, rcvbuf=size) as (sock, theirs):
        sender = kernel_sender(sock, suite, made_up_keys(suite, "us"), 0, MAX_FRAGMENT)
        yield sender, RecordPeer(theirs, suite), sock


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reads, writes = os.pipe()
    try:
        yield reads, writes
    finally:
        os.close(reads)
        os.close(writes)


def crypto_info(suite: CipherSuite = TLS13, name: str = "us") -> bytes:
    return pack_crypto_info(suite, made_up_keys(suite, name), 0)


def readable(sock: socket.socket) -> int:
    """What ``poll`` says now, of everything."""
    poller = select.poll()
    poller.register(sock, select.POLLIN | select.POLLOUT)
    return dict(poller.poll(0)).get(sock.fileno(), 0)


# --- setting up ---------------------------------------------------------------------------------------------------


class WithoutModule(socket.socket):
    """Its kernel has no ULP of the name that is asked for."""

    def setsockopt(self, level: int, option: int, value: object, *rest: object) -> None:
        assert value == b"tls"
        super().setsockopt(level, option, b"none such")


def test_enoent_at_attach_no_module() -> None:
    with loopback_pair() as (sock, _):
        mine = WithoutModule(fileno=sock.detach())
        with mine, refused(errno.ENOENT):
            attach(mine)


def test_enoent_at_keys_no_algorithm() -> None:
    """The socket is clean afterwards: plain text passes, and another cipher may be set."""
    with loopback_pair() as (sock, theirs):
        attach(sock)
        sm4 = struct.pack("=HH", 0x0304, 55) + bytes(36)
        for direction in (TLS_TX, TLS_RX):
            with refused(errno.ENOENT):
                sock.setsockopt(SOL_TLS, direction, sm4)
        sock.sendall(b"plain")
        assert theirs.recv(9) == b"plain"
        sender = kernel_sender(sock, TLS13, made_up_keys(TLS13, "us"), 0, MAX_FRAGMENT)
        sender.send(b"sealed")
        assert RecordPeer(theirs, TLS13).read_data(6) == b"sealed"


def test_enotconn_at_attach() -> None:
    with socket.socket() as new, refused(errno.ENOTCONN):
        attach(new)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        with refused(errno.ENOTCONN):
            attach(listening)
    with loopback_pair() as (sock, theirs):
        theirs.shutdown(socket.SHUT_WR)
        assert wait_readable(sock)
        with refused(errno.ENOTCONN):
            attach(sock)


def test_eexist_at_attach() -> None:
    """Attached already is fine, if it is ours."""
    with loopback_pair() as (sock, _):
        attach(sock)
        with refused(errno.EEXIST):
            sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        attach(sock)


def test_enoprotoopt_without_ulp_and_for_unknown_options() -> None:
    with loopback_pair() as (sock, _):
        with refused(errno.ENOPROTOOPT):
            KernelSender(sock, TLS13, made_up_keys(TLS13, "us"), can_change_key=True)
        with refused(errno.ENOPROTOOPT):
            KernelReceiver(sock, TLS13, made_up_keys(TLS13, "peer"), can_change_key=True)
        with refused(errno.EOPNOTSUPP):
            sock.getsockopt(SOL_TLS, TLS_TX, 40)
        attach(sock)
        with refused(errno.ENOPROTOOPT):
            sock.setsockopt(SOL_TLS, 99, b"\x00\x00")


@pytest.mark.norekey
def test_enoprotoopt_for_max_payload_on_old_kernels() -> None:
    """The half-made sender leaves the socket plain, so that another layer can take it."""
    with loopback_pair() as (sock, theirs):
        with refused(errno.ENOPROTOOPT):
            kernel_sender(sock, TLS13, made_up_keys(TLS13, "us"), 0, 512)
        sock.sendall(b"plain")
        assert theirs.recv(100) == b"plain"


@pytest.mark.rekey
def test_einval_for_max_payload_leaves_the_socket_plain() -> None:
    with loopback_pair() as (sock, theirs):
        with refused(errno.EINVAL):
            kernel_sender(sock, TLS13, made_up_keys(TLS13, "us"), 0, 10)
        sock.sendall(b"plain")
        assert theirs.recv(100) == b"plain"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["udp", "unix"])
def test_eopnotsupp_where_it_is_not_tcp(family: socket.AddressFamily) -> None:
    kind = socket.SOCK_DGRAM if family is socket.AF_INET else socket.SOCK_STREAM
    with socket.socket(family, kind) as sock, pytest.raises(OSError) as caught:
        attach(sock)
    assert caught.value.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)


@pytest.mark.parametrize("direction", [TLS_TX, TLS_RX], ids=["tx", "rx"])
def test_einval_at_keys(direction: int) -> None:
    good = crypto_info()
    with loopback_pair() as (sock, _):
        attach(sock)
        for bad in (
            good[:-1],
            good + b"\0",
            good[:4],
            b"\x05\x03" + good[2:],
            b"\x01\x03" + good[2:],
            good[:2] + b"\xff\x00" + good[4:],
        ):
            with refused(errno.EINVAL):
                sock.setsockopt(SOL_TLS, direction, bad)
        sock.setsockopt(SOL_TLS, direction, good)


def test_einval_when_the_directions_differ() -> None:
    with loopback_pair() as (sock, theirs):
        attach(sock)
        sock.setsockopt(SOL_TLS, TLS_TX, crypto_info())
        for other in (TLS12, CipherSuite.TLS_AES_256_GCM_SHA384):
            with refused(errno.EINVAL):
                kernel_receiver(sock, other, made_up_keys(other, "peer"), 0)
        receiver = kernel_receiver(sock, TLS13, made_up_keys(TLS13, "peer"), 0)
        RecordPeer(theirs, TLS13).send_data(b"data")
        buffer = bytearray(9)
        assert receiver.recv_into(buffer) == 4


def test_wrong_keys_never_reach_the_kernel() -> None:
    keys = made_up_keys(CipherSuite.TLS_AES_256_GCM_SHA384, "us")
    with loopback_pair() as (sock, _), pytest.raises(ValueError, match="do not fit"):
        KernelSender(sock, TLS13, keys, can_change_key=True)


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(TLS12, id="TLS 1.2"),
        pytest.param(TLS13, id="TLS 1.3", marks=pytest.mark.norekey),
    ],
)
def test_ebusy_at_a_second_key(suite: CipherSuite) -> None:
    """The old key stays in force."""
    with sending(suite) as (sender, peer, _):
        with refused(errno.EBUSY):
            sender.install(made_up_keys(suite, "other"))
        sender.send(b"data")
        assert peer.read_data(4) == b"data"
    with receiving(suite) as (receiver, peer, _):
        with refused(errno.EBUSY):
            receiver.install(made_up_keys(suite, "other"))
        peer.send_data(b"data")
        assert receiver.recv_into(bytearray(9)) == 4


@pytest.mark.norekey
def test_ebusy_after_a_key_update_ends_the_connection_cleanly() -> None:
    with rig("kernel") as r:
        r.peer.send_raw(
            r.peer.seal_data(b"old") + r.peer.seal_key_update() + r.peer.seal_data(b"new")
        )
        assert r.read(3) == b"old"
        for _ in range(2):
            with pytest.raises(KeyLimitError, match="this kernel can't change"):
                r.read(1)
        assert r.peer.read_record() == InboundPlainMessage(ALERT, b"\x01\x00")


@pytest.mark.rekey
def test_einval_at_a_second_key_of_another_kind() -> None:
    """Another cipher, version or length is refused, and the old key stays in force."""
    with sending() as (sender, peer, sock):
        for other in (TLS12, CipherSuite.TLS_AES_256_GCM_SHA384):
            with refused(errno.EINVAL):
                sock.setsockopt(SOL_TLS, TLS_TX, crypto_info(other))
        sender.send(b"data")
        assert peer.read_data(4) == b"data"


def test_ebusy_at_getsockopt_before_keys() -> None:
    with loopback_pair() as (sock, _):
        attach(sock)
        for direction in (TLS_TX, TLS_RX):
            with refused(errno.EBUSY):
                sock.getsockopt(SOL_TLS, direction, CRYPTO_INFO[TLS13.aead].size)


@pytest.mark.rekey
def test_ebusy_at_max_payload_with_an_open_record() -> None:
    """No sender of ours leaves a record open."""
    with sending() as (sender, _, sock):
        sock.send(b"open", socket.MSG_MORE)
        with refused(errno.EBUSY):
            sock.setsockopt(SOL_TLS, TLS_TX_MAX_PAYLOAD_LEN, struct.pack("=H", 512))
        sender.send(b"closes it")
        sock.setsockopt(SOL_TLS, TLS_TX_MAX_PAYLOAD_LEN, struct.pack("=H", 512))
        with open(__file__, "rb") as file:
            sender.sendfile(file.fileno(), 0, 10)
        sock.setsockopt(SOL_TLS, TLS_TX_MAX_PAYLOAD_LEN, struct.pack("=H", 1024))


# --- receiving ----------------------------------------------------------------------------------------------------


@both_versions
def test_eio_at_a_control_record(suite: CipherSuite) -> None:
    with receiving(suite) as (receiver, peer, sock):
        peer.send_record(ALERT, WARNING)
        for _ in range(2):
            with refused(errno.EIO):
                sock.recv(10)
            with pytest.raises(ControlRecord):
                receiver.recv_into(bytearray(10))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert receiver.read_record() == InboundPlainMessage(ALERT, WARNING)


@both_versions
def test_einval_at_splice_of_a_control_record(suite: CipherSuite) -> None:
    with receiving(suite) as (receiver, peer, sock), pipe() as (reads, writes):
        peer.send_raw(peer.seal(ALERT, WARNING) + peer.seal_data(b"data"))
        with refused(errno.EINVAL):
            os.splice(sock.fileno(), writes, 100)
        with pytest.raises(ControlRecord):
            receiver.splice(writes, 100)
        assert receiver.read_record() == InboundPlainMessage(ALERT, WARNING)
        assert receiver.splice(writes, 100) == 4
        assert os.read(reads, 9) == b"data"


@pytest.mark.rekey
def test_ekeyexpired_after_a_key_update() -> None:
    with receiving() as (receiver, peer, sock):
        peer.send_raw(peer.seal_key_update() + peer.seal_data(b"new"))
        assert receiver.read_record() == InboundPlainMessage(HANDSHAKE, KEY_UPDATE)
        with refused(errno.EKEYEXPIRED), pipe() as (_, writes):
            os.splice(sock.fileno(), writes, 10)
        for flags in (0, socket.MSG_PEEK):
            with refused(errno.EKEYEXPIRED):
                sock.recv(10, flags)
        assert not readable(sock) & select.POLLIN
        receiver.install(made_up_keys(TLS13, "peer", 1))
        assert readable(sock) & select.POLLIN
        buffer = bytearray(9)
        assert receiver.recv_into(buffer) == 3


@pytest.mark.rekey
def test_ekeyexpired_when_somebody_else_read_the_key_update() -> None:
    """Another holder of the descriptor: we can't know the key, and say so for ever."""
    with receiving() as (receiver, peer, sock):
        peer.send_raw(peer.seal_key_update() + peer.seal_data(b"new"))
        sock.recvmsg(100, SPACE)
        for _ in range(2):
            with pytest.raises(RemoteProtocolError, match="another holder"):
                receiver.recv_into(bytearray(9))


@pytest.mark.rekey
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_ekeyexpired_key_update_split_over_two_records(cut: int) -> None:
    with rig("kernel") as r:
        records = r.peer.seal(HANDSHAKE, KEY_UPDATE[:cut]) + r.peer.seal(
            HANDSHAKE, KEY_UPDATE[cut:]
        )
        r.peer.next_tx_key()
        r.peer.send_raw(records + r.peer.seal_data(b"new"))
        assert r.read(3) == b"new"
        assert r.connection.rx_generation == 1


@pytest.mark.rekey
def test_ekeyexpired_half_a_key_update_leaves_poll_awake() -> None:
    """The kernel stops for the first half; whoever polls must still be told of the second."""
    with rig("kernel") as r:
        r.peer.send_record(HANDSHAKE, KEY_UPDATE[:1])
        assert wait_readable(r.sock)
        r.driver.settle()
        assert not wait_readable(r.sock, 0)
        rest = r.peer.seal(HANDSHAKE, KEY_UPDATE[1:])
        r.peer.next_tx_key()
        r.peer.send_raw(rest + r.peer.seal_data(b"new"))
        assert wait_readable(r.sock)
        assert r.look() == b"new"


@pytest.mark.rekey
def test_ekeyexpired_false_pause() -> None:
    """A continuation fragment that begins with the byte of a KeyUpdate."""
    with rig("kernel") as r:
        message = TICKET[:4] + b"\x18" + TICKET[5:]
        r.peer.send_raw(
            r.peer.seal(HANDSHAKE, message[:4])
            + r.peer.seal(HANDSHAKE, message[4:])
            + r.peer.seal_data(b"data")
        )
        assert r.read(4) == b"data"
        assert r.tickets == [message]
        assert r.connection.rx_generation == 0


@pytest.mark.rekey
def test_no_ekeyexpired_when_a_ticket_is_in_front() -> None:
    """NewSessionTicket and KeyUpdate in one record: the kernel does not stop, we change the key before the next read."""
    with rig("kernel") as r:
        record = r.peer.seal(HANDSHAKE, TICKET + KEY_UPDATE)
        r.peer.next_tx_key()
        r.peer.send_raw(record + r.peer.seal_data(b"new"))
        assert r.read(3) == b"new"
        assert r.tickets == [TICKET]


@both_versions
def test_eagain_at_recv(suite: CipherSuite) -> None:
    """Until a whole record is there; ``poll`` agrees."""
    with receiving(suite) as (receiver, peer, sock):
        record = peer.seal_data(pattern(5000))
        peer.send_raw(record[:-1])
        with pytest.raises(BlockingIOError):
            receiver.recv_into(bytearray(10), 0, NO_WAIT)
        assert not readable(sock) & select.POLLIN
        peer.send_raw(record[-1:])
        assert wait_readable(sock)
        assert receiver.recv_into(bytearray(9000), 0, NO_WAIT) == 5000


def test_eagain_at_splice() -> None:
    """The kernel heeds the flag of the call, not the mode of the descriptor: a socket with O_NONBLOCK would wait."""
    with receiving() as (receiver, peer, sock), pipe() as (reads, writes):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 2, 0))
        started = time.monotonic()
        with refused(errno.EAGAIN):
            receiver.splice(writes, 100)
        assert time.monotonic() - started < 1
        peer.send_data(b"data")
        assert wait_readable(sock)
        assert receiver.splice(writes, 100) == 4
        assert os.read(reads, 9) == b"data"


@both_versions
def test_eagain_at_send(suite: CipherSuite) -> None:
    """Nothing is taken, neither data nor control records, and ``poll`` shows no room."""
    with sending(suite, small=True) as (sender, _, sock):
        total = fill_up(lambda: sender.send(bytes(5 * MAX_FRAGMENT), NO_WAIT), sock)
        assert total % MAX_FRAGMENT == 0
        for _ in turns("the alert is refused"):
            number = sender.sequence_number()
            try:
                sender.send_record(ALERT, WARNING, NO_WAIT)
            except BlockingIOError:
                break
        assert sender.sequence_number() == number


@both_versions
def test_ebadmsg_at_recv(suite: CipherSuite) -> None:
    """A raw socket would fail its sends now; we clear SO_ERROR, and the alert gets through."""
    with receiving(suite) as (_, peer, sock):
        sock.setsockopt(SOL_TLS, TLS_TX, crypto_info(suite))
        peer.tx.sequence_number += 1
        peer.send_data(b"bad")
        for _ in range(2):
            with refused(errno.EBADMSG):
                sock.recv(10)
        with refused(errno.EBADMSG):
            sock.send(b"x")
    with rig("kernel", suite=suite) as r:
        r.peer.tx.sequence_number += 1
        r.peer.send_data(b"bad")
        with pytest.raises(RemoteProtocolError) as caught:
            r.read(1)
        assert caught.value.alert is AlertDescription.BAD_RECORD_MAC
        assert r.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        alert = build_alert(AlertDescription.BAD_RECORD_MAC)
        assert r.peer.read_record() == InboundPlainMessage(ALERT, alert)


@both_versions
def test_ebadmsg_at_send(suite: CipherSuite) -> None:
    """A record that is too short fails our sends before anybody has read it: they say why, and the alert gets through."""
    with rig("kernel", suite=suite) as r:
        r.peer.send_raw(b"\x17\x03\x03\x00\x05" + bytes(13))
        # POLLERR without POLLIN.
        eventually(lambda: readable(r.sock) & select.POLLERR != 0, "no error")
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as caught:
                r.driver.send(b"x")
            assert caught.value.alert is AlertDescription.BAD_RECORD_MAC
        with pytest.raises(RemoteProtocolError):
            r.read(1)
        alert = build_alert(AlertDescription.BAD_RECORD_MAC)
        assert r.peer.read_record() == InboundPlainMessage(ALERT, alert)
        with pytest.raises(RemoteProtocolError):
            r.driver.send(b"x")


@both_versions
@pytest.mark.parametrize(
    ("header", "number", "alert"),
    [
        pytest.param(
            b"\x17\x03\x03\xff\xff", errno.EMSGSIZE, AlertDescription.RECORD_OVERFLOW, id="emsgsize"
        ),
        pytest.param(
            b"\x17\x02\x03\x00\x40", errno.EINVAL, AlertDescription.PROTOCOL_VERSION, id="einval"
        ),
        pytest.param(
            b"GET / HTTP/1.1", errno.EINVAL, AlertDescription.PROTOCOL_VERSION, id="plain text"
        ),
    ],
)
def test_framing_error_is_reported_once(
    suite: CipherSuite, header: bytes, number: int, alert: AlertDescription
) -> None:
    with receiving(suite) as (_, peer, sock):
        peer.send_raw(header + bytes(8))
        with refused(number):
            sock.recv(10)
        with refused(errno.EAGAIN):
            sock.recv(10, NO_WAIT)
        peer.end()
        assert wait_readable(sock)
        assert sock.recv(10) == b""  # as if nothing had been
    with rig("kernel", suite=suite) as r:
        r.peer.send_raw(header + bytes(8))
        for _ in range(3):
            with pytest.raises(RemoteProtocolError) as caught:
                r.read(1)
            assert caught.value.alert is alert
        assert r.peer.read_record() == InboundPlainMessage(ALERT, build_alert(alert))


@pytest.mark.parametrize("how", ["settle", "splice"])
def test_framing_error_is_not_lost_behind_an_empty_record(how: str) -> None:
    """Looking whether a control record waits, or whether 0 is the end, hears the only report."""
    with rig("kernel") as r, pipe() as (_, writes):
        r.peer.send_raw(r.peer.seal(DATA, b"") + b"\x17\x03\x03\xff\xff" + bytes(8))
        eventually(lambda: readable(r.sock) != 0, "nothing came")
        if how == "settle":
            r.driver.settle()
            r.driver.settle()
        r.sock.setblocking(False)
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as caught:
                r.driver.splice(writes, 100)
            assert caught.value.alert is AlertDescription.RECORD_OVERFLOW


@both_versions
def test_econnreset_then_pretended_sends(suite: CipherSuite) -> None:
    with sending(suite) as (_, peer, sock):
        peer.reset()
        reset_noticed(sock)
        for _ in range(2):
            with refused(errno.ECONNRESET):
                sock.send(b"x")
        with refused(errno.ECONNRESET):
            sock.recv(1)
        assert sock.send(b"x") == 1  # into the void
    with sending(suite) as (sender, peer, sock):
        peer.reset()
        reset_noticed(sock)
        for _ in range(2):
            with refused(errno.ECONNRESET):
                sender.send(b"x")
        with refused(errno.ECONNRESET):
            sock.recv(1)
        for _ in range(2):
            with refused(errno.ECONNRESET):
                sender.send(b"x")


def test_epipe_then_pretended_sends() -> None:
    with sending() as (_, peer, sock):
        peer.sock.close()
        assert sock.send(b"x") == 1
        reset_noticed(sock)
        with pytest.raises(BrokenPipeError):
            sock.send(b"x")
        assert sock.send(b"x") == 1
    with sending() as (sender, peer, sock):
        peer.sock.close()
        assert sender.send(b"x") == 1
        reset_noticed(sock)
        for _ in range(4):
            with pytest.raises(BrokenPipeError):
                sender.send(b"x")


def test_econnreset_is_not_lost_to_settle() -> None:
    """It is reported once, to whoever asks; afterwards reads say end, and sends pretend."""
    with receiving() as (_, peer, sock):
        peer.reset()
        reset_noticed(sock)
        with refused(errno.ECONNRESET):
            sock.recv(10, socket.MSG_PEEK)
        assert sock.recv(10) == b""
    with rig("kernel") as r:
        r.peer.reset()
        reset_noticed(r.sock)
        r.driver.settle()
        for _ in range(2):
            with refused(errno.ECONNRESET):
                r.read(1)
            with refused(errno.ECONNRESET):
                r.driver.send(b"x")


def test_zero_bytes_from_recvmsg() -> None:
    """The end, or a control record without content: only the control message tells."""
    with receiving() as (receiver, peer, sock):
        peer.send_record(ALERT, b"")
        assert sock.recvmsg(10, SPACE, socket.MSG_PEEK)[:2][0] == b""
        with pytest.raises(ControlRecord):
            receiver.recv_into(bytearray(9))
        assert receiver.read_record() == InboundPlainMessage(ALERT, b"")
        peer.end()
        for _ in range(2):
            assert receiver.recv_into(bytearray(9)) == 0
            assert receiver.read_record() is None


def test_zero_bytes_from_splice() -> None:
    """The end, or a data record without content."""
    with receiving() as (receiver, peer, sock), pipe() as (reads, writes):
        peer.send_record(DATA, b"")
        assert wait_readable(sock)
        assert os.splice(sock.fileno(), writes, 10) == 0
        peer.send_raw(peer.seal(DATA, b"") + peer.seal(DATA, b"") + peer.seal_data(b"data"))
        assert receiver.splice(writes, 100) == 4
        assert os.read(reads, 9) == b"data"
        peer.send_record(DATA, b"")
        peer.end()
        assert receiver.splice(writes, 100) == 0


# --- sending ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [0x4000000, socket.MSG_OOB], ids=["zerocopy", "oob"])
def test_eopnotsupp_for_flags(flag: int) -> None:
    with sending() as (sender, peer, sock):
        with refused(errno.EOPNOTSUPP):
            sock.send(b"x", flag)
        sender.send(b"data")
        assert peer.read_data(4) == b"data"


def test_unsupported_flags_are_not_used() -> None:
    [package] = ktls.record.__path__
    used = {
        node.attr
        for path in Path(package).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith(("MSG_", "SPLICE_"))
    }
    assert used == {"MSG_DONTWAIT", "MSG_PEEK", "SPLICE_F_NONBLOCK"}


def test_einval_at_sendmsg() -> None:
    def record_type(level: int, kind: int, value: bytes) -> list[tuple[int, int, bytes]]:
        return [(level, kind, value)]

    alert = record_type(SOL_TLS, TLS_SET_RECORD_TYPE, b"\x15")
    with sending() as (sender, peer, sock):
        for control, flags in (
            (alert, socket.MSG_MORE),
            (record_type(SOL_TLS, 99, b"\x15"), 0),
            (record_type(SOL_TLS, TLS_SET_RECORD_TYPE, b""), 0),
        ):
            with refused(errno.EINVAL):
                sock.sendmsg([WARNING], control, flags)
        sender.send_record(ALERT, WARNING)
        assert peer.read_record() == InboundPlainMessage(ALERT, WARNING)


def test_einval_at_sendfile_of_a_pipe() -> None:
    """A bad file says nothing about the connection."""
    with rig("kernel") as r, pipe() as (reads, _):
        with pytest.raises(OSError) as caught:
            r.driver.sendfile(reads, 0, 10)
        assert caught.value.errno in (errno.EINVAL, errno.ESPIPE)
        r.driver.send(b"data")
        assert r.peer.read_data(4) == b"data"


# --- the rules that follow ----------------------------------------------------------------------------------------


@pytest.mark.rekey
def test_rule_3_key_update_that_poll_does_not_show() -> None:
    """A read with spare room decrypts the KeyUpdate behind the data, and ``poll`` falls silent. ``settle`` brings it out."""
    with rig("kernel") as r:
        first = r.peer.seal_data(b"data") + r.peer.seal_key_update(True)
        r.peer.send_raw(first + r.peer.seal_data(b"new"))
        assert wait_readable(r.sock)
        assert r.look() == b"data"
        assert not readable(r.sock) & select.POLLIN
        r.driver.settle()
        assert readable(r.sock) & select.POLLIN
        message = r.peer.read_message()
        assert message is not None
        assert is_key_update(message)
        assert r.look() == b"new"


@pytest.mark.rekey
def test_rule_4_python_timeouts_hide_a_key_update() -> None:
    with rig("kernel") as r:
        r.peer.send_raw(r.peer.seal_data(b"data") + r.peer.seal_key_update())
        assert wait_readable(r.sock)
        assert r.look() == b"data"
        r.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            r.sock.recvmsg(10, SPACE)
        r.sock.settimeout(None)
        r.peer.send_data(b"new")
        assert r.read(3) == b"new"


@pytest.mark.rekey
@pytest.mark.slow
def test_rule_7_key_set_in_the_middle_of_a_send() -> None:
    """What the driver's lock is for: without it the rest of a blocked send goes out under the new key, with no KeyUpdate in between."""
    from .rig import Worker

    with sending(small=True) as (sender, peer, _):
        size = 2**19
        worker = Worker(lambda: sender.send(pattern(size)))
        assert wait_readable(peer.sock)
        sender.install(made_up_keys(TLS13, "us", 1))
        with pytest.raises(RemoteProtocolError, match="can't be opened"):
            peer.read_data(size)
        peer.reset()
        with contextlib.suppress(OSError):
            worker.result()


@both_versions
def test_rule_8_keys_after_the_peers_fin(suite: CipherSuite) -> None:
    """The ULP has to be attached before; then both keys can be set, what came is read, and an answer can be sent."""
    with loopback_pair() as (sock, theirs):
        attach(sock)
        peer = RecordPeer(theirs, suite)
        peer.send_data(b"last words")
        peer.end()
        eventually(lambda: readable(sock) & select.POLLIN != 0, "nothing came")
        receiver = kernel_receiver(sock, suite, made_up_keys(suite, "peer"), 0)
        sender = kernel_sender(sock, suite, made_up_keys(suite, "us"), 0, MAX_FRAGMENT)
        assert receiver.recv_into(bytearray(20)) == 10
        assert receiver.recv_into(bytearray(20)) == 0
        sender.send(b"answer")
        assert peer.read_data(6) == b"answer"


def test_rule_9_open_record_is_lost() -> None:
    with sending() as (_, peer, sock):
        sock.send(b"open", socket.MSG_MORE)
        sock.shutdown(socket.SHUT_WR)
        assert peer.read_record() is None


def raw_close(sock: socket.socket) -> None:
    sock.close()


def raw_shutdown(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.slow
@pytest.mark.parametrize("end", [raw_close, raw_shutdown])
def test_rule_1_data_is_lost_without_a_flush(end: Callable[[socket.socket], None]) -> None:
    lost = 0
    for _ in range(30):
        with sending(small=True) as (sender, peer, sock):
            accepted = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted += sender.send(pattern(MAX_FRAGMENT), NO_WAIT)
            end(sock)
            messages, whole = peer.read_all()
            arrived = sum(len(message.fragment) for message in messages)
            lost += not whole or arrived < accepted
    assert lost
