"""Handshakes: what may go wrong, what is told then, and what may be asked about one that went well."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

import ktls
from ktls.protocol.errors import OffloadError

from ..sockets.helpers import Case, Net, read_exactly
from ..support import HOST, TLS12, TLS13, Authority, EchoServer, has_kernel_tls
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


async def chat(link: Any) -> None:
    """A byte each way."""
    link.transport.write(b"x")
    assert await result(link.spawn(read_exactly, link.theirs, 1)) == b"x"


# --- failures --------------------------------------------------------------------------------------------------------


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


# --- strange, but good -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case(version=TLS12), Case(version=TLS13)], ids=str)
def test_byte_by_byte(net: Net, one_of_each: Loop, case: Case) -> None:
    """A network that gives one byte at a time: no event finds a whole message."""

    def trickle(source: socket.socket, target: socket.socket) -> None:
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := source.recv(4096):
            for position in range(len(data)):
                target.sendall(data[position : position + 1])
        target.shutdown(socket.SHUT_WR)

    async def main() -> None:
        mine, near = net.tcp()
        far, their = net.tcp()
        net.spawn(trickle, near, far)
        net.spawn(trickle, far, near)
        theirs = net.spawn(
            wrap, net.context("stdlib", "server", case.version), their, server_side=True
        )
        keeper = Keeper()
        transport, _ = await one_of_each.create_connection(
            lambda: keeper,
            sock=mine,
            ssl=net.context("ktls", "client", case.version),
            server_hostname=HOST,
        )
        peer = net.keep(await result(theirs))
        peer.sendall(b"slow")
        await until(lambda: keeper.diary.data == b"slow")
        transport.abort()
        await until(lambda: keeper.diary.lost)

    one_of_each.run(main)


def test_many_at_once(net: Net, loop: Loop) -> None:
    async def main() -> None:
        server = await loop.create_server(
            lambda: Keeper(on_data=lambda transport: transport.write(b"pong")),
            "127.0.0.1",
            0,
            ssl=net.context("ktls", "server"),
        )
        address = server.sockets[0].getsockname()

        async def visit() -> None:
            keeper = Keeper()
            transport, _ = await loop.create_connection(
                lambda: keeper, *address, ssl=net.context("ktls", "client")
            )
            transport.write(b"ping")
            await until(lambda: keeper.diary.data == b"pong")
            transport.close()
            await until(lambda: keeper.diary.lost)
            assert keeper.diary.error is None

        await asyncio.gather(*(visit() for _ in range(15)))
        server.close()
        await until(lambda: not getattr(server, "_active", ()))

    loop.run(main)


def test_default_context(net: Net, loop: Loop, authority: Authority, monkeypatch: Any) -> None:
    """``ssl=True`` makes one through the ``ssl`` module, once, and does not check a name that was not given."""

    async def main() -> None:
        made: list[ssl.SSLContext] = []

        def create_default_context() -> ssl.SSLContext:
            made.append(authority.client())
            return made[-1]

        monkeypatch.setattr(ssl, "create_default_context", create_default_context)
        for name in (HOST, ""):
            mine, their = net.tcp()
            theirs = net.spawn(wrap, net.context("stdlib", "server"), their, server_side=True)
            transport, keeper = await loop.create_connection(
                Keeper, sock=mine, ssl=True, server_hostname=name
            )
            net.keep(await result(theirs))
            assert transport.get_extra_info("sslcontext") is made[-1]
            assert made[-1].check_hostname is bool(name)
            transport.abort()
            await until(lambda keeper=keeper: keeper.diary.lost)  # type: ignore[misc]  # mypy infers no lambda with a default
        assert len(made) == 2

    loop.run(main)


# --- what may be asked -----------------------------------------------------------------------------------------------


def test_answers_are_those_of_asyncio(net: Net, authority: Authority) -> None:
    """Every key of ``get_extra_info``, and every query of the ``ssl_object``, on the same terms."""

    async def ask(create: Any, version: ssl.TLSVersion) -> dict[str, Any]:
        context, server_context = authority.client(version), authority.server(version)
        context.set_alpn_protocols(["h2", "http/1.1"])
        server_context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(authority.client_chain)
        mine, their = net.tcp()
        theirs = net.spawn(wrap, server_context, their, server_side=True)
        transport, keeper = await create(Keeper, sock=mine, ssl=context, server_hostname=HOST)
        net.keep(await result(theirs))
        assert transport.get_extra_info("sslcontext") is context
        assert transport.get_extra_info("socket").fileno() == mine.fileno()
        assert transport.get_extra_info("peername") == mine.getpeername()
        assert transport.get_extra_info("sockname") == mine.getsockname()
        assert transport.get_extra_info("nonsense") is None
        assert transport.get_extra_info("nonsense", 5) == 5
        said = transport.get_extra_info("ssl_object")
        answers = {
            name: transport.get_extra_info(name) for name in ("peercert", "cipher", "compression")
        }
        answers |= {
            name: getattr(said, name)()
            for name in (
                "version",
                "cipher",
                "compression",
                "getpeercert",
                "selected_alpn_protocol",
            )
        }
        answers |= {
            name: getattr(said, name)
            for name in ("session_reused", "server_side", "server_hostname")
        }
        answers["der"] = said.getpeercert(True)
        assert said.context is context
        transport.abort()
        await until(lambda: keeper.diary.lost)
        return answers

    async def main() -> None:
        running = asyncio.get_running_loop()
        for version in (TLS12, TLS13):
            ours = await ask(ktls.aio.create_connection, version)
            theirs = await ask(running.create_connection, version)
            assert ours == theirs

    Loop("functions").run(main)


def test_client_certificate(net: Net, loop: Loop, authority: Authority) -> None:
    async def main() -> None:
        context, client = authority.ktls_server(), authority.client()
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.ca_file)
        client.load_cert_chain(authority.client_chain)
        link = await connect(net, loop, Case(role="server"), context=context, their_context=client)
        certificate = link.transport.get_extra_info("peercert")
        assert ("email", "client@example.org") in certificate["subjectAltName"]
        assert link.ktls.server_side
        assert link.ktls.server_hostname == HOST
        link.transport.abort()
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_sni(net: Net, loop: Loop, authority: Authority) -> None:
    async def main() -> None:
        first, second = authority.ktls_server(), authority.ktls_server()
        second.set_alpn_protocols(["second"])
        seen: list[str] = []

        def switch(sslobject: Any, name: str, _: ssl.SSLContext) -> None:
            seen.append(name)
            sslobject.context = second

        first.sni_callback = switch
        client = authority.client()
        client.set_alpn_protocols(["second"])
        link = await connect(net, loop, Case(role="server"), context=first, their_context=client)
        assert seen == [HOST]
        assert link.ktls.selected_alpn_protocol() == "second"
        link.transport.abort()
        await until(lambda: link.diary.lost)

    loop.run(main)


@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
@pytest.mark.parametrize("how", ["session", "cache"])
def test_resumption(
    net: Net,
    loop: Loop,
    authority: Authority,
    echo_server: Callable[..., EchoServer],
    version: ssl.TLSVersion,
    how: str,
) -> None:
    async def main() -> None:
        server = echo_server(authority.server(version))
        context = authority.ktls_client(version)
        options: Any = {}
        if how == "cache":
            context.session_cache = ktls.SessionCache()
        reused = []
        for _ in range(3):
            transport, keeper = await loop.create_connection(
                Keeper, *server.address, ssl=context, server_hostname=HOST, **options
            )
            transport.write(b"x")
            await until(lambda keeper=keeper: keeper.diary.data == b"x")  # type: ignore[misc]  # mypy infers no lambda with a default
            said = transport.get_extra_info("ktls")
            reused.append(said.session_reused)
            if how == "session":
                assert said.session is not None
                options["session"] = said.session
            transport.close()
            await until(lambda keeper=keeper: keeper.diary.lost)  # type: ignore[misc]  # mypy infers no lambda with a default
        assert reused == [False, True, True]

    loop.run(main)
