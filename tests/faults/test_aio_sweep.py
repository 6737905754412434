"""The same for the asyncio front end: each of its system calls fails once, from the first of the handshake to the last of the close; the peer is the ``ssl`` module.

The loop's exception handler hears nothing, ``connection_lost`` is called once, with the error that was met or because all is said, and no descriptor is left.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import tempfile
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls
from ktls.record.interface import DEAD_ERRNOS
from ktls.testing import eventually, pattern

from ..aio.helpers import Diary, Echo, Keeper, Loop, turns, until
from ..sockets.helpers import Net, descriptors
from ..support import HOST, has_kernel_tls
from .cancelling import Heard, Peer
from .seam import Call, Error, Fault, Seam, Short

if TYPE_CHECKING:
    from ktls.handshake.handoff import OffloadPolicy

    from ..support import Authority

WHOLE_PRODUCT: Final = os.environ.get("KTLS_TRUST") == "1"
#: "Not now": as if nothing had happened.
AGAIN: Final = (errno.EAGAIN, errno.EINTR)
FAULTS: Final[tuple[Fault, ...]] = (
    *map(Error, AGAIN),
    *map(Error, (errno.ENOMEM, errno.ENOBUFS, errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT)),
    *map(Error, (errno.EBADMSG, errno.EKEYEXPIRED, errno.EINVAL, errno.ENOENT, errno.EPERM)),
    Short(1),
)
#: Calls that move bytes, of which they may move a part.
MOVING: Final = ("send", "sendmsg", "sendfile", "recv", "recv_into")
REPLY: Final = pattern(5000)
SENT: Final = 200_000


@dataclass
class Run:
    """What the application was told of one run, and what the peer has."""

    heard: Heard
    diary: Diary
    #: Of opening the connection, or of the talk.
    error: BaseException | None = None
    calls: list[Call] = field(default_factory=list)
    hits: list[tuple[Call, Fault]] = field(default_factory=list)


Talk = Callable[[Any, Keeper], Awaitable[None]]


async def _replied(keeper: Keeper) -> None:
    """Wait for the reply, or for the end."""
    await until(lambda: len(keeper.diary.data) >= len(REPLY) or keeper.diary.lost)


async def _exchange(transport: Any, keeper: Keeper) -> None:
    """Small and large pieces, more than TCP takes; a key change; a file amid writes."""
    transport.write(pattern(1000))
    transport.write(bytearray(pattern(59_000, 1000)))
    await _replied(keeper)
    info: ktls.aio.KTLSObject = transport.get_extra_info("ktls")
    if (
        info.version() == "TLSv1.3"
        and info.offload.tx == "userspace"
        and not transport.is_closing()
    ):
        info.refresh_traffic_keys()
    transport.writelines([pattern(10, 60_000), pattern(39_990, 60_010)])
    if transport.is_closing():
        return
    with tempfile.TemporaryFile() as file:
        file.write(pattern(99_000, 100_000))
        file.flush()
        await ktls.aio.sendfile(transport, file)
    transport.write(pattern(1000, 199_000))
    transport.close()


async def _half_close(transport: Any, keeper: Keeper) -> None:
    transport.write(pattern(SENT))
    if not transport.is_closing():
        transport.write_eof()
    await _replied(keeper)
    transport.close()


async def _close_at_once(transport: Any, keeper: Keeper) -> None:
    """What TCP has no room for goes out while the connection closes."""
    await _replied(keeper)
    transport.write(pattern(SENT))
    transport.close()


TALKS: Final[dict[str, Talk]] = {
    function.__name__.removeprefix("_"): function
    for function in (_exchange, _half_close, _close_at_once)
}


async def _connect(
    net: Net, sock: socket.socket, server_side: bool, keeper: Keeper, settings: ktls.Settings
) -> Any:
    context = net.context("ktls", "server" if server_side else "client")
    if server_side:
        transport, _ = await ktls.aio.connect_accepted_socket(
            lambda: keeper, sock, ssl=context, settings=settings
        )
    else:
        transport, _ = await ktls.aio.create_connection(
            lambda: keeper, sock=sock, ssl=context, server_hostname=HOST, settings=settings
        )
    return transport


def run(
    net: Net,
    loop: Loop,
    talk: str,
    server_side: bool,
    policy: OffloadPolicy,
    plan: dict[int, Fault],
) -> Run:
    """One connection, with the faults of ``plan``."""
    seam = Seam()
    seam.plan = plan
    peer = Peer(net, "client" if server_side else "server", reply=REPLY)
    peer.go.set()
    keeper = Keeper()
    done = Run(peer.heard, keeper.diary)
    sock = peer.sock if server_side else net.keep(socket.create_connection(peer.address))
    settings = ktls.Settings(offload=policy, shutdown_timeout=5)

    async def main() -> None:
        try:
            transport = await _connect(net, sock, server_side, keeper, settings)
            await TALKS[talk](transport, keeper)
        except OSError as error:
            done.error = error
            error.__traceback__ = None
            if keeper.transport is not None:
                keeper.transport.close()
        if keeper.transport is not None:
            await until(lambda: keeper.diary.lost)
        keeper.transport = None
        gc.collect(1)  # futures whose errors nobody has asked for say so now

    with seam.opened():
        seam.watch(sock.fileno())
        loop.run(main)
    sock.close()  # if it is still ours
    peer.result()
    done.calls, done.hits = seam.calls, seam.hits
    return done


def verify(done: Run) -> None:
    """The invariants."""
    heard, diary = done.heard, done.diary
    call, fault = done.hits[0]
    assert diary.data == REPLY[: len(diary.data)], "the application has other data"
    assert heard.data == pattern(len(heard.data)), "the peer has other data"
    made = "made" in diary.events
    assert diary.events.count("lost") == made
    number = fault.number if isinstance(fault, Error) else None
    met = done.error or diary.error
    if met is None:
        # In order. Who closes finds that nobody is there, maybe, or what a reader would have found.
        if number not in {*DEAD_ERRNOS, errno.EBADMSG, errno.EKEYEXPIRED, errno.EINVAL}:
            assert (len(heard.data), heard.end) == (SENT, "close_notify")
            assert diary.data == REPLY
        return
    assert number is not None, f"{met!r} of something that was only short"
    moves = call.name in MOVING or call.name.startswith(("recv", "send"))
    assert not (moves and number in AGAIN), f"{met!r} of something that passes"
    if made and diary.error is not None:
        assert isinstance(diary.error, OSError)
        own = diary.error.errno == number
        assert own or isinstance(diary.error, ktls.KTLSError), f"{diary.error!r} of {fault}"
    if number in DEAD_ERRNOS:
        assert isinstance(met, ConnectionError | TimeoutError), f"{met!r} of {fault}"


@pytest.fixture
def net(authority: Authority) -> Iterator[Net]:
    net = Net(authority)
    yield net
    net.close()


def _policies() -> list[OffloadPolicy]:
    if not has_kernel_tls():
        return ["userspace"]
    return ["auto", "userspace"] if WHOLE_PRODUCT else ["auto"]


def _plan(calls: list[Call], salt: str) -> Iterator[tuple[int, Fault]]:
    start = zlib.crc32(salt.encode())
    for position, call in enumerate(calls):
        faults = FAULTS if call.name in MOVING else FAULTS[:-1]
        if not WHOLE_PRODUCT:
            if (start + position) % 3:  # each talk begins elsewhere
                continue
            faults = (faults[(start + 5 * position) % len(faults)],)
        for fault in faults:
            yield position, fault


@pytest.mark.timeout(900 if WHOLE_PRODUCT else 60)
@pytest.mark.parametrize("policy", _policies())
@pytest.mark.parametrize(
    ("server_side", "loop"),
    [(False, "functions"), (True, "uvloop-functions")]
    + ([(True, "functions"), (False, "uvloop-functions")] if WHOLE_PRODUCT else []),
)
@pytest.mark.parametrize("talk", TALKS)
def test_each_call_fails_once(
    net: Net, talk: str, server_side: bool, loop: str, policy: OffloadPolicy
) -> None:
    def once(plan: dict[int, Fault]) -> Run:
        return run(net, Loop(loop), talk, server_side, policy, plan)

    clean = once({})
    assert (clean.error, clean.diary.error) == (None, None)
    assert (len(clean.heard.data), clean.heard.end) == (SENT, "close_notify")
    assert clean.diary.data == REPLY
    hits, plan = 0, list(_plan(clean.calls, f"{talk} {server_side}"))
    for position, fault in plan:
        before = descriptors()
        try:
            done = once({position: fault})
            if done.hits:
                hits += 1
                verify(done)
            del done
            eventually(lambda before=before: _left(net, before) == set(), "no descriptor is left")  # type: ignore[misc]  # mypy does not infer a lambda with a default
        except BaseException as error:
            error.add_note(f"{fault} instead of call {position}, {clean.calls[position]}")
            raise
    assert hits >= len(plan) / 2  # how often there is no room is TCP's business


def _left(net: Net, before: set[str]) -> set[str]:
    """Descriptors that were not there before, but for the test's own."""
    if not descriptors() <= before:
        gc.collect()  # errors hold frames
    own = {str(sock.fileno()) for sock in net.sockets if sock.fileno() >= 0}
    return descriptors() - before - own


