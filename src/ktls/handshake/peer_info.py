"""Copies out of the ``ssl`` module's engine what the application may ask later, when there is no engine any more."""

from __future__ import annotations

import ssl
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from ktls.protocol.enums import Role

from .result import PeerInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from .framing import ClientHello

__all__ = ("peer_info",)

_T = TypeVar("_T")


def peer_info(
    sslobject: ssl.SSLObject, role: Role, server_hostname: str | None, hello: ClientHello | None
) -> PeerInfo:
    """Ask an engine whose handshake is complete. A server's name is the one in ``hello``, the client's."""
    if role is Role.SERVER:
        server_hostname = hello.server_name if hello is not None else None
    return PeerInfo(
        server_name=server_hostname,
        selected_alpn_protocol=_ask(sslobject.selected_alpn_protocol, None),
        compression=_ask(sslobject.compression, None),
        group=_name(sslobject, "group"),
        client_sigalg=_name(sslobject, "client_sigalg"),
        server_sigalg=_name(sslobject, "server_sigalg"),
        session_reused=_ask(lambda: bool(sslobject.session_reused), False),
        tls_unique=_ask(lambda: sslobject.get_channel_binding("tls-unique"), None),
        certificate=_ask(lambda: sslobject.getpeercert(True), None),
        certificate_dict=_ask(lambda: sslobject.getpeercert(), None),
        verified_chain=_chain(sslobject, "get_verified_chain"),
        unverified_chain=_chain(sslobject, "get_unverified_chain"),
    )


def _ask(question: Callable[[], _T], otherwise: _T) -> _T:
    """Ask the engine something that it may be unable to answer."""
    try:
        return question()
    except (ssl.SSLError, ValueError, AttributeError, NotImplementedError):
        return otherwise


def _name(sslobject: ssl.SSLObject, method: str) -> str | None:
    name: Any = _ask(getattr(sslobject, method, lambda: None), None)  # since Python 3.15
    return None if name is None else sys.intern(name)  # there are a few, and connections share them


def _chain(sslobject: ssl.SSLObject, method: str) -> tuple[bytes, ...]:
    certificates: Any = _ask(getattr(sslobject, method, tuple), None)  # since Python 3.13
    return tuple(certificates or ())
