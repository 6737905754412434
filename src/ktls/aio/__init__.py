"""The asyncio front end: transports, servers and streams whose bytes are TLS, protected by the kernel where it can.

Two ways in. Functions, on any running loop (asyncio's or uvloop's): ``create_connection``, ``create_server``, ``open_connection``, ``start_server``, ``start_tls``, ``connect_accepted_socket``, ``sendfile``.
Or event loops whose own ``ssl=`` arguments mean kernel TLS: ``new_event_loop``, ``new_uvloop_event_loop``, ``run``, ``install``.

``transport.get_extra_info("ktls")`` is a ``KTLSObject``: offload, key usage, key refresh.
"""

from __future__ import annotations

from .api import connect_accepted_socket, create_connection, create_server, start_tls
from .established import KTLSObject
from .loops import (
    KTLSEventLoop,
    KTLSEventLoopPolicy,
    install,
    new_event_loop,
    new_uvloop_event_loop,
    run,
)
from .sendfile import sendfile
from .server import Server
from .streams import open_connection, start_server
from .transport import KTLSTransport

__all__ = (
    "KTLSEventLoop",
    "KTLSEventLoopPolicy",
    "KTLSObject",
    "KTLSTransport",
    "Server",
    "connect_accepted_socket",
    "create_connection",
    "create_server",
    "install",
    "new_event_loop",
    "new_uvloop_event_loop",
    "open_connection",
    "run",
    "sendfile",
    "start_server",
    "start_tls",
)
