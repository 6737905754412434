"""``Settings.observer`` hears of handshakes, key changes and ends."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest

import ktls
from ktls.protocol.enums import Direction, KeyChangeCause

from ..support import TLS12, TLS13, has_rekey
from .helpers import Case

if TYPE_CHECKING:
    from .helpers import Net


class Notes:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[tuple[object, ...]] = []

    def handshake_completed(
        self, version: str, cipher: str, session_reused: bool, offload: ktls.Offload
    ) -> None:
        self.notes.append(("completed", version, cipher, session_reused, offload))

    def handshake_failed(self, error: BaseException) -> None:
        self.notes.append(("failed", type(error)))

    def key_changed(self, direction: Direction, cause: KeyChangeCause) -> None:
        self.notes.append(("key", direction, cause))

    def connection_ended(self, offload: ktls.Offload, error: BaseException | None) -> None:
        self.notes.append(("ended", offload, error))


@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_a_connection_from_its_beginning_to_its_end(net: Net, version: ssl.TLSVersion) -> None:
    notes = Notes()
    link = net.link(Case(version=version), settings=ktls.Settings(observer=notes))
    offload = link.ours.offload
    cipher = link.ours.cipher()
    assert cipher is not None
    link.ours.close()
    assert notes.notes == [
        ("completed", link.ours.version(), cipher[0], False, offload),
        ("ended", offload, None),
    ]


def test_a_handshake_that_fails(net: Net) -> None:
    notes = Notes()
    with pytest.raises(ssl.SSLCertVerificationError):
        net.link(
            context=ktls.create_default_context(cadata=None),
            settings=ktls.Settings(observer=notes),
        )
    assert notes.notes == [("failed", ssl.SSLCertVerificationError)]


def test_every_key_change_and_its_cause(net: Net) -> None:
    notes = Notes()
    settings = ktls.Settings(
        observer=notes,
        key_limits=ktls.KeyLimits(records=3),
        offload="auto" if has_rekey() else "userspace",
    )
    link = net.link(Case(peer="ktls"), settings=settings, changing_peer=True)
    link.ours.refresh_traffic_keys()
    link.theirs.refresh_traffic_keys(request_peer=True)
    link.theirs.sendall(b"x")
    assert link.ours.recv(1) == b"x"
    for _ in range(6):
        link.ours.sendall(b"y")
    keys = [note[1:] for note in notes.notes if note[0] == "key"]
    assert keys[:3] == [
        (Direction.TX, KeyChangeCause.APPLICATION),
        (Direction.RX, KeyChangeCause.PEER),
        (Direction.TX, KeyChangeCause.PEER_REQUEST),
    ]
    assert keys[3:]
    assert set(keys[3:]) <= {(Direction.TX, KeyChangeCause.LIMIT)}
