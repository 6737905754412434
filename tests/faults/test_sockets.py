"""The same for the blocking front end: each call fails once, from the first byte of the handshake to ``close``; the peer is the ``ssl`` module."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls
from ktls.record.interface import DEAD_ERRNOS
from ktls.testing import eventually, pattern

from ..sockets.helpers import Net, descriptors, read_exactly
from ..support import HOST, has_kernel_tls
from .cancelling import Heard, Peer
from .seam import Call, Error, Fault, Seam, Short

if TYPE_CHECKING:
    from ktls.handshake.handoff import OffloadPolicy

    from ..support import Authority

WHOLE_PRODUCT: Final = os.environ.get("KTLS_TRUST") == "1"
#: These pass: whoever closes has to try again.
PASSING: Final = (errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.ENOBUFS)
FAULTS: Final[tuple[Fault, ...]] = (
    *map(Error, PASSING),
    *map(Error, (errno.EPIPE, errno.ECONNRESET, errno.EBADMSG, errno.EKEYEXPIRED)),
    *map(Error, (errno.ENOENT, errno.EPERM)),
    Short(1),
)
REPLY: Final = pattern(5000)
SENT: Final = 120_000


class Dialling(Net):
    """Connects to addresses, too."""

    def dial(self, address: tuple[str, int]) -> Any:
        return self.keep(socket.create_connection(address))


@dataclass
class Run:
    """What the application was told of one run, and what the peer has."""

    heard: Heard
    got: bytearray = field(default_factory=bytearray)
    #: The error of the first operation that failed, and whether that was ``close``.
    error: BaseException | None = None
    closing: bool = False
    calls: list[Call] = field(default_factory=list)
    hits: list[tuple[Call, Fault]] = field(default_factory=list)


def _exchange(tls: ktls.KTLSSocket, run: Run) -> None:
    tls.sendall(pattern(20_000))
    run.got += read_exactly(tls, len(REPLY))
    if tls.version() == "TLSv1.3" and tls.offload.tx == "userspace":
        tls.refresh_traffic_keys()
    with tempfile.TemporaryFile() as file:
        file.write(pattern(SENT))
        file.seek(0)
        tls.sendfile(file, 20_000)


def _without_waiting(tls: ktls.KTLSSocket, run: Run) -> None:
    """``close`` of a socket that may not wait is somebody else's work, if there is any."""
    _exchange(tls, run)
    tls.setblocking(False)


def _half_close(tls: ktls.KTLSSocket, run: Run) -> None:
    tls.sendall(pattern(SENT))
    tls.shutdown(1)
    run.got += read_exactly(tls, len(REPLY))


def _unwrap(tls: ktls.KTLSSocket, run: Run) -> None:
    run.got += read_exactly(tls, len(REPLY))
    tls.sendall(pattern(SENT))
    tls.unwrap().close()


TALKS: Final[dict[str, Callable[[ktls.KTLSSocket, Run], None]]] = {
    function.__name__.removeprefix("_"): function
    for function in (_exchange, _without_waiting, _half_close, _unwrap)
}


def run(
    net: Dialling, talk: str, server_side: bool, policy: OffloadPolicy, plan: dict[int, Fault]
) -> Run:
    """One connection, with the faults of ``plan``."""
    seam = Seam()
    seam.plan = plan
    peer = Peer(net, "client", reply=REPLY) if server_side else Peer(net, "server", reply=REPLY)
    peer.go.set()
    done = Run(peer.heard)
    sock = peer.sock if server_side else net.dial(peer.address)
    sock.settimeout(10)
    settings = ktls.Settings(offload=policy, shutdown_timeout=2)
    tls: ktls.KTLSSocket | None = None
    with seam.opened():
        seam.watch(sock.fileno())
        try:
            tls = ktls.wrap_socket(
                sock,
                net.context("ktls", "server" if server_side else "client"),
                server_side=server_side,
                server_hostname=None if server_side else HOST,
                settings=settings,
            )
            TALKS[talk](tls, done)
        except OSError as error:
            done.error = error
        try:
            if tls is not None:
                tls.close()
        except OSError as error:
            done.closing = done.error is None
            done.error = done.error or error
        sock.close()  # if it is still ours
        peer.result()
    done.calls, done.hits = seam.calls, seam.hits
    return done


