"""Handshakes on event loops that fail, end too late or are given up: nothing is left, and the right error is raised."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.errors import OffloadError

from ..sockets.helpers import Case, Net
from ..support import HOST, TLS12, Authority, EchoServer, has_kernel_tls
from .helpers import Keeper, Loop, connect, result, timed, turns, until, wrap

if TYPE_CHECKING:
    from collections.abc import Callable


def end_of(sock: socket.socket) -> str:
    """Read to the end of a TCP stream, and return how it came."""
    sock.settimeout(20)
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    return "fin"


def test_timeout(net: Net, loop: Loop) -> None:
    async def main() -> None:
        mine, theirs = net.tcp()
        keeper = Keeper()
        elapsed = timed()
        with pytest.raises(ConnectionAbortedError, match=r"taking longer than 0\.1 seconds"):
            await loop.create_connection(
                lambda: keeper,
                sock=mine,
                ssl=net.context("ktls", "client"),
                server_hostname=HOST,
                ssl_handshake_timeout=0.1,
            )
        assert elapsed() < 5
        assert mine.fileno() == -1
        assert end_of(theirs) == "fin"
        assert keeper.diary.events == []

    loop.run(main)


def test_timeout_of_a_server(net: Net, loop: Loop) -> None:
    """Nobody waits there, and it is no news: no call of the exception handler, no protocol."""

    async def main() -> None:
        keeper = Keeper()
        server = await loop.create_server(
            lambda: keeper,
            "127.0.0.1",
            0,
            ssl=net.context("ktls", "server"),
            ssl_handshake_timeout=0.1,
        )
        client = net.keep(socket.create_connection(server.sockets[0].getsockname()))
        assert await asyncio.to_thread(end_of, client) == "fin"
        assert keeper.diary.events == []
        server.close()

    loop.run(main)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["ssl_handshake_timeout", "ssl_shutdown_timeout"])
def test_timeouts_that_make_no_sense(net: Net, loop: Loop, name: str, value: int) -> None:
    async def main() -> None:
        mine, _ = net.tcp()
        options: Any = {name: value}
        with pytest.raises(ValueError, match=f"{name} should be a positive number, got {value}"):
            await loop.create_connection(
                Keeper,
                sock=mine,
                ssl=net.context("ktls", "client"),
                server_hostname=HOST,
                **options,
            )

    loop.run(main)


def test_cancellation(net: Net, loop: Loop) -> None:
    """The descriptor is closed at once, with FIN: no more is known than that we have gone."""

    async def main() -> None:
        mine, theirs = net.tcp()
        keeper = Keeper()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                loop.create_connection(
                    lambda: keeper,
                    sock=mine,
                    ssl=net.context("ktls", "client"),
                    server_hostname=HOST,
                ),
                0.05,
            )
        assert mine.fileno() == -1
        assert end_of(theirs) == "fin"
        assert keeper.diary.events == []

    loop.run(main)


def test_cancellation_at_every_step(net: Net, one_of_each: Loop) -> None:
    """Also when the handshake completes at that very moment: ``connection_lost`` only after ``connection_made``, and nothing stays open."""

    async def main() -> None:
        for steps in range(1, 25):
            mine, theirs = net.tcp()
            server = net.spawn(wrap, net.context("stdlib", "server"), theirs, server_side=True)
            keeper = Keeper()
            task = asyncio.ensure_future(
                one_of_each.create_connection(
                    lambda keeper=keeper: keeper,
                    sock=mine,
                    ssl=net.context("ktls", "client"),
                    server_hostname=HOST,
                )
            )
            await turns(steps)
            for _ in range(
                300 if steps % 2 else 0
            ):  # until the loop has found an event, or just before
                if task.done() or select.select([mine], [], [], 0)[0]:
                    break
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                transport, _ = await task
                transport.abort()
            await turns()
            assert mine.fileno() == -1
            assert keeper.diary.events in ([], ["made", "lost"])
            with suppress(OSError):
                net.keep(await result(server))

    one_of_each.run(main)


def test_no_cycle_keeps_the_context(net: Net, one_of_each: Loop, authority: Authority) -> None:
    """It is dead, by reference counts alone, when the handshake has been cancelled or the connection has ended."""

    async def main() -> None:
        context = authority.client()
        mine, _ = net.tcp()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                one_of_each.create_connection(Keeper, sock=mine, ssl=context, server_hostname=HOST),
                0.05,
            )
        reference = weakref.ref(context)
        del context
        await turns()
        assert reference() is None
        context = authority.client()
        link = await connect(net, one_of_each, context=context)
        link.transport.close()
        await until(lambda: link.diary.lost)
        reference = weakref.ref(context)
        del context
        await turns()
        assert reference() is None

    one_of_each.run(main)


def test_bad_certificate(net: Net, loop: Loop) -> None:
    """The very error of the engine; the peer gets its alert."""

    async def main() -> None:
        mine, their = net.tcp()
        theirs = net.spawn(wrap, net.context("stdlib", "server", TLS12), their, server_side=True)
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            await loop.create_connection(
                Keeper,
                sock=mine,
                ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                server_hostname=HOST,
            )
        assert caught.value.reason == "CERTIFICATE_VERIFY_FAILED"
        with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
            await result(theirs)

    loop.run(main)


def test_wrong_name(net: Net, loop: Loop) -> None:
    async def main() -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            await connect(net, loop, server_hostname="other.example")

    loop.run(main)


def test_bad_client_certificate(net: Net, loop: Loop, authority: Authority) -> None:
    async def main() -> None:
        context = authority.ktls_server(TLS12)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.ca_file)
        with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            await connect(net, loop, Case(role="server", version=TLS12), context=context)

    loop.run(main)


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("how", ["fin", "reset", "garbage", "http"])
def test_bad_peers(net: Net, loop: Loop, how: str, role: str) -> None:
    def behave(sock: socket.socket) -> None:
        if role == "client":
            sock.recv(65536)  # the ClientHello
        match how:
            case "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            case "fin":
                sock.shutdown(socket.SHUT_WR)
            case "garbage":
                sock.sendall(bytes(1000))
            case "http":
                sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")

    async def main() -> None:
        mine, theirs = net.tcp()
        behaving = net.spawn(behave, theirs)
        keeper = Keeper()
        if role == "client":
            made = loop.create_connection(
                lambda: keeper,
                sock=mine,
                ssl=net.context("ktls", "client"),
                server_hostname=HOST,
            )
        else:
            made = loop.connect_accepted_socket(
                lambda: keeper, mine, ssl=net.context("ktls", "server")
            )
        expected: Any = ssl.SSLError if how in ("garbage", "http") else ConnectionResetError
        with pytest.raises(expected):
            await made
        await result(behaving)
        assert mine.fileno() == -1
        assert keeper.diary.events == []

    loop.run(main)


@pytest.mark.skipif(has_kernel_tls(), reason="with kernel TLS there is nothing to refuse")
def test_demand_for_the_kernel_without_one(net: Net, loop: Loop) -> None:
    async def main() -> None:
        for role in ("client", "server"):
            case = Case(role=role, offload="kernel", version=TLS12)
            with pytest.raises(OffloadError):
                await connect(net, loop, case)

    loop.run(main)


def test_factory_that_raises(net: Net, loop: Loop, echo_server: Callable[..., EchoServer]) -> None:
    def fail() -> Any:
        raise RuntimeError("no")

    async def main() -> None:
        server = echo_server(net.context("stdlib", "server"))
        with pytest.raises(RuntimeError, match="no"):
            await loop.create_connection(fail, *server.address, ssl=net.context("ktls", "client"))

    loop.run(main)
