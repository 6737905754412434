"""The rules that follow from what the kernel does, by their numbers: each with what happens to who breaks it."""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.kernel import attach
from ktls.testing import (
    RecordPeer,
    eventually,
    is_key_update,
    loopback_pair,
    made_up_keys,
    pattern,
    wait_readable,
)

from .layers import TLS12, TLS13, kernel_receiver, kernel_sender
from .rig import NO_WAIT, SPACE, Worker, both_versions, readable, rig, sending

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel


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


@pytest.mark.norekey
def test_key_that_was_set_and_nobody_knows_it() -> None:
    """A signal handler's exception may come when the call has done its work: then it is done again. Where keys can't change, another key is still refused."""
    suite, keys = TLS12, made_up_keys(TLS12, "peer")
    with loopback_pair() as (sock, theirs):
        kernel_receiver(sock, suite, keys, 0)
        with pytest.raises(OSError, match="busy"):
            kernel_receiver(sock, suite, made_up_keys(TLS12, "another"), 0)
        receiver = kernel_receiver(sock, suite, keys, 0)
        RecordPeer(theirs, suite).send_data(b"data")
        buffer = bytearray(9)
        assert receiver.recv_into(buffer) == 4
        assert buffer.startswith(b"data")


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
