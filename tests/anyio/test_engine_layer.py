"""Streams whose records stay with the handshake engine: CBC suites, and contexts without a key log."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError

import ktls
from ktls.anyio import KTLSAttribute, KTLSStream
from ktls.handshake.keylog import KeyLogTap

from ..sockets.helpers import Net, cut, pattern, read_all, read_exactly, slowly
from ..support import HOST, TLS12, TLS13, Authority
from .helpers import Backend, receive_exactly, result

SUITE = "ECDHE-RSA-AES128-SHA256"


@pytest.fixture(params=["cbc", "no-key-log"])
def contexts(
    request: pytest.FixtureRequest, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any]:
    """Our client's and their server's, for either reason."""
    if request.param == "cbc":
        ours: Any = authority.ktls_client(TLS12)
        theirs = authority.server(TLS12, chain=authority.rsa_chain)
        for context in (ours, theirs):
            context.set_ciphers(f"{SUITE}:@SECLEVEL=0")
        return ours, theirs
    monkeypatch.setattr(
        KeyLogTap, "unavailable", property(lambda self: "somebody took the key log away")
    )
    return authority.ktls_client(TLS13), authority.server(TLS13)


async def connect(
    net: Net, contexts: tuple[Any, Any], buffers: int | None = None
) -> tuple[KTLSStream, Any]:
    client, server = net.tcp(buffers=buffers)
    theirs = net.spawn(
        contexts[1].wrap_socket, server, server_side=True, suppress_ragged_eofs=False
    )
    ours = await KTLSStream.wrap(client, hostname=HOST, ssl_context=contexts[0])
    offload = ours.extra(KTLSAttribute.offload)
    assert (offload.tx, offload.rx) == ("engine", "engine")
    return ours, net.keep(await result(theirs))


def test_data(net: Net, backend: Backend, contexts: tuple[Any, Any]) -> None:
    data = pattern(1_000_000)

    async def main() -> None:
        ours, theirs = await connect(net, contexts, buffers=65536)
        receiving = net.spawn(read_exactly, theirs, len(data))
        await ours.send(data)
        assert await result(receiving) == data
        sending = net.spawn(theirs.sendall, data)
        assert await receive_exactly(ours, len(data)) == data
        await result(sending)
        with pytest.raises(ktls.LocalProtocolError):
            await ours.refresh_traffic_keys()
        await ours.aclose()
        assert read_all(theirs) == b""

    backend.run(main)


def test_ends(net: Net, backend: Backend, contexts: tuple[Any, Any]) -> None:
    data = pattern(300_000)

    async def main() -> None:
        ours, theirs = await connect(net, contexts, buffers=8192)
        receiving = net.spawn(slowly, theirs)
        await ours.send(data)
        await ours.aclose()
        assert await result(receiving) == data
        ours, theirs = await connect(net, contexts)
        cut(theirs)
        with pytest.raises(BrokenResourceError) as caught:
            await ours.receive()
        assert isinstance(caught.value.__cause__, ktls.TruncatedError)
        await ours.aclose()

    backend.run(main)


def test_cancellation(net: Net, backend: Backend, contexts: tuple[Any, Any]) -> None:
    async def main() -> None:
        ours, theirs = await connect(net, contexts, buffers=8192)
        with anyio.move_on_after(0.01):
            await ours.receive()
        theirs.sendall(b"not lost")
        assert await ours.receive() == b"not lost"
        async with anyio.create_task_group() as group:
            group.start_soon(ours.send, bytes(5_000_000))
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        with pytest.raises(BrokenResourceError):
            await ours.send(b"more")
        await ours.aclose()

    backend.run(main)
