"""Handshakes on event loops that are strange, but good; and what may be asked of them."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

import ktls

from ..sockets.helpers import Case, Net
from ..support import HOST, TLS12, TLS13, Authority, EchoServer
from .helpers import Keeper, Loop, connect, result, until, wrap

if TYPE_CHECKING:
    from collections.abc import Callable


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
