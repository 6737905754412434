"""How long a key may be used, and how much nonsense a peer may send.

Counting is the record layer's business (the kernel knows best); here is only what follows from the counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from .suites import AEAD

__all__ = ("DirectionUsage", "FloodBudget", "KeyLimits", "KeyUsage")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """When a traffic key is to be replaced; whatever is reached first counts.

    ``records``: records sealed or opened under one key. None means the cipher suite's own default (AES-GCM 2^23, AES-CCM 2^22,
    ChaCha20-Poly1305 none). Never more than the AEAD limit of RFC 9846 §5.5, whatever is set here.
    ``octets``: bytes of application data. ``age``: seconds. None means no such limit.

    Where the key can't be changed (TLS 1.2, a kernel without rekey), a limit that was set here, or else the AEAD limit itself, ends
    the sending side of the connection cleanly.
    """

    records: int | None = None
    octets: int | None = None
    age: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that would refresh for ever (``ValueError``)."""
        for name in ("records", "octets", "age"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"KeyLimits.{name} must be positive")

    def refresh_at(self, aead: AEAD) -> int | None:
        """Records after which a key of ``aead`` is refreshed, or None."""
        if self.records is None:
            return aead.refresh_default
        return min(self.records, aead.confidentiality_limit or self.records)

    def end_at(self, aead: AEAD) -> int | None:
        """Records after which a key of ``aead`` that can't be refreshed is used no more, or None."""
        return aead.confidentiality_limit if self.records is None else self.refresh_at(aead)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionUsage:
    """Use of the current key of one direction, as counted by the record layer itself."""

    generation: int
    records: int
    limit: int | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUsage:
    """Use of the current keys of both directions."""

    tx: DirectionUsage
    rx: DirectionUsage


@final
class FloodBudget:
    """A token bucket that bounds records which cost us work and bring no data.

    KeyUpdates, tickets, warnings and empty records each take a token; application data and time give them back. So a peer that rekeys
    once in a while for weeks, or a thousand times in a row once, is honest, and one that does nothing else is not.
    (A fixed cap on a run of KeyUpdates, as other libraries have, breaks long-lived quiet connections.)
    """

    CAPACITY: Final = 2048.0
    #: Tokens that come back per second.
    PER_SECOND: Final = 16.0
    #: Bytes of application data that give back one token.
    OCTETS_PER_TOKEN: Final = 4096

    __slots__ = ("_now", "tokens")

    def __init__(self, now: float, tokens: float = CAPACITY) -> None:
        #: What is left.
        self.tokens = tokens
        self._now = now

    def earn(self, octets: int) -> None:
        """Credit ``octets`` bytes of application data received."""
        self.tokens = min(self.CAPACITY, self.tokens + octets / self.OCTETS_PER_TOKEN)

    def spend(self, now: float) -> bool:
        """Take one token; return False if there is none."""
        elapsed = max(0.0, now - self._now)
        self._now = max(self._now, now)
        self.tokens = min(self.CAPACITY, self.tokens + elapsed * self.PER_SECOND)
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True
