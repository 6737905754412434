"""What may follow from something that the peer does, and a table of such things: which outcome, and where the kernel has another.

An outcome asserts all that can be seen: what our reads and sends do, each time they are tried again, what the peer gets, and how the connection closes.
"""

from __future__ import annotations

import socket
import ssl
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, final

import pytest

import ktls
from ktls import LocalProtocolError, TruncatedError
from ktls.protocol.enums import AlertDescription

from ..peers.peers import Role
from .matrix import ROLES, VERSIONS, Row, Version
from .scene import Scene

__all__ = (
    "BAD_MAC",
    "OVERFLOW",
    "UNEXPECTED",
    "VERSION",
    "Alerted",
    "Closed",
    "Event",
    "GoesOn",
    "Outcome",
    "Refused",
    "Reset",
    "Truncated",
    "fin",
    "play",
    "reset",
    "rows",
    "sends",
    "short_timeout",
)

#: How often the same question has to get the same answer.
_AGAIN: Final = 3
#: Seconds after which it is plain that nothing comes: everything that was sent is here already.
_SOON: Final = 0.02


class Outcome(ABC):
    """What follows. ``data`` is what is received before that."""

    data: bytes

    @property
    @abstractmethod
    def text(self) -> str:
        """For the document."""

    @abstractmethod
    def check(self, scene: Scene) -> None:
        """Assert it."""


@final
@dataclass(frozen=True)
class Refused(Outcome):
    """We end the connection with an alert."""

    alert: AlertDescription
    data: bytes = b""

    @property
    def text(self) -> str:
        return self.alert.name.lower()

    def check(self, scene: Scene) -> None:
        scene.reads(self.data)
        scene.refused(self.alert)


@final
@dataclass(frozen=True)
class Alerted(Outcome):
    """The peer's alert has ended the connection."""

    description: AlertDescription
    data: bytes = b""

    @property
    def text(self) -> str:
        return "the alert is reported"

    def check(self, scene: Scene) -> None:
        scene.reads(self.data)
        scene.ended_by_alert(self.description)


@final
@dataclass(frozen=True)
class GoesOn(Outcome):
    """Nothing but this data comes of it, and the connection goes on as if nothing had been."""

    data: bytes = b""
    text: str = "goes on"

    def check(self, scene: Scene) -> None:
        scene.reads(self.data)
        scene.both_ways()
        scene.peer.close_notify()
        assert scene.tls.recv(100) == b""


@final
@dataclass(frozen=True)
class Closed(Outcome):
    """The peer has closed its direction in order. Ours is still open in TLS 1.3, and closed at once in TLS 1.2."""

    data: bytes = b""
    text: str = "a clean end; TLS 1.3 can go on sending, TLS 1.2 answers"

    def check(self, scene: Scene) -> None:
        scene.reads(self.data)
        for _ in range(_AGAIN):
            assert scene.tls.recv(100) == b""
        if scene.cell.version == "1.3":
            sends(scene)
            assert scene.tls.recv(100) == b""
            scene.closes()
            return
        scene.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
        for _ in range(_AGAIN):
            with pytest.raises(LocalProtocolError):
                scene.tls.send(b"no")
        scene.tls.close()
        scene.peer.expect_fin()


@final
@dataclass(frozen=True)
class Truncated(Outcome):
    """TCP has ended, TLS has not: what was read is authentic, and may not be all. We can go on sending."""

    data: bytes = b""
    text: str = "`TruncatedError`; sending goes on"

    def check(self, scene: Scene) -> None:
        scene.reads(self.data)
        for _ in range(_AGAIN):
            with pytest.raises(TruncatedError) as caught:
                scene.tls.recv(100)
            assert isinstance(caught.value, ssl.SSLEOFError)
        sends(scene)
        with pytest.raises(TruncatedError):
            scene.tls.recv(100)
        scene.closes()


@final
@dataclass(frozen=True)
class Reset(Outcome):
    """TCP was reset: what had come is read, then nothing works any more."""

    data: bytes = b""
    text: str = "what came is read, then `ConnectionResetError` for ever"

    def check(self, scene: Scene) -> None:
        scene.reads(self.data)
        for _ in range(_AGAIN):
            with pytest.raises(ConnectionResetError):
                scene.tls.recv(100)
            with pytest.raises(ConnectionError):
                scene.tls.send(b"no")
        scene.tls.close()


def fin(scene: Scene) -> None:
    """The peer's TCP says that nothing more comes; it still reads."""
    scene.peer.sock.shutdown(socket.SHUT_WR)


def reset(scene: Scene) -> None:
    """The peer's TCP resets the connection."""
    scene.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    scene.peer.sock.close()


@contextmanager
def short_timeout(tls: ktls.KTLSSocket) -> Iterator[None]:
    """Let waiting end soon, for tests in which nothing comes."""
    patience = tls.gettimeout()
    tls.settimeout(_SOON)
    try:
        yield
    finally:
        tls.settimeout(patience)


def sends(scene: Scene, text: bytes = b"one more") -> None:
    """Our direction is open."""
    scene.tls.sendall(text)
    scene.peer.expect_data(text)


UNEXPECTED: Final = Refused(AlertDescription.UNEXPECTED_MESSAGE)
BAD_MAC: Final = Refused(AlertDescription.BAD_RECORD_MAC)
OVERFLOW: Final = Refused(AlertDescription.RECORD_OVERFLOW)
VERSION: Final = Refused(AlertDescription.PROTOCOL_VERSION)


@dataclass(frozen=True)
class Event:
    """Something that a peer does, and what follows."""

    name: str
    do: Callable[[Scene], None]
    outcome: Outcome
    #: What follows where the kernel opens the records, if that is something else, and why it is.
    in_kernel: Outcome | None = None
    why: str = ""
    versions: tuple[Version, ...] = VERSIONS
    roles: tuple[Role, ...] = ROLES
    #: Whether a kernel that receives counts a record that it could not open.
    undecryptable: bool = False
    #: Whether the peer changes its key.
    updates: bool = False
    #: As in ``Row``.
    many: bool = False


def rows(group: str, *events: Event) -> Iterator[Row]:
    """The rows of the matrix for ``events``."""
    for event in events:
        assert (event.in_kernel is None) == (event.why == "")
        yield Row(
            group,
            event.name,
            event.outcome.text,
            versions=event.versions,
            roles=event.roles,
            many=event.many,
            case=event,
        )


def play(scene: Scene) -> None:
    """Let the event of the cell happen, behind data that was good, and check what follows."""
    event: Event = scene.cell.row.case
    scene.peer.send_data(b"this was good")
    scene.reads(b"this was good")
    if scene.rx_in_kernel and (event.undecryptable or event.in_kernel is not None):
        scene.may_fail_to_decrypt()
    event.do(scene)
    if event.updates and not scene.can_change_rx:
        scene.cannot_follow()
        return
    if scene.rx_in_kernel and event.in_kernel is not None:
        scene.differs(event.why)
        event.in_kernel.check(scene)
    else:
        event.outcome.check(scene)
    if scene.rx_in_kernel and event.undecryptable:
        assert scene.peers.counters.grown("TlsDecryptError") > 0
