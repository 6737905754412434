"""What ``get_extra_info("ssl_object")`` and ``get_extra_info("ktls")`` give: facts of the handshake, and control over the connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from ktls.established import EstablishedFacts
from ktls.handshake.handoff import Offload
from ktls.protocol.limits import KeyUsage

if TYPE_CHECKING:
    import ssl

    from .transport import KTLSTransport

__all__ = ("KTLSObject",)


@final
class KTLSObject(EstablishedFacts):
    """An established connection. It answers what ``ssl.SSLObject`` answers after its handshake, and more.

    It doesn't read, write or unwrap: that is the transport's.
    """

    __slots__ = ("_established", "_transport")

    def __init__(self, transport: KTLSTransport) -> None:
        self._transport = transport
        self._established = transport.established

    def __repr__(self) -> str:
        return f"<ktls.aio.KTLSObject {self.version()} {self.offload}>"

    @property
    def context(self) -> ssl.SSLContext | None:
        """The context that the connection was made with; None once the connection closes, if nobody else holds it."""
        return self._transport.context

    @property
    def server_side(self) -> bool:
        """Whether we are the server."""
        return self._transport.server_side

    @property
    def server_hostname(self) -> str | None:
        """The name that the client asked for (SNI)."""
        return self._facts().info.server_name

    @property
    def offload(self) -> Offload:
        """Where the records are protected, and why not in the kernel. After the end of the connection: where they were."""
        return self._transport.offload

    @property
    def key_usage(self) -> KeyUsage:
        """Records protected by the current keys, exactly. ``ValueError`` once the connection has ended."""
        return self._transport.running_driver().key_usage()

    @property
    def truncated(self) -> bool:
        """Whether TCP ended without the peer's close_notify: then what was received may not be all that was sent (RFC 9846 §6.1)."""
        return self._transport.truncated

    def refresh_traffic_keys(self, request_peer: bool = False) -> None:
        """Change our sending key (KeyUpdate), and ask the peer to change its own with ``request_peer``.

        Returns at once; where TCP has no room the change happens before anything else is sent. ``LocalProtocolError``: TLS 1.2, a kernel without rekey, our side is closed;
        nothing changed. ``ValueError`` once the connection has ended.
        """
        self._transport.refresh_traffic_keys(request_peer)

    def _resume(self, session: ssl.SSLSession) -> None:
        raise ValueError("Cannot set session after handshake.")
