"""Event loops, protocols that keep a diary, and connections: with real handshakes, or without any and a peer that is scripted record by record."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import uvloop

import ktls
from ktls.aio import KTLSTransport
from ktls.aio.reading import shared_by
from ktls.aio.terms import Terms
from ktls.established import Established
from ktls.handshake.handoff import hand_off, prepare
from ktls.handshake.result import HandshakeResult, HandshakeSecrets, PeerInfo
from ktls.protocol.enums import ContentType, ProtocolVersion, Role
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.testing import RecordPeer, made_up_keys, made_up_secret

from ..sockets.helpers import PATIENCE, Case, Net
from ..support import HOST, TLS12, has_rekey

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Awaitable, Callable, Iterable
    from concurrent.futures import Future

_T = TypeVar("_T")

#: ``functions``: ``ktls.aio.create_connection(...)`` and so on. The others: ``loop.create_connection(..., ssl=...)`` of the loops that ``ktls.aio`` makes.
LOOPS: Final = ("functions", "uvloop-functions", "asyncio", "uvloop")
_FACTORIES: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "functions": asyncio.new_event_loop,
    "uvloop-functions": uvloop.new_event_loop,
    "asyncio": ktls.aio.new_event_loop,
    "uvloop": ktls.aio.new_uvloop_event_loop,
}
TLS13_SUITE: Final = CipherSuite.TLS_AES_128_GCM_SHA256
TLS12_SUITE: Final = CipherSuite.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256


class Loop:
    """An event loop for one test, and how it is asked for kernel TLS.

    ``problems`` are the calls of the loop's exception handler. A test that expects some takes them out; those that are left fail it, as do tasks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[dict[str, Any]] = []

    def run(self, main: Callable[[], Awaitable[_T]], patience: float = PATIENCE) -> _T:
        """Run ``main`` to its end, which must come within ``patience`` seconds."""

        async def bounded() -> _T:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: self.problems.append(context))
            async with asyncio.timeout(patience):
                result = await main()
            await turns(3)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            assert not tasks
            return result

        with asyncio.Runner(loop_factory=_FACTORIES[self.name]) as runner:
            result = runner.run(bounded())
        assert not self.problems, self.problems
        return result

    @property
    def is_uvloop(self) -> bool:
        """Whether it is uvloop's."""
        return self.name.startswith("uvloop")

    def _function(self, name: str) -> Any:
        if self.name.endswith("functions"):
            return getattr(ktls.aio, name)
        return getattr(asyncio.get_running_loop(), name)

    async def create_connection(self, *args: Any, **options: Any) -> Any:
        return await self._function("create_connection")(*args, **options)

    async def create_server(self, *args: Any, **options: Any) -> Any:
        return await self._function("create_server")(*args, **options)

    async def start_tls(self, *args: Any, **options: Any) -> Any:
        return await self._function("start_tls")(*args, **options)

    async def connect_accepted_socket(self, *args: Any, **options: Any) -> Any:
        return await self._function("connect_accepted_socket")(*args, **options)

    async def sendfile(self, *args: Any, **options: Any) -> int:
        sent: int = await self._function("sendfile")(*args, **options)
        return sent


async def until(condition: Callable[[], bool]) -> None:
    """Wait for ``condition``; the test's own deadline ends it."""
    while not condition():
        await asyncio.sleep(0.001)


async def turns(count: int = 10) -> None:
    """Let the loop look for events ``count`` times. What is going to happen without anybody's doing has happened then."""
    for _ in range(count):
        await asyncio.sleep(0)


async def result(future: Future[_T]) -> _T:
    """Wait for a thread."""
    return await asyncio.wrap_future(future)


@dataclass
class Diary:
    """What a protocol was told, in order; runs of data are one entry."""

    events: list[str] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    error: BaseException | None = None
    #: How often data came.
    deliveries: int = 0

    def note(self, event: str) -> None:
        if event != "data" or self.events[-1:] != ["data"]:
            self.events.append(event)
        self.deliveries += event == "data"

    @property
    def lost(self) -> bool:
        """Whether ``connection_lost`` was called."""
        return "lost" in self.events


