"""What a connection is made with: one object for all connections of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    import ssl

    from ktls.settings import Settings

__all__ = ("HANDSHAKE_TIMEOUT", "Terms")

#: Seconds. That of asyncio.
HANDSHAKE_TIMEOUT: Final = 60.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is the same for all connections of a server, or chosen for one of a client."""

    context: ssl.SSLContext
    settings: Settings
    server_side: bool
    server_hostname: str | None = None
    session: ssl.SSLSession | None = None
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    shutdown_timeout: float
    suppress_ragged_eofs: bool = True
