"""What a finished handshake leaves behind: values, no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, final

from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret

if TYPE_CHECKING:
    import ssl

    from ktls.protocol.enums import Role
    from ktls.protocol.suites import CipherSuite

    from .tickets import TicketRelay

__all__ = ("CipherTuple", "EngineObject", "HandshakeResult", "HandshakeSecrets", "PeerInfo")

#: (name, version, secret bits), as ``ssl.SSLSocket.cipher()`` gives it.
CipherTuple: TypeAlias = tuple[str, str, int]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeSecrets:
    """Everything that a record layer needs to take over from the engine.

    ``tx`` and ``rx`` are traffic secrets of generation 0 in TLS 1.3, which go on changing, and the keys themselves in TLS 1.2.
    The sequence numbers are those of the next record.
    """

    suite: CipherSuite
    tx: TrafficSecret | TrafficKeys
    rx: TrafficSecret | TrafficKeys
    tx_sequence_number: int
    rx_sequence_number: int
    #: exporter_secret of TLS 1.3 (RFC 9846 §7.5).
    exporter_secret: bytes | None = field(default=None, repr=False)

    @property
    def tx_secret(self) -> TrafficSecret | None:
        """Our traffic secret; None in TLS 1.2."""
        return self.tx if isinstance(self.tx, TrafficSecret) else None

    @property
    def rx_secret(self) -> TrafficSecret | None:
        """The peer's traffic secret; None in TLS 1.2."""
        return self.rx if isinstance(self.rx, TrafficSecret) else None

    @property
    def tx_keys(self) -> TrafficKeys:
        """The keys to send with. In TLS 1.2 with the explicit nonce of the next record."""
        return self.tx.keys() if isinstance(self.tx, TrafficSecret) else self.tx

    @property
    def rx_keys(self) -> TrafficKeys:
        """The keys to receive with."""
        return self.rx.keys() if isinstance(self.rx, TrafficSecret) else self.rx


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """What the application may ask about the handshake, copied out of the engine. Forms are those of ``ssl.SSLObject``."""

    #: Client: the name that was asked for. Server: the name that the client asked for (SNI).
    server_name: str | None = None
    selected_alpn_protocol: str | None = None
    compression: str | None = None
    #: The key agreement group and the signature schemes, by OpenSSL's names; None before Python 3.15.
    group: str | None = None
    client_sigalg: str | None = None
    server_sigalg: str | None = None
    session_reused: bool = False
    tls_unique: bytes | None = field(default=None, repr=False)
    #: DER.
    certificate: bytes | None = field(default=None, repr=False)
    #: ``getpeercert()``: empty if there is a certificate that was not verified, None if there is none.
    certificate_dict: Mapping[str, Any] | None = field(default=None, repr=False)
    #: DER, the peer's own certificate first; empty before Python 3.13.
    verified_chain: tuple[bytes, ...] = field(default=(), repr=False)
    unverified_chain: tuple[bytes, ...] = field(default=(), repr=False)


@final
@dataclass(frozen=True, slots=True)
class EngineObject:
    """An engine that goes on protecting the records, with its two ends."""

    sslobject: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeResult:
    """A finished handshake.

    Either ``secrets`` is there, or ``no_secrets_reason`` and ``engine_object`` are. In the second case nothing was sent or taken
    outside the engine, and ``leftover`` is the first thing it must be fed. Not to be kept after the hand-off: it holds the first secrets.
    """

    role: Role
    #: As ``ssl`` says it: ``TLSv1.3``.
    version: str
    cipher: CipherTuple
    suite: CipherSuite | None
    secrets: HandshakeSecrets | None
    #: Why there are no secrets, in words for a human.
    no_secrets_reason: str | None
    #: Bytes that came after the peer's Finished: whole and partial records, still protected.
    leftover: bytes = field(repr=False)
    #: Largest fragment, in bytes, that we should send: what the peer may have to insist on.
    max_fragment: int
    info: PeerInfo
    engine_object: EngineObject | None
    #: Clients only, where sessions are wanted and there are secrets.
    tickets: TicketRelay | None
    client_random: bytes | None = field(repr=False)
    #: Writes a later secret to the user's own key log, if there is one: a ``KeyLog`` for ``KernelConnection``. Never raises.
    key_log: Callable[[str, bytes], None] | None = field(default=None, repr=False)
