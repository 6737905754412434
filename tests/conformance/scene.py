"""One connection of the matrix: our end, the scripted peer, and what most behaviours check."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

import ktls
from ktls import AlertReceived, KeyLimitError, LocalProtocolError, RemoteProtocolError
from ktls.handshake.handoff import OffloadPolicy
from ktls.protocol.enums import AlertDescription

from ..peers.parties import KernelCounters, Pki, read_exactly
from ..peers.peers import Peers
from ..peers.scripted import ScriptedPeer, meet
from .matrix import KERNEL, Cell, Layer

#: With ``offload="kernel"`` on a kernel without rekey, which nobody gets by default.
NO_REKEY: Final = (
    'This kernel can\'t change a receiving key, and the user demanded `offload="kernel"`:'
    " reading ends with `KeyLimitError`."
)
NO_TX_REKEY: Final = (
    "This kernel can't change a sending key, so the answer that must precede our next data can't be given: we send `close_notify` in its place,"
    " sending raises `KeyLimitError`, and reading goes on."
)
NO_OWN_UPDATE: Final = "This kernel can't change a sending key: `refresh_traffic_keys` raises `LocalProtocolError`, and the connection goes on."
#: Where the directions are: sending, receiving.
DIRECTIONS: Final = {
    "kernel": ("kernel", "kernel"),
    "mixed": ("kernel", "userspace"),
    "userspace": ("userspace", "userspace"),
    "engine": ("engine", "engine"),
}


def policy_for(layer: Layer, version: str) -> OffloadPolicy:
    """What a context is told so that its connections use ``layer``. The default, wherever it does."""
    if layer == "userspace":
        return "userspace"
    if layer == "kernel" and KERNEL == "norekey" and version == "1.3":
        return "kernel"  # by default only sending is in the kernel
    return "auto"


class CellPki(Pki):
    """Certificates, and our contexts for one layer at a time. Contexts are kept: they are slow to make."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.cell: Cell | None = None
        self._contexts: dict[tuple[bool, object, str | None, OffloadPolicy], ktls.SSLContext] = {}

    def server(
        self, version: ssl.TLSVersion | None = None, ciphers: str | None = None
    ) -> ktls.SSLContext:
        return self._context(True, version, ciphers)

    def client(
        self, version: ssl.TLSVersion | None = None, ciphers: str | None = None
    ) -> ktls.SSLContext:
        return self._context(False, version, ciphers)

    def _context(
        self, is_server: bool, version: ssl.TLSVersion | None, ciphers: str | None
    ) -> ktls.SSLContext:
        assert self.cell is not None
        policy = policy_for(self.cell.layer, self.cell.version)
        key = is_server, version, ciphers, policy
        if key not in self._contexts:
            make = super().server if is_server else super().client
            self._contexts[key] = make(version, ciphers)
            self._contexts[key].offload = policy
        return self._contexts[key]


class CellCounters(KernelCounters):
    """Holds every connection to the layer of its cell, in both directions."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self._cell = cell

    def established(self, tls: ktls.KTLSSocket, *, small_records: bool = False) -> None:
        """See ``KernelCounters``."""
        offload = tls.offload
        assert (offload.tx, offload.rx) == DIRECTIONS[self._cell.layer], offload
        assert (offload.reason is None) == (offload.tx == offload.rx == "kernel")
        self._tx += offload.tx == "kernel"
        self._rx += offload.rx == "kernel"


@dataclass
class OurEnd:
    """Our end of a connection of ``cell``, whoever is at the other."""

    cell: Cell
    tls: ktls.KTLSSocket
    peers: Peers
    #: Say why this layer does something else than the row says. The test asserts what it does.
    differs: Callable[[str], None]

    @property
    def rx_in_kernel(self) -> bool:
        return self.cell.layer == "kernel"

    @property
    def can_change_tx(self) -> bool:
        """Whether our sending key can change."""
        return self.cell.version == "1.3" and (self.cell.layer == "userspace" or KERNEL == "rekey")

    @property
    def can_change_rx(self) -> bool:
        """Whether we can follow the peer to another key."""
        return self.cell.version == "1.3" and not (KERNEL == "norekey" and self.rx_in_kernel)

    def may_fail_to_decrypt(self) -> None:
        """The peer will send a record that the kernel can't open: its counter of those may grow."""
        self.peers.counters.may_fail_to_decrypt = True

    def generations(self) -> tuple[int, int]:
        """Generations of the keys in use: sending, receiving."""
        usage = self.tls.key_usage
        return usage.tx.generation, usage.rx.generation

    def cannot_follow(self) -> None:
        """The peer changed its key, and this kernel can't: reading ends with an error that says so."""
        self.differs(NO_REKEY)
        self.may_fail_to_decrypt()
        for _ in range(2):
            with pytest.raises(KeyLimitError):
                self.tls.recv(100)

    def may_update(self) -> bool:
        """Whether we can change our key at all; if not, asking for it changes nothing."""
        if self.can_change_tx:
            return True
        self.differs(NO_OWN_UPDATE)
        for request_peer in (False, True):
            with pytest.raises(LocalProtocolError):
                self.tls.refresh_traffic_keys(request_peer)
        assert self.generations() == (0, 0)
        return False


