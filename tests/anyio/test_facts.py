"""What a stream tells about itself, on every backend: attributes, sessions, changes."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import BrokenResourceError
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute

import ktls
import ktls.anyio
from ktls.anyio import KTLSAttribute, KTLSStream

from ..sockets.helpers import Case, Net
from ..support import HOST, TLS12, TLS13
from .helpers import Backend, connect, echo, port_of

if TYPE_CHECKING:
    import ssl


def test_attributes(net: Net, backend: Backend) -> None:
    async def main() -> None:
        for case in (Case(role="client"), Case(role="server"), Case(version=TLS12)):
            link = await connect(net, case)
            ours, theirs = link.ours, link.theirs
            assert ours.extra(SocketAttribute.family) == socket.AF_INET
            assert ours.extra(SocketAttribute.local_address) == theirs.getpeername()
            assert ours.extra(SocketAttribute.remote_address) == theirs.getsockname()
            assert ours.extra(SocketAttribute.local_port) == theirs.getpeername()[1]
            assert ours.extra(SocketAttribute.remote_port) == theirs.getsockname()[1]
            assert ours.extra(SocketAttribute.raw_socket).fileno() >= 0
            assert ours.extra(TLSAttribute.tls_version) == theirs.version()
            assert ours.extra(TLSAttribute.cipher) == theirs.cipher()
            assert ours.extra(TLSAttribute.alpn_protocol) is None
            assert ours.extra(TLSAttribute.server_side) is (case.role == "server")
            assert ours.extra(TLSAttribute.standard_compatible) is True
            assert ours.extra(TLSAttribute.ssl_object).version() == theirs.version()
            if case.role == "client":
                certificate = ours.extra(TLSAttribute.peer_certificate)
                assert certificate is not None
                assert ("DNS", HOST) in certificate["subjectAltName"]
                assert ours.extra(TLSAttribute.peer_certificate_binary)
            else:
                assert ours.extra(TLSAttribute.peer_certificate) is None
            if case.version is TLS12:
                unique = theirs.get_channel_binding("tls-unique")
                assert ours.extra(TLSAttribute.channel_binding_tls_unique) == unique
            assert ours.extra(KTLSAttribute.key_usage).tx.generation == 0
            assert ours.extra(TLSAttribute.shared_ciphers, "left out") == "left out"
            await ours.aclose()

    backend.run(main)


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
def test_addresses_of_ipv6(net: Net, backend: Backend) -> None:
    async def main() -> None:
        listener = await ktls.anyio.create_tcp_listener(
            local_host="::1", ssl_context=net.context("ktls", "server")
        )
        async with listener, anyio.create_task_group() as serving:
            serving.start_soon(listener.serve, echo)
            stream = await ktls.anyio.connect_tcp(
                "::1",
                port_of(listener),
                ssl_context=net.context("ktls", "client"),
                tls_hostname=HOST,
            )
            async with stream:
                assert stream.extra(SocketAttribute.remote_address) == ("::1", port_of(listener))
            serving.cancel_scope.cancel()

    backend.run(main)


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_sessions_are_resumed(net: Net, backend: Backend, version: ssl.TLSVersion) -> None:
    async def main() -> None:
        listener = await ktls.anyio.create_tcp_listener(
            local_host="127.0.0.1", ssl_context=net.context("stdlib", "server", version)
        )
        reused = []
        async with listener, anyio.create_task_group() as serving:
            serving.start_soon(listener.serve, echo)
            for _ in range(2):
                stream = await ktls.anyio.connect_tcp(
                    "127.0.0.1",
                    port_of(listener),
                    ssl_context=net.context("ktls", "client", version),
                    tls_hostname=HOST,
                )
                async with stream:
                    await stream.send(b"x")
                    await stream.receive()
                    facts: Any = stream.extra(TLSAttribute.ssl_object)
                    reused.append(facts.session_reused)
            serving.cancel_scope.cancel()
        assert reused == [False, True]

    backend.run(main)


class Watcher:
    """An observer that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def handshake_completed(
        self, version: str, cipher: str, session_reused: bool, offload: ktls.Offload
    ) -> None:
        self.heard.append(f"completed {version}")

    def handshake_failed(self, error: BaseException) -> None:
        self.heard.append(f"failed {type(error).__name__}")

    def key_changed(self, direction: Any, cause: Any) -> None:
        self.heard.append(f"key {direction.name} {cause.name}")

    def connection_ended(self, offload: ktls.Offload, error: BaseException | None) -> None:
        self.heard.append(f"ended {type(error).__name__}")


def test_observer(net: Net, backend: Backend) -> None:
    watcher = Watcher()
    settings = ktls.Settings(observer=watcher, offload="userspace")

    async def main() -> None:
        link = await connect(net, Case(offload="userspace"), settings=settings)
        await link.ours.refresh_traffic_keys()
        await link.ours.aclose()
        link = await connect(net, Case(offload="userspace"), settings=settings)
        socket.socket.shutdown(link.theirs, socket.SHUT_WR)
        with pytest.raises(BrokenResourceError):
            await link.ours.receive()
        await link.ours.aclose()
        client, server = net.tcp()
        server.close()
        with pytest.raises(BrokenResourceError):
            await KTLSStream.wrap(
                client,
                hostname=HOST,
                ssl_context=net.context("ktls", "client"),
                settings=settings,
            )

    backend.run(main)
    assert watcher.heard[:5] == [
        "completed TLSv1.3",
        "key TX APPLICATION",
        "ended NoneType",
        "completed TLSv1.3",
        "ended TruncatedError",
    ]
    assert len(watcher.heard) == 6
    assert watcher.heard[5] in ("failed SSLEOFError", "failed ConnectionResetError")
