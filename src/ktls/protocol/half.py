"""What a connection keeps of each direction."""

from __future__ import annotations

from typing import final

from .key_schedule import TrafficSecret
from .states import HalfState

__all__ = ("Half",)


@final
class Half:
    """State of one direction: its half machine, its secret (None in TLS 1.2) and when its key came into use.

    ``installed`` is the generation that the record layer uses, which may be behind ``generation``.
    """

    __slots__ = ("generation", "installed", "label", "secret", "since", "state")

    def __init__(self, secret: TrafficSecret | None, label: str, now: float) -> None:
        self.state = HalfState.OPEN
        self.secret = secret
        self.generation = self.installed = secret.generation if secret is not None else 0
        self.label = label
        self.since = now
