"""A connection's state outside of a process: for whoever hands its descriptor to another one (``SCM_RIGHTS``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NoReturn, final

from ktls.handshake.handoff import OffloadPolicy
from ktls.handshake.result import PeerInfo
from ktls.record.snapshot import DriverSnapshot

from .serial import decode, encode

__all__ = ("ExportedState", "StateSnapshot")

_MAGIC: Final = b"ktls state\0"
#: To be raised whenever anything below ``StateSnapshot`` changes.
_VERSION: Final = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StateSnapshot:
    """What an ``ExportedState`` holds."""

    driver: DriverSnapshot
    version: str
    cipher: tuple[str, str, int]
    info: PeerInfo
    server_hostname: str | None
    tls_exporter: bytes | None = field(repr=False)
    offload: OffloadPolicy
    offload_reason: str | None
    shutdown_timeout: float
    suppress_ragged_eofs: bool


@final
class ExportedState:
    """Everything that another process needs to go on with a connection, beside the descriptor. **It is secret.**

    Whoever has it can read what comes from here on and send in our name, for as long as the connection lives: it holds the traffic secrets of both directions. Pass it over a channel that
    nobody else reads (a Unix socket pair), never through a file or a log; use it once.

    Opaque, and bound to the version of its format: both processes should run the same ``ktls``. It does not print and does not pickle; ``to_bytes`` is explicit.
    """

    __slots__ = ("_snapshot",)

    def __init__(self, snapshot: StateSnapshot) -> None:
        self._snapshot = snapshot

    def __repr__(self) -> str:
        return f"<ExportedState of a {self._snapshot.version} connection, redacted>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an ExportedState is secret: it is not pickled; use to_bytes()")

    @property
    def snapshot(self) -> StateSnapshot:
        """The contents, for ``ktls`` itself."""
        return self._snapshot

    def to_bytes(self) -> bytes:
        """Return it as bytes (a few KB, and what was read ahead). **They are secret.**"""
        return encode(_MAGIC, _VERSION, self._snapshot)

    @classmethod
    def from_bytes(cls, data: bytes) -> ExportedState:
        """Return the state that ``to_bytes`` made bytes of. ``ValueError`` if they are damaged, or of another version of the format."""
        try:
            return cls(decode(_MAGIC, _VERSION, StateSnapshot, bytes(data)))
        finally:
            del data  # tracebacks may show locals
