"""A connection whose records are protected in this process loses nothing either when the peer reads late, and says something meanwhile."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading

import pytest

import ktls
import ktls.aio
from ktls.handshake.handoff import OffloadPolicy

from ..sockets.helpers import PATIENCE, pattern
from ..support import HOST, Authority

SIZE = 200_000


class LateReader(threading.Thread):
    """A server whose TCP takes little; it speaks when it is told to, and only then it reads, all."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self.received = b""
        self.may_speak = threading.Event()
        self._tls = context
        self._listener = socket.socket()
        # Before it listens: connections inherit it.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port: int = self._listener.getsockname()[1]

    def run(self) -> None:
        with self._listener:
            sock, _ = self._listener.accept()
        sock.settimeout(PATIENCE)
        with (
            sock,
            self._tls.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls,
        ):
            assert self.may_speak.wait(PATIENCE)
            tls.sendall(b"are you still there?")
            while data := tls.recv(65536):
                self.received += data


@pytest.mark.parametrize("offload", ["userspace", "auto"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_what_the_peer_says_late_destroys_nothing(
    authority: Authority, offload: OffloadPolicy, version: ssl.TLSVersion
) -> None:
    context = authority.ktls_client(version)
    context.offload = offload
    peer = LateReader(authority.server())
    peer.start()

    async def main() -> None:
        _, writer = await ktls.aio.open_connection(
            HOST, peer.port, family=socket.AF_INET, ssl=context
        )
        writer.write(pattern(SIZE))
        writer.close()
        closed = asyncio.ensure_future(writer.wait_closed())
        # TCP has everything, or will in a moment; the peer's has next to nothing.
        done, _ = await asyncio.wait({closed}, timeout=0.05)
        peer.may_speak.set()
        assert not done
        await closed

    asyncio.run(main())
    peer.join(PATIENCE)
    assert not peer.is_alive()
    assert peer.received == pattern(SIZE)
