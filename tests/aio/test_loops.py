"""Loops whose own ``ssl=`` is kernel TLS: what they take over, what they leave alone, and what they fall back to."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import warnings
from typing import TYPE_CHECKING, Any

import pytest

import ktls
from ktls.aio import KTLSTransport

from ..support import HOST
from .helpers import Echo, Keeper, Loop, result, until, wrap
from .plain import chat, connect_plain, echo, lines, nonblocking, own, stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..sockets.helpers import Net


class Foreign(ssl.SSLContext):
    """A context that makes its own connections, as other libraries' do: its secrets can't be had."""

    def wrap_bio(self, *arguments: Any, **options: Any) -> Any:
        return super().wrap_bio(*arguments, **options)


def foreign(net: Net, role: str) -> Foreign:
    """A ``Foreign`` context for that role."""
    if role == "server":
        context = Foreign(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(net.authority.server_chain)
    else:
        context = Foreign(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(net.authority.ca_file)
    return context


# --- fallbacks -------------------------------------------------------------------------------------------------------


def test_foreign_context(net: Net, loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """Works, by the loop's own TLS, and one line says so."""
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=foreign(net, "server"))
        assert len(lines(caplog)) == 1
        transport, keeper = await loop.create_connection(
            Keeper, *server.sockets[0].getsockname(), ssl=foreign(net, "client")
        )
        assert len(lines(caplog)) == 2
        assert all("event loop's own TLS" in line for line in lines(caplog))
        assert not isinstance(transport, KTLSTransport)
        assert transport.get_extra_info("ktls") is None
        await chat(transport, keeper)
        await stop(server)

    loop.run(main)


def test_foreign_context_on_an_accepted_socket(
    net: Net, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        mine, theirs = net.tcp()
        visiting = net.spawn(wrap, net.context("stdlib", "client"), theirs, server_side=False)
        keeper = Keeper()  # uvloop returns another protocol
        transport, _ = await loop.connect_accepted_socket(
            lambda: keeper, nonblocking(mine), ssl=foreign(net, "server")
        )
        assert not isinstance(transport, KTLSTransport)
        assert len(lines(caplog)) == 1
        tls = net.keep(await result(visiting))
        tls.sendall(b"x")
        await until(lambda: keeper.diary.data == b"x")
        await asyncio.to_thread(tls.unwrap)
        await until(lambda: keeper.diary.lost)

    loop.run(main)


def test_foreign_context_for_start_tls(
    net: Net, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        mine, theirs = net.tcp()
        serving = net.spawn(echo, net, theirs, net.context("stdlib", "server"))
        plain, keeper = await connect_plain(mine)
        transport = await loop.start_tls(
            plain, keeper, foreign(net, "client"), server_hostname=HOST
        )
        assert not isinstance(transport, KTLSTransport)
        assert len(lines(caplog)) == 1
        await chat(transport, keeper)
        await result(serving)

    loop.run(main)


@own
def test_unix_sockets(net: Net, own: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(own)

    async def main() -> None:
        running = asyncio.get_running_loop()
        path = str(tmp_path / "socket")
        server = await running.create_unix_server(Echo, path, ssl=net.context("stdlib", "server"))
        transport, keeper = await running.create_unix_connection(
            Keeper, path, ssl=net.context("stdlib", "client"), server_hostname=HOST
        )
        await chat(transport, keeper)
        await stop(server)

    loop.run(main)


def test_unix_socket_of_the_caller(net: Net, loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ktls.aio")

    async def main() -> None:
        mine, theirs = socket.socketpair()
        nonblocking(mine)
        serving = net.spawn(echo, net, net.keep(theirs), net.context("stdlib", "server"))
        transport, keeper = await loop.create_connection(
            Keeper, sock=mine, ssl=net.context("ktls", "client"), server_hostname=HOST
        )
        assert not isinstance(transport, KTLSTransport)
        (line,) = lines(caplog)
        assert "not a TCP socket" in line
        await chat(transport, keeper)
        await result(serving)

    loop.run(main)


@own
def test_plain_traffic_is_untouched(net: Net, own: str) -> None:
    loop = Loop(own)

    async def main() -> None:
        running = asyncio.get_running_loop()
        server = await running.create_server(Echo, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        for options in ({}, {"ssl": None}, {"ssl": False}):
            transport, keeper = await running.create_connection(Keeper, *address, **options)
            assert not isinstance(transport, KTLSTransport)
            assert transport.get_extra_info("sslcontext") is None
            await chat(transport, keeper)
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await running.create_connection(Keeper, *address, ssl_handshake_timeout=1)
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await running.create_server(Keeper, *address, ssl_handshake_timeout=1)
        await stop(server)

    loop.run(main)


# --- run, install ----------------------------------------------------------------------------------------------------


@pytest.fixture
def policy() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.14 on
        before = asyncio.get_event_loop_policy()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(before)


@pytest.mark.parametrize("factory", [ktls.aio.new_event_loop, ktls.aio.new_uvloop_event_loop])
def test_install(policy: None, factory: Any) -> None:
    """Programs that call ``asyncio.run`` by themselves."""
    ktls.aio.install(factory)
    kind = type(factory_made(factory))

    async def main() -> None:
        assert type(asyncio.get_running_loop()) is kind

    asyncio.run(main())


def factory_made(factory: Any) -> Any:
    made = factory()
    made.close()
    return made


def test_run() -> None:
    async def main(answer: int) -> int:
        assert isinstance(asyncio.get_running_loop(), ktls.aio.KTLSEventLoop)
        assert asyncio.get_running_loop().get_debug()
        return answer

    assert ktls.aio.run(main(42), debug=True) == 42
    with pytest.raises(ZeroDivisionError):
        ktls.aio.run(fail())


async def fail() -> None:
    raise ZeroDivisionError


def test_loop_with_a_selector() -> None:
    """As ``asyncio.SelectorEventLoop`` takes one."""
    import selectors

    selector = selectors.PollSelector()
    loop = ktls.aio.KTLSEventLoop(selector)
    assert loop._selector is selector
    loop.close()


@pytest.mark.parametrize("debug", [True, False])
def test_debug_mode(net: Net, loop: Loop, debug: bool) -> None:
    """A loop in debug mode checks more, and logs more."""

    async def main() -> None:
        asyncio.get_running_loop().set_debug(debug)
        server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=net.context("ktls", "server"))
        address = server.sockets[0].getsockname()
        transport, keeper = await loop.create_connection(
            Keeper, *address, ssl=net.context("ktls", "client")
        )
        await chat(transport, keeper)
        with pytest.raises(ssl.SSLError):
            await loop.create_connection(
                Keeper, *address, ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            )
        server.close()
        await until(lambda: not server._active)

    loop.run(main)
