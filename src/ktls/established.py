"""What may be asked about a connection after its handshake: methods of ``ssl.SSLSocket``, answered from copies.

The engine that knew the answers is gone by then; a connection keeps these few values instead.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any, Final, Literal, final, overload

from ktls.handshake.result import HandshakeResult, PeerInfo
from ktls.handshake.tickets import TicketRelay
from ktls.protocol.key_schedule import tls_exporter

__all__ = ("Established", "EstablishedFacts")

#: RFC 9266 §2.
_EXPORTER_LABEL: Final = b"EXPORTER-Channel-Binding"
_EXPORTER_LENGTH: Final = 32


@final
@dataclass(frozen=True, slots=True)
class Established:
    """The lasting part of a ``HandshakeResult``: no secrets but the channel binding."""

    version: str
    cipher: tuple[str, str, int]
    info: PeerInfo
    tickets: TicketRelay | None
    offload_reason: str | None
    tls_exporter: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, result: HandshakeResult, offload_reason: str | None) -> Established:
        """Keep what lasts of ``result``."""
        exported = None
        secrets = result.secrets
        if secrets is not None and secrets.exporter_secret is not None:
            exported = tls_exporter(
                secrets.suite, secrets.exporter_secret, _EXPORTER_LABEL, b"", _EXPORTER_LENGTH
            )
        return cls(
            result.version, result.cipher, result.info, result.tickets, offload_reason, exported
        )


class EstablishedFacts:
    """The methods; ``_established`` is None until the handshake is done."""

    __slots__ = ()

    _established: Established | None

    def _facts(self) -> Established:
        if self._established is None:
            raise ValueError("handshake not done yet")
        return self._established

    def version(self) -> str | None:
        """Return the protocol version as ``ssl`` names it (``TLSv1.3``), or None before the handshake."""
        return self._established.version if self._established is not None else None

    def cipher(self) -> tuple[str, str, int] | None:
        """Return (name, protocol, secret bits) of the cipher suite, or None before the handshake."""
        return self._established.cipher if self._established is not None else None

    def compression(self) -> str | None:
        """Return the compression in use: None, unless an ancient peer talked the engine into it."""
        return self._established.info.compression if self._established is not None else None

    def group(self) -> str | None:
        """Return the name of the key agreement group (``X25519MLKEM768``); None before the handshake, and before Python 3.15."""
        return self._established.info.group if self._established is not None else None

    def client_sigalg(self) -> str | None:
        """Return the name of the scheme that the client signed with, if it did; None before the handshake, and before Python 3.15."""
        return self._established.info.client_sigalg if self._established is not None else None

    def server_sigalg(self) -> str | None:
        """Return the name of the scheme that the server signed with, if it did; None before the handshake, and before Python 3.15."""
        return self._established.info.server_sigalg if self._established is not None else None

    def selected_alpn_protocol(self) -> str | None:
        """Return the protocol agreed on by ALPN (RFC 7301), or None."""
        if self._established is None:
            return None
        return self._established.info.selected_alpn_protocol

    def selected_npn_protocol(self) -> None:
        """Return None: NPN is gone."""

    @overload
    def getpeercert(self, binary_form: Literal[False] = False) -> dict[str, Any] | None: ...

    @overload
    def getpeercert(self, binary_form: Literal[True]) -> bytes | None: ...

    @overload
    def getpeercert(self, binary_form: bool) -> dict[str, Any] | bytes | None: ...

    def getpeercert(self, binary_form: bool = False) -> dict[str, Any] | bytes | None:
        """Return the peer's certificate: DER, or the dict of ``ssl.SSLSocket.getpeercert`` (empty if it was not verified).

        Raises ``ValueError`` before the handshake.
        """
        info = self._facts().info
        if binary_form:
            return info.certificate
        return None if info.certificate_dict is None else dict(info.certificate_dict)

    def get_verified_chain(self) -> list[bytes]:
        """Return the verified chain in DER (Python 3.13 or newer; before that it is empty)."""
        return list(self._facts().info.verified_chain)

    def get_unverified_chain(self) -> list[bytes]:
        """Return the chain that the peer sent, in DER (Python 3.13 or newer; before that it is empty)."""
        return list(self._facts().info.unverified_chain)

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        """Return channel binding data: ``tls-unique`` (RFC 5929) or ``tls-exporter`` (RFC 9266; TLS 1.3 only).

        None before the handshake, or where this version has none. ``ValueError`` for another type.
        """
        if cb_type not in ("tls-unique", "tls-exporter"):
            raise ValueError(f"{cb_type} channel binding type not implemented")
        established = self._established
        if established is None:
            return None
        if cb_type == "tls-unique":
            return established.info.tls_unique
        return established.tls_exporter

    @property
    def session(self) -> ssl.SSLSession | None:
        """The session, to be given to ``wrap_socket`` of a later connection; with TLS 1.3 once a ticket has come. None on servers."""
        tickets = self._established.tickets if self._established is not None else None
        return tickets.session if tickets is not None else None

    @session.setter
    def session(self, session: ssl.SSLSession) -> None:
        if self._established is not None:
            raise ValueError("Cannot set session after handshake.")
        self._resume(session)

    def _resume(self, session: ssl.SSLSession) -> None:
        raise NotImplementedError

    @property
    def session_reused(self) -> bool | None:
        """Whether this connection resumed a session; None before the handshake."""
        return self._established.info.session_reused if self._established is not None else None