class _Keeper(asyncio.BaseProtocol):
    """Keeps a diary. ``on_made`` and ``on_data`` are called with the transport; ``keep_open`` is what ``eof_received`` returns."""

    def __init__(
        self,
        *,
        on_made: Callable[[Any], object] | None = None,
        on_data: Callable[[Any], object] | None = None,
        keep_open: bool = False,
    ) -> None:
        self.diary = Diary()
        self.transport: Any = None
        self._on_made = on_made
        self._on_data = on_data
        self._keep_open = keep_open

    def connection_made(self, transport: Any) -> None:
        self.diary.note("made")
        self.transport = transport
        if self._on_made is not None:
            self._on_made(transport)

    def pause_writing(self) -> None:
        self.diary.note("pause")

    def resume_writing(self) -> None:
        self.diary.note("resume")

    def eof_received(self) -> bool:
        self.diary.note("eof")
        return self._keep_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.diary.error = exc
        self.diary.note("lost")

    def take(self, data: Any) -> None:
        self.diary.note("data")
        self.diary.data += data
        if self._on_data is not None:
            self._on_data(self.transport)


class Keeper(_Keeper, asyncio.Protocol):
    """A ``Protocol`` with a diary."""

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.take(data)


class BufferedKeeper(_Keeper, asyncio.BufferedProtocol):
    """A ``BufferedProtocol`` with a diary and a buffer of ``size`` bytes."""

    def __init__(self, size: int = 4096, **options: Any) -> None:
        super().__init__(**options)
        self.buffer = bytearray(size)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.take(self.buffer[:nbytes])


