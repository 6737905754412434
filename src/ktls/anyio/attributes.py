"""The extra attributes of a stream: those that anyio's own streams have, and ours."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute

from ktls.handshake.handoff import Offload
from ktls.protocol.limits import KeyUsage

from .opening import Opened

__all__ = ("KTLSAttribute", "attributes_of")


class KTLSAttribute(anyio.TypedAttributeSet):
    """What only a ``KTLSStream`` can tell."""

    #: where the records of each direction are protected, and why not in the kernel
    offload: Offload = anyio.typed_attribute()
    #: records protected by the current keys, exactly, from the record layers' own counters
    key_usage: KeyUsage = anyio.typed_attribute()


def attributes_of(opened: Opened, standard_compatible: bool) -> Mapping[Any, Callable[[], Any]]:
    """Return the extra attributes of a connection."""
    sock, facts, peer_address = opened.sock, opened.facts, opened.peer_address
    attributes: dict[Any, Callable[[], Any]] = {
        SocketAttribute.family: lambda: sock.family,
        SocketAttribute.local_address: lambda: _address(sock.getsockname()),
        SocketAttribute.raw_socket: lambda: sock,
        SocketAttribute.remote_address: lambda: _address(peer_address),
        TLSAttribute.alpn_protocol: facts.selected_alpn_protocol,
        TLSAttribute.channel_binding_tls_unique: facts.get_channel_binding,
        TLSAttribute.cipher: facts.cipher,
        TLSAttribute.peer_certificate: lambda: facts.getpeercert(False),
        TLSAttribute.peer_certificate_binary: lambda: facts.getpeercert(True),
        TLSAttribute.server_side: lambda: facts.server_side,
        TLSAttribute.ssl_object: lambda: facts,
        TLSAttribute.standard_compatible: lambda: standard_compatible,
        TLSAttribute.tls_version: facts.version,
        KTLSAttribute.key_usage: opened.driver.key_usage,
        KTLSAttribute.offload: lambda: opened.offload,
    }
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        attributes[SocketAttribute.local_port] = lambda: sock.getsockname()[1]
        attributes[SocketAttribute.remote_port] = lambda: peer_address[1]
    return attributes


def _address(address: Any) -> Any:
    """Give an address of IPv6 as anyio does: host (with its scope, if it has one) and port."""
    if isinstance(address, tuple) and len(address) == 4:
        host, port, _, scope = address
        return (f"{host}%{scope}" if scope and "%" not in host else host), port
    return address
