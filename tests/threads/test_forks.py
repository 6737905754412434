"""Forks at bad moments: the child shakes hands on its own, the parent goes on undisturbed, and no secrets are mixed up."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import socketserver
import ssl
import threading
import traceback
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls

from ..sockets.helpers import Case, Net
from ..support import HOST, TlsStat, has_kernel_tls, has_rekey
from .crew import FRAME, PATIENCE, Crew, frame
from .test_threads import LONG

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..support import Authority

CASES: Final = [
    Case(peer="ktls"),
    *([Case(peer="ktls", offload="userspace")] if has_kernel_tls() else []),
]
HANDSHAKES: Final = 400 if LONG else 24
#: In the lab a fork takes a second or two.
FORKS: Final = (20 if has_kernel_tls() else 100) if LONG else 4


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child of ours, which ends with status 0 if it did; return its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(int(PATIENCE))  # a child that hangs ends, and not with 0
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def reap(*pids: int) -> None:
    """Wait for children that have to have succeeded."""
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def echo(server: Any, sock: socket.socket) -> None:
    with sock, server.wrap_socket(sock, server_side=True) as tls:
        tls.sendall(tls.recv(FRAME))


def exchange(client: Any, address: Any, number: int) -> None:
    """Shake hands and get a frame back; everything has to be where this kernel can have it."""
    sock = socket.create_connection(address, PATIENCE)
    with client.wrap_socket(sock, server_hostname=HOST, suppress_ragged_eofs=False) as tls:
        assert tls.offload.tx == ("kernel" if has_kernel_tls() else "userspace"), tls.offload
        assert tls.offload.rx == ("kernel" if has_rekey() else "userspace"), tls.offload
        tls.sendall(frame(number, 0))
        assert tls.recv(FRAME) == frame(number, 0)
        assert tls.recv(1) == b""  # close_notify, not a cut


def test_contexts_made_before_the_fork(net: Net, tls_stat: TlsStat) -> None:
    """As servers with several processes do it: every child has a key log of its own, so all handshakes give up their secrets."""
    client, server = net.context("ktls", "client"), net.context("ktls", "server")
    listener = net.keep(socket.create_server(("127.0.0.1", 0), backlog=64))
    workers, share = 4, HANDSHAKES // 4

    def serve() -> None:
        for _ in range(share):
            sock, _ = listener.accept()
            sock.settimeout(PATIENCE)
            echo(server, sock)

    def ask() -> None:
        for number in range(share):
            exchange(client, listener.getsockname(), number)

    servers = [fork(serve) for _ in range(workers)]
    clients = [fork(ask) for _ in range(workers)]
    reap(*clients, *servers)
    assert tls_stat["TlsDecryptError"] == 0


def test_fork_while_others_shake_hands(net: Net) -> None:
    """Locks of the ``ssl`` module and of ours are free in the child, whatever the parent's threads are at."""
    client, server = net.context("ktls", "client"), net.context("ktls", "server")
    listener = net.keep(socket.create_server(("127.0.0.1", 0), backlog=64))
    stop = threading.Event()
    crew = Crew()

    def serve() -> None:
        while not stop.is_set():
            if select.select([listener], [], [], 0.05)[0]:
                sock, _ = listener.accept()
                sock.settimeout(PATIENCE)
                echo(server, sock)

    def ask() -> None:
        while not stop.is_set():
            exchange(client, listener.getsockname(), 1)

    def child() -> None:
        ours, theirs = net.tcp()
        theirs.settimeout(PATIENCE)
        peer = threading.Thread(target=echo, args=(server, theirs))
        peer.start()
        with client.wrap_socket(ours, server_hostname=HOST) as tls:
            assert tls.offload.tx == ("kernel" if has_kernel_tls() else "userspace"), tls.offload
            tls.sendall(frame(2, 0))
            assert tls.recv(FRAME) == frame(2, 0)
        peer.join()

    for _ in range(2):
        crew.spawn(serve)
    for _ in range(2):
        crew.spawn(ask)
    for _ in range(FORKS):
        reap(fork(child))
    stop.set()
    crew.finish()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parent_is_not_disturbed(net: Net, case: Case) -> None:
    """Whatever the child does with its copy of a connection, short of using it: drop it, or close it. Its parent's threads were sending and changing keys."""
    link = net.link(case, timeout=PATIENCE)
    crew, stop, sent = Crew(), threading.Event(), [0]

    def write() -> None:
        while not stop.wait(0.001):
            link.ours.sendall(frame(1, sent[0]))
            sent[0] += 1

    def refresh() -> None:
        # Not faster: forks take seconds in the lab, and there is a limit to messages that bring no data.
        while case.may_refresh and not stop.wait(0.05):
            link.ours.refresh_traffic_keys()

    def close() -> None:
        link.ours.close()
        gc.collect()

    def forget() -> None:
        net.sockets.clear()
        del link.ours
        gc.collect()

    def read() -> None:
        received = bytearray()
        while data := link.theirs.recv(65536):
            received += data
        frames = [received[at : at + FRAME] for at in range(0, len(received), FRAME)]
        assert len(frames) == sent[0]
        assert all(bytes(data) == frame(1, number) for number, data in enumerate(frames))

    crew.spawn(read)
    crew.spawn(write)
    crew.spawn(refresh)
    for work in (close, forget) * (FORKS // 4):
        reap(fork(work))
    stop.set()
    for thread in crew.threads[1:]:
        thread.join(PATIENCE)
    link.ours.close()
    crew.finish()


def test_child_has_no_secrets_of_its_parent(net: Net) -> None:
    """And the other way round: what the child's handshakes log is not in the parent's file."""
    context: ktls.SSLContext = net.context("ktls", "client")
    path = ssl.SSLContext.keylog_filename.__get__(context)  # type: ignore[attr-defined]  # typeshed has no descriptor here
    identity = os.stat(path).st_ino

    def child() -> None:
        mine = ssl.SSLContext.keylog_filename.__get__(context)  # type: ignore[attr-defined]  # typeshed has no descriptor here
        assert os.stat(mine).st_ino != identity
        names = [_inode(fd) for fd in os.listdir("/proc/self/fd")]
        # The ``ssl`` module held the parent's file open, and let go of it.
        assert identity not in names

    reap(fork(child))
    assert os.stat(path).st_ino == identity


def _inode(fd: str) -> int:
    try:
        return os.stat(f"/proc/self/fd/{fd}").st_ino
    except FileNotFoundError:
        return 0


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(self.request.recv(FRAME))


class ForkingServer(socketserver.ForkingMixIn, socketserver.TCPServer):
    """Gives each connection to a child, which shakes hands: so the connection is the child's."""

    context: ktls.SSLContext

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        sock.settimeout(PATIENCE)
        return self.context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False
        ), address


def test_forking_server(net: Net, authority: Authority) -> None:
    with ForkingServer(("127.0.0.1", 0), Echo) as server:
        server.context = net.context("ktls", "server")
        server.timeout = PATIENCE
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            client = net.context("ktls", "client")
            for number in range(5):
                exchange(client, server.socket.getsockname(), number)
        finally:
            server.shutdown()
            thread.join()