#: Until the connection is there; what comes then is above.
ACCEPTING: Final = ("accept", "getsockname", "getpeername", "setblocking")


def serve(net: Net, plan: dict[int, Fault]) -> tuple[Seam, list[dict[str, Any]], str]:
    """A server and a client that says hello; return the calls, what the loop heard, and what the client got."""
    seam = Seam()
    seam.plan = plan
    seam.only = ACCEPTING  # how often a handshake looks in vain depends on the time
    loop = Loop("functions")
    context: Any = net.context("stdlib", "client")

    def client(address: tuple[str, int]) -> str:
        with socket.create_connection(address) as sock:
            sock.settimeout(10)
            try:
                with context.wrap_socket(sock, server_hostname=HOST) as tls:
                    tls.sendall(b"hello")
                    return bytes(tls.recv(5)).decode()
            except OSError as error:
                return type(error).__name__

    async def main() -> str:
        server: Any = await ktls.aio.create_server(
            Echo, "127.0.0.1", 0, ssl=net.context("ktls", "server")
        )
        seam.calls.clear()
        seam.everywhere = True
        got = await asyncio.to_thread(client, server.sockets[0].getsockname())
        seam.everywhere = False
        server.close()
        server.abort_clients()
        await turns(5)
        gc.collect(1)
        problems, loop.problems[:] = list(loop.problems), []
        heard.extend(problems)
        return got

    heard: list[dict[str, Any]] = []
    with seam.opened():
        got = loop.run(main)
    return seam, heard, got


@pytest.mark.parametrize(
    "number", [errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EMFILE, errno.ENOBUFS]
)
def test_accepting(net: Net, number: int) -> None:
    """Whoever connects is served, or cut off at once; and nothing is left of it."""
    clean, heard, got = serve(net, {})
    assert (heard, got) == ([], "hello")
    assert {call.name for call in clean.calls} >= {"accept", "getsockname"}
    for position in range(len(clean.calls)):
        before = descriptors()
        spoilt, heard, got = serve(net, {position: Error(number)})
        (call, _), *_ = spoilt.hits
        out_of_resources = call.name == "accept" and number in (errno.EMFILE, errno.ENOBUFS)
        assert bool(heard) is out_of_resources, heard  # as asyncio's own server says it
        if call.name != "setblocking":
            assert got == "hello", call
        del heard
        eventually(lambda before=before: _left(net, before) == set(), "no descriptor is left")  # type: ignore[misc]  # mypy does not infer a lambda with a default