class Echo(Keeper):
    """Sends back what comes, and keeps nothing but its diary."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


@dataclass
class Scripted:
    """A connection that never saw a handshake: our transport, and a peer that says what it is told."""

    transport: KTLSTransport
    protocol: Any
    peer: RecordPeer

    @property
    def diary(self) -> Diary:
        diary: Diary = self.protocol.diary
        return diary

    async def hear(self, count: int = 1) -> list[tuple[int, bytes]]:
        """Wait for ``count`` records from our side, and follow the keys; return their types and contents."""
        records: list[tuple[int, bytes]] = []
        while len(records) < count:
            self.peer.pull()
            record = self._next()
            if record is None:
                await asyncio.sleep(0.001)
            else:
                records.append(record)
        return records

    async def hear_all(self) -> list[tuple[int, bytes]]:
        """Read to the end of the TCP stream, which must be that of a record."""
        records: list[tuple[int, bytes]] = []
        alive = True
        while alive:
            try:
                alive = self.peer.pull()
            except ConnectionResetError:
                alive = False
            while (record := self._next()) is not None:
                records.append(record)
            if alive:
                await asyncio.sleep(0.001)
        assert not self.peer._buffer, "TCP ended inside a record"
        return records

    async def hear_data(self) -> bytes:
        """Read to the end of the TCP stream, which must come after close_notify; return the data."""
        records = await self.hear_all()
        assert records
        assert records[-1] == (21, CLOSE_NOTIFY)
        return b"".join(content for kind, content in records if kind == 23)

    def _next(self) -> tuple[int, bytes] | None:
        message = self.peer.next_record()
        if message is None:
            return None
        if message.content_type == 22:
            self.peer.next_rx_key()
        return int(message.content_type), message.fragment


CLOSE_NOTIFY: Final = b"\x01\x00"
KEY_UPDATE: Final = bytes.fromhex("18000001 00")
KEY_UPDATE_REQUEST: Final = bytes.fromhex("18000001 01")
#: lifetime, age_add, a nonce of one byte, a ticket of four, no extensions.
TICKET: Final = bytes.fromhex("04 000012 00001c20 01020304 01 07 0004 74657374 0000")


def scripted(
    net: Net,
    protocol: Any = None,
    *,
    role: Role = Role.SERVER,
    suite: CipherSuite = TLS13_SUITE,
    offload: Literal["auto", "userspace"] = "auto",
    buffers: int | None = None,
    shutdown_timeout: float = PATIENCE,
    suppress_ragged_eofs: bool = True,
    **settings: Any,
) -> Scripted:
    """Make a transport as the handshake would, with made-up keys; the layers are those that a real one would get here."""
    loop = asyncio.get_running_loop()
    protocol = Keeper() if protocol is None else protocol
    sock, theirs = net.tcp(buffers=buffers)
    terms = Terms(
        context=net.context("ktls", "server"),
        settings=ktls.Settings(offload=offload, **settings),
        server_side=role is Role.SERVER,
        shutdown_timeout=shutdown_timeout,
        suppress_ragged_eofs=suppress_ragged_eofs,
    )
    is_tls13 = suite.version is ProtocolVersion.TLSv1_3
    make = made_up_secret if is_tls13 else made_up_keys
    outcome = HandshakeResult(
        role=role,
        version="TLSv1.3" if is_tls13 else "TLSv1.2",
        cipher=(suite.name, "TLS", 128),
        suite=suite,
        secrets=HandshakeSecrets(
            suite=suite,
            tx=make(suite, "us"),
            rx=make(suite, "peer"),
            tx_sequence_number=0,
            rx_sequence_number=0,
        ),
        no_secrets_reason=None,
        leftover=b"",
        max_fragment=MAX_FRAGMENT,
        info=PeerInfo(),
        engine_object=None,
        tickets=None,
        client_random=None,
    )
    sock.setblocking(False)
    observer = terms.settings.observer
    driver, reason = hand_off(
        sock,
        outcome,
        policy=offload,
        unavailable=prepare(sock, offload),
        limits=terms.settings.key_limits,
        on_key_change=observer.key_changed if observer is not None else None,
        lock=shared_by(loop).lock,
    )
    transport = KTLSTransport(
        loop,
        sock,
        driver,
        Established.of(outcome, reason),
        protocol,
        terms,
        names=(sock.getpeername(), sock.getsockname()),
        owner=None,
    )
    protocol.connection_made(transport)
    transport.start()
    return Scripted(transport, protocol, RecordPeer(theirs, suite))


@dataclass
class Link:
    """A connection after a real handshake; ``theirs`` blocks, and is for threads."""

    transport: Any
    protocol: Any
    theirs: Any

    @property
    def diary(self) -> Diary:
        diary: Diary = self.protocol.diary
        return diary

    @property
    def ktls(self) -> ktls.aio.KTLSObject:
        info: ktls.aio.KTLSObject = self.transport.get_extra_info("ktls")
        return info


async def connect(
    net: Net,
    loop: Loop,
    case: Case | None = None,
    *,
    protocol: Any = None,
    buffers: int | None = None,
    changing_peer: bool = False,
    context: ssl.SSLContext | None = None,
    their_context: Any = None,
    **options: Any,
) -> Link:
    """Connect and shake hands with a blocking socket. ``changing_peer``: the peer, a ``KTLSSocket``, can change its keys, whatever this kernel can."""
    case = case or Case()
    protocol = Keeper() if protocol is None else protocol
    context = context or net.context("ktls", case.role, case.version)
    if isinstance(context, ktls.SSLContext):
        context.offload = case.offload
    their_role: Any = "server" if case.role == "client" else "client"
    their_context = their_context or net.context(case.peer, their_role, case.version)
    if changing_peer and not has_rekey():
        their_context.offload = "userspace"
    client, server = net.tcp(buffers=buffers)
    mine, their = (client, server) if case.role == "client" else (server, client)
    theirs = net.spawn(wrap, their_context, their, server_side=their_role == "server")
    if case.role == "client":
        options.setdefault("server_hostname", HOST)
        made = loop.create_connection(lambda: protocol, sock=mine, ssl=context, **options)
    else:
        made = loop.connect_accepted_socket(lambda: protocol, mine, ssl=context, **options)
    try:
        transport, _ = await made
    except BaseException:
        mine.close()
        await asyncio.gather(asyncio.wrap_future(theirs), return_exceptions=True)
        if theirs.exception() is None:
            net.keep(theirs.result())
        raise
    return Link(transport, protocol, net.keep(await result(theirs)))


def wrap(context: Any, sock: socket.socket, *, server_side: bool, **options: Any) -> Any:
    """Shake hands on a blocking socket, which tells of a truncation."""
    sock.settimeout(PATIENCE)
    if not server_side:
        options.setdefault("server_hostname", HOST)
    return context.wrap_socket(sock, server_side=server_side, suppress_ragged_eofs=False, **options)


def version_of(case: Case) -> CipherSuite:
    """The suite of a scripted connection of that version."""
    return TLS12_SUITE if case.version is TLS12 else TLS13_SUITE


async def ended(keepers: Iterable[Any]) -> None:
    """Wait until all these protocols have lost their connections."""
    for keeper in keepers:
        await until(lambda keeper=keeper: keeper.diary.lost)  # type: ignore[misc]  # mypy infers no lambda with a default


def timed() -> Callable[[], float]:
    """Return a function that tells the seconds since this call."""
    start = time.monotonic()
    return lambda: time.monotonic() - start


def slow_reader(peer: RecordPeer) -> bytes:
    """Receive data to the end, which must be close_notify."""
    data = bytearray()
    while (message := peer.read_message()) is not None:
        if message.content_type == ContentType.ALERT:
            assert message.fragment == CLOSE_NOTIFY
            return bytes(data)
        data += message.fragment
    raise AssertionError("TCP ended without close_notify")