@dataclass
class Scene(OurEnd):
    """A connection of ``cell`` with a scripted peer. A server may have sent tickets, which ``peer`` passes over."""

    peer: ScriptedPeer

    @classmethod
    def open(cls, cell: Cell, peers: Peers, differs: Callable[[str], None]) -> Scene:
        """Shake hands with a scripted peer. ``TruncatedError`` is raised, not hidden, at an end without close_notify."""
        meeting = meet(peers, cell.role, cell.tls_version, cell.suite)
        return cls(cell, meeting.tls, peers, differs, meeting.peer)

    # --- what most behaviours check ----------------------------------------------------------------------------

    def both_ways(self, text: bytes = b"still here") -> None:
        """Data goes through in both directions, under the keys that both ends have now."""
        self.peer.send_data(text)
        self.reads(text)
        self.tls.sendall(text)
        self.peer.expect_data(text)

    def reads(self, text: bytes) -> None:
        """``text`` is what comes next, and was sent already."""
        assert read_exactly(self.tls, len(text)) == text

    def refused(
        self,
        alert: AlertDescription,
        *,
        in_kernel: AlertDescription | None = None,
        why: str = "",
        silent: bool = False,
    ) -> None:
        """What the peer sent is refused with ``alert``: for good, in both directions, and the peer is told.

        ``in_kernel``, ``why``: the alert where the kernel receives, if that is another, and the reason for it.
        ``silent``: the peer is not looked at (it sent what makes TCP reset).
        """
        expected = alert
        if in_kernel is not None and self.rx_in_kernel:
            self.differs(why)
            expected = in_kernel
        with pytest.raises(RemoteProtocolError) as caught:
            self.tls.recv(100)
        error = caught.value
        assert error.alert.name == expected.name
        assert not error.recoverable
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as again:
                self.tls.recv(100)
            assert (again.value.alert, str(again.value)) == (error.alert, str(error))
            with pytest.raises(RemoteProtocolError) as sending:
                self.tls.send(b"no")
            assert sending.value.alert == error.alert
        with pytest.raises(LocalProtocolError):
            self.tls.refresh_traffic_keys()
        if not silent:
            self.peer.expect_alert(expected)
        self.tls.close()
        if not silent:
            self.peer.expect_fin()

    def alert_received(self, description: int) -> None:
        """Reading says that the peer's alert ended the connection."""
        with pytest.raises(AlertReceived) as caught:
            self.tls.recv(10)
        assert caught.value.description == description
        assert not caught.value.recoverable

    def ended_by_alert(self, description: int) -> None:
        """The peer's alert ended the connection: we say which it was, in both directions, for ever, and answer nothing."""
        for _ in range(2):
            self.alert_received(description)
            with pytest.raises(AlertReceived):
                self.tls.send(b"no")
        with pytest.raises(LocalProtocolError):
            self.tls.refresh_traffic_keys()
        self.tls.close()
        self.peer.expect_fin()

    def closes(self) -> None:
        """We close in order: close_notify, then FIN."""
        self.tls.close()
        self.peer.expect_alert(AlertDescription.CLOSE_NOTIFY)
        self.peer.expect_fin()


def make_peers(cell: Cell, pki: CellPki, stack: ExitStack) -> Peers:
    """The desk for the peers of one cell."""
    pki.cell = cell
    return Peers(pki, CellCounters(cell), stack)
