"""What Linux says when kernel TLS is set up, row by row, and that our layers make the right thing of it.

Each test shows what the kernel itself does, with a raw socket, and then what the layer or the driver over it does. If a newer kernel behaves otherwise, the first half says so.
"""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from ktls.protocol.errors import KeyLimitError
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.kernel import KernelReceiver, KernelSender, attach
from ktls.record.linux import CRYPTO_INFO, SOL_TLS, TCP_ULP, TLS_RX, TLS_TX, TLS_TX_MAX_PAYLOAD_LEN
from ktls.testing import RecordPeer, loopback_pair, made_up_keys, wait_readable

from .layers import TLS12, TLS13, kernel_receiver, kernel_sender
from .rig import ALERT, crypto_info, receiving, refused, rig, sending

pytestmark = pytest.mark.kernel


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