def verify(done: Run) -> None:
    """The invariants."""
    heard, error = done.heard, done.error
    call, fault = done.hits[0]
    assert done.got == REPLY[: len(done.got)]
    assert heard.data == pattern(len(heard.data)), "the peer has other data"
    if error is None:
        # ``close`` may find nobody who wants the rest, or what a reader has left.
        if not isinstance(fault, Error) or fault.number not in {*DEAD_ERRNOS, errno.EBADMSG}:
            assert len(heard.data) == SENT, f"{len(heard.data)} of {SENT} bytes came"
            assert heard.end == "close_notify"
        assert done.got == REPLY
        return
    assert isinstance(fault, Error), f"{error!r} of something that was only short"
    # close_notify goes out while the kernel has the time: EAGAIN is its end.
    waits = call.name.startswith(("send", "recv")) and call.name != "sendmsg(record)"
    if done.closing:
        # EAGAIN means that the time is over, and at ``shutdown`` all has been said.
        again = fault.number in PASSING[1:] and call.name != "shutdown"
        assert not again, "close has to try again"
    else:
        assert not (waits and fault.number == errno.EAGAIN), "who has a timeout waits"


@pytest.fixture
def net(authority: Authority) -> Iterator[Dialling]:
    net = Dialling(authority)
    yield net
    net.close()


def _policies() -> list[OffloadPolicy]:
    return ["auto"] if has_kernel_tls() else ["userspace"]


def _plan(calls: list[Call], salt: str) -> Iterator[tuple[int, Fault]]:
    start = zlib.crc32(salt.encode())
    for position, call in enumerate(calls):
        moves = not call.name.startswith(("getsockopt", "setsockopt", "ioctl", "shutdown"))
        faults = (
            FAULTS
            if moves and call.name not in ("recvmsg", "fstat", "sendmsg(record)")
            else FAULTS[:-1]
        )
        if not WHOLE_PRODUCT:
            if (start + position) % 3:  # each of the three talks begins elsewhere
                continue
            faults = (faults[(start + 5 * position) % len(faults)],)
        for fault in faults:
            yield position, fault


@pytest.mark.timeout(600 if WHOLE_PRODUCT else 60)
@pytest.mark.parametrize("policy", _policies())
@pytest.mark.parametrize("server_side", [False, True], ids=["client", "server"])
@pytest.mark.parametrize("talk", TALKS)
def test_each_call_fails_once(
    net: Dialling, talk: str, server_side: bool, policy: OffloadPolicy
) -> None:
    clean = run(net, talk, server_side, policy, {})
    assert clean.error is None
    assert (len(clean.heard.data), clean.heard.end) == (SENT, "close_notify")
    hits = 0
    for position, fault in _plan(clean.calls, f"{talk} {server_side}"):
        before = descriptors()
        try:
            done = run(net, talk, server_side, policy, {position: fault})
            if done.hits:
                hits += 1
                verify(done)
            done.error = None
        except BaseException as error:
            error.add_note(f"{fault} instead of call {position}, {clean.calls[position]}")
            raise
        with contextlib.suppress(UnboundLocalError):
            del done
        eventually(lambda before=before: _left(net, before) == set(), "no descriptor is left")  # type: ignore[misc]  # mypy does not infer a lambda with a default
    assert hits >= len(clean.calls) / (2 if WHOLE_PRODUCT else 6)


def _left(net: Dialling, before: set[str]) -> set[str]:
    """Descriptors that were not there before, but for the test's own."""
    if not descriptors() <= before:
        gc.collect()  # errors hold frames
    own = {str(sock.fileno()) for sock in net.sockets if sock.fileno() >= 0}
    return descriptors() - before - own
