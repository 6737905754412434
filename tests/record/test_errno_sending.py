"""What Linux says to who sends, row by row, and that our layers make the right thing of it; see ``test_errno_setup``."""

from __future__ import annotations

import ast
import errno
import select
import socket
from pathlib import Path

import pytest

import ktls.record
from ktls.protocol.enums import AlertDescription
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.messages import build_alert
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.linux import SOL_TLS, TLS_SET_RECORD_TYPE
from ktls.testing import eventually, fill_up, turns
from ktls.testing.bench import reset_noticed

from .rig import ALERT, NO_WAIT, WARNING, both_versions, pipe, readable, refused, rig, sending

pytestmark = pytest.mark.kernel


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
