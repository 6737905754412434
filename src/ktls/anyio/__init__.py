"""Kernel TLS for anyio, on asyncio and on trio: ``KTLSStream``, and what makes one.

``connect_tcp`` and ``create_tcp_listener`` stand where anyio's own functions of that name stand, ``KTLSListener`` and ``KTLSStream.wrap`` where
``anyio.streams.tls.TLSListener`` and ``TLSStream.wrap`` do. Needs anyio 4.10 (the extra ``anyio``).

    async with await ktls.anyio.connect_tcp("localhost", 8443, ssl_context=context) as stream:
        await stream.send(b"hello")
        await stream.sendfile(file)
        stream.extra(KTLSAttribute.offload)     # Offload(tx="kernel", rx="kernel", reason=None)

Differences from ``anyio.streams.tls.TLSStream``: ``aclose`` loses nothing, and does not wait for the peer's close_notify; ``send_eof`` works with TLS 1.3; whatever ends a
connection is a ``BrokenResourceError`` with the reason as its cause; there is no ``unwrap``, because kernel TLS can't be taken off a socket.

    opening     from a transport to the end of the handshake
    attributes  what a stream tells about itself
    waiting     how a stream waits: start reading here
    stream      the stream
    listening   listeners, and ``connect_tcp``
"""

from __future__ import annotations

from .attributes import KTLSAttribute
from .listening import KTLSListener, connect_tcp, create_tcp_listener
from .stream import KTLSStream

__all__ = ("KTLSAttribute", "KTLSListener", "KTLSStream", "connect_tcp", "create_tcp_listener")
