"""What an ``ssl.SSLContext`` can't say: offload policy, key limits, sessions."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final, final

from ktls.handshake.handoff import OffloadPolicy
from ktls.handshake.sessions import SessionCache
from ktls.protocol.limits import KeyLimits

__all__ = ("DEFAULTS", "Settings", "settings_of")


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


#: Of a plain ``ssl.SSLContext``.
DEFAULTS: Final = Settings()


def settings_of(context: ssl.SSLContext) -> Settings:
    """Return the settings of ``context``, or the defaults if it is a plain one."""
    settings = getattr(context, "_ktls_settings", DEFAULTS)
    return settings if isinstance(settings, Settings) else DEFAULTS
