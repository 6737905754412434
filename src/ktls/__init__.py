"""Kernel TLS for Python.

``ssl`` does the handshake, the Linux kernel protects the records, and everything that follows the handshake is handled.

Rooms, from the bottom up; imports go downward only:

    protocol/    what TLS says after the handshake: no sockets, no threads, no clock
    record/      who protects the bytes: kernel, userspace, engine; the driver that runs the protocol's commands
    handshake/   how the secrets come to be: engine, key log tap, hand-off, ticket relay
    sockets.py, context.py (and their helpers)   the blocking front end
    aio/         the asyncio front end; anyio/ the same for anyio and trio
    asgi/        an HTTP protocol for uvicorn
    cli/         one module per command
    testing/     public: the record-layer contract suite
"""

from __future__ import annotations

from ktls.context import SSLContext, create_default_context, wrap_socket
from ktls.handshake.handoff import Offload
from ktls.handshake.sessions import SessionCache
from ktls.protocol.connection import KernelConnection
from ktls.protocol.errors import (
    AlertReceived,
    KeyLimitError,
    KTLSError,
    LocalProtocolError,
    OffloadError,
    RemoteProtocolError,
    TruncatedError,
)
from ktls.protocol.limits import DirectionUsage, KeyLimits, KeyUsage
from ktls.record.probe import Capabilities, probe
from ktls.settings import Observer, Settings
from ktls.sockets import KTLSSocket
from ktls.state import ExportedState

__all__ = (
    "AlertReceived",
    "Capabilities",
    "DirectionUsage",
    "ExportedState",
    "KTLSError",
    "KTLSSocket",
    "KernelConnection",
    "KeyLimitError",
    "KeyLimits",
    "KeyUsage",
    "LocalProtocolError",
    "Observer",
    "Offload",
    "OffloadError",
    "RemoteProtocolError",
    "SSLContext",
    "SessionCache",
    "Settings",
    "TruncatedError",
    "create_default_context",
    "probe",
    "wrap_socket",
)

__version__ = "0.1.0"
