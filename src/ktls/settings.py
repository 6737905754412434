"""What an ``ssl.SSLContext`` can't say: offload policy, key limits, sessions, and who wants to know what happens."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final, Protocol, final

from ktls.handshake.handoff import Offload, OffloadPolicy
from ktls.handshake.sessions import SessionCache
from ktls.protocol.enums import Direction, KeyChangeCause
from ktls.protocol.limits import KeyLimits

__all__ = ("DEFAULTS", "Observer", "Settings", "settings_of")


class Observer(Protocol):
    """Is told what happens on connections: for metrics. Called in the thread that found out; must be quick, and must not raise."""

    def handshake_completed(
        self, version: str, cipher: str, session_reused: bool, offload: Offload
    ) -> None:
        """A connection begins. Names are those of ``ssl``: ``TLSv1.3``, ``TLS_AES_128_GCM_SHA256``."""
        ...

    def handshake_failed(self, error: BaseException) -> None:
        """There will be no connection."""
        ...

    def key_changed(self, direction: Direction, cause: KeyChangeCause) -> None:
        """A traffic key was replaced. Under a lock of the connection: don't touch it."""
        ...

    def connection_ended(self, offload: Offload, error: BaseException | None) -> None:
        """A connection that began has ended; with ``error`` None in order, or because we said so."""
        ...


@final
@dataclass(slots=True, kw_only=True)
class Settings:
    """Settings of a context, for all its connections to come."""

    #: ``auto``, ``kernel`` (or an ``OffloadError``), ``userspace``.
    offload: OffloadPolicy = "auto"
    key_limits: KeyLimits = field(default_factory=KeyLimits)
    #: Seconds that ``close`` may take to deliver what was accepted.
    shutdown_timeout: float = 30.0
    #: Clients: keep the engine after the hand-off, for the tickets that ``session`` needs (about 27 KB a connection).
    keep_session: bool = True
    #: Clients: resume by host and port without being asked.
    session_cache: SessionCache | None = None
    observer: Observer | None = None


#: Of a plain ``ssl.SSLContext``.
DEFAULTS: Final = Settings()


def settings_of(context: ssl.SSLContext) -> Settings:
    """Return the settings of ``context``, or the defaults if it is a plain one."""
    settings = getattr(context, "_ktls_settings", DEFAULTS)
    return settings if isinstance(settings, Settings) else DEFAULTS
