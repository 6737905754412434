"""KeyUpdate of TLS 1.3: ours, and both sides' at once."""

from __future__ import annotations

from typing import Final

import pytest

from ktls import LocalProtocolError

from ..peers.scripted import UPDATE, UPDATE_REQUESTED
from .matrix import Mark, behaviour
from .scene import Scene

_GROUP: Final = "KeyUpdate, ours"


def _ours(name: str, expected: str) -> Mark:
    return behaviour(_GROUP, name, expected, versions=("1.3",))


@_ours("reads only", "updates three times; data goes both ways")
def test_we_update(scene: Scene) -> None:
    if not scene.may_update():
        scene.both_ways()
        return
    for number in range(1, 4):
        scene.tls.refresh_traffic_keys()
        scene.peer.expect_update(UPDATE)
        scene.both_ways()
        assert scene.generations() == (number, 0)


@_ours("answers when asked for its key", "asks once at a time; follows")
def test_we_ask(scene: Scene) -> None:
    if not scene.may_update():
        scene.both_ways()
        return
    for number in (1, 2):
        scene.tls.refresh_traffic_keys(request_peer=True)
        scene.peer.expect_update(UPDATE_REQUESTED)
        # One request may be outstanding (RFC 9846 §4.7.3): the next is our own update only.
        scene.tls.refresh_traffic_keys(request_peer=True)
        scene.peer.expect_update(UPDATE)
        scene.peer.send_update()
        scene.both_ways()
        assert scene.generations() == (2 * number, number)


@_ours("never answers when asked for its key", "goes on, and does not ask again")
def test_no_answer(scene: Scene) -> None:
    if not scene.may_update():
        scene.both_ways()
        return
    scene.tls.refresh_traffic_keys(request_peer=True)
    scene.peer.expect_update(UPDATE_REQUESTED)
    for _ in range(3):
        scene.tls.refresh_traffic_keys(request_peer=True)
        scene.peer.expect_update(UPDATE)
        scene.both_ways()
    assert scene.generations() == (4, 0)


@_ours("updates at the same time, nobody asks", "follows; data goes both ways")
def test_updates_cross(scene: Scene) -> None:
    if not scene.may_update():
        scene.both_ways()
        return
    scene.peer.send_update()
    scene.tls.refresh_traffic_keys()
    scene.peer.expect_update(UPDATE)
    scene.both_ways()
    assert scene.generations() == (1, 1)


@_ours("asks for our key while we ask for its key", "answers, and takes the answer")
def test_requests_cross(scene: Scene) -> None:
    if not scene.may_update():
        scene.both_ways()
        return
    scene.peer.send_update(UPDATE_REQUESTED)
    scene.tls.refresh_traffic_keys(request_peer=True)
    scene.peer.send_data(b"x")
    scene.reads(b"x")
    scene.peer.expect_update(UPDATE_REQUESTED)
    scene.peer.expect_update(UPDATE)
    scene.peer.send_update()
    scene.both_ways()
    assert scene.generations() == (2, 2)


@behaviour(
    _GROUP, "speaks TLS 1.2", "can't update: `LocalProtocolError`; goes on", versions=("1.2",)
)
def test_we_update_in_tls12(scene: Scene) -> None:
    for _ in range(2):
        with pytest.raises(LocalProtocolError):
            scene.tls.refresh_traffic_keys()
        scene.both_ways()
