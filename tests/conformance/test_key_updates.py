"""KeyUpdate of TLS 1.3: from each side, crossing, split, joined, wrong."""

from __future__ import annotations

from ktls.protocol.enums import AlertDescription, HandshakeType

from ..peers.scripted import handshake_message
from .matrix import Row, behaviour, behaviours
from .scene import Scene

_GROUP = "KeyUpdate"
_FOLLOW = "follows; data goes both ways"


@behaviour(_GROUP, "updates its key, three times", _FOLLOW, versions=("1.3",))
def test_peer_updates(scene: Scene) -> None:
    if not scene.can_change_rx:
        scene.peer.send_update()
        scene.cannot_follow()
        return
    for number in range(1, 4):
        scene.peer.send_update()
        scene.both_ways()
        assert scene.generations() == (0, number)


_WRONG = (
    ("an update with request value 2", b"\x02", AlertDescription.ILLEGAL_PARAMETER),
    ("an update without a body", b"", AlertDescription.DECODE_ERROR),
)


@behaviours(
    *(
        Row(_GROUP, name, alert.name.lower(), versions=("1.3",), case=(body, alert))
        for name, body, alert in _WRONG
    )
)
def test_wrong_update(scene: Scene) -> None:
    body, alert = scene.cell.row.case
    scene.peer.send_handshake(handshake_message(HandshakeType.KEY_UPDATE, body))
    scene.refused(alert)
