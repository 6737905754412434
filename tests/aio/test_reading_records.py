"""Records that are no data, amid those that are: KeyUpdates that ``poll`` does not show, tickets, empty records, ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ktls.protocol.enums import Role
from ktls.protocol.errors import TruncatedError

from ..sockets.helpers import Case, Net
from ..support import TLS12
from .deliveries import DATA, HANDSHAKE, finish, keepers
from .helpers import (
    KEY_UPDATE,
    TICKET,
    Keeper,
    Loop,
    connect,
    scripted,
    turns,
    until,
)

if TYPE_CHECKING:
    pass


def test_key_update_behind_data_in_one_segment(net: Net, one_of_each: Loop) -> None:
    """A kernel that has decrypted the KeyUpdate ahead, with the data in front of it, is deaf, and ``poll`` doesn't tell."""

    async def main() -> None:
        link = scripted(net)
        for turn in range(20):
            link.peer.send_raw(link.peer.seal(DATA, b"%d" % turn) + link.peer.seal_key_update())
            await until(lambda turn=turn: link.diary.data.endswith(b"%d" % turn))  # type: ignore[misc]  # mypy infers no lambda with a default
            link.peer.send_data(b"!")
            await until(lambda: link.diary.data.endswith(b"!"))
        assert link.transport.get_extra_info("ktls").key_usage.rx.generation == 20
        await finish(link)

    one_of_each.run(main)


@keepers
def test_key_update_behind_data_while_paused(net: Net, one_of_each: Loop, keeper: Any) -> None:
    async def main() -> None:
        link = scripted(net, keeper(on_data=lambda transport: transport.pause_reading()))
        link.peer.send_raw(link.peer.seal(DATA, b"a") + link.peer.seal_key_update())
        await until(lambda: link.diary.data == b"a")
        link.peer.send_data(b"b")
        await turns()
        link.transport.resume_reading()
        await until(lambda: link.diary.data == b"ab")
        link.transport.resume_reading()
        await finish(link)

    one_of_each.run(main)


def test_key_updates_in_a_row(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.peer.send_raw(b"".join(link.peer.seal_key_update() for _ in range(30)))
        link.peer.send_data(b"x")
        await until(lambda: link.diary.data == b"x")
        await finish(link)

    one_of_each.run(main)


def test_ticket_and_key_update_in_one_record(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, role=Role.CLIENT)
        link.peer.send_record(HANDSHAKE, TICKET + KEY_UPDATE)
        link.peer.next_tx_key()
        link.peer.send_data(b"x")
        await until(lambda: link.diary.data == b"x")
        link.peer.send_record(HANDSHAKE, TICKET + TICKET)
        link.peer.send_data(b"y")
        await until(lambda: link.diary.data == b"xy")
        await finish(link)

    one_of_each.run(main)


@pytest.mark.parametrize("cut", [1, 4])
def test_key_update_split_over_records(net: Net, one_of_each: Loop, cut: int) -> None:
    async def main() -> None:
        link = scripted(net)
        link.peer.send_raw(
            link.peer.seal(DATA, b"x")
            + link.peer.seal(HANDSHAKE, KEY_UPDATE[:cut])
            + link.peer.seal(HANDSHAKE, KEY_UPDATE[cut:])
        )
        link.peer.next_tx_key()
        link.peer.send_data(b"y")
        await until(lambda: link.diary.data == b"xy")
        await finish(link)

    one_of_each.run(main)


def test_empty_records(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.peer.send_record(DATA, b"")
        link.peer.send_record(DATA, b"", 100)
        await turns()
        assert link.diary.events == ["made"]
        link.peer.send_raw(link.peer.seal(DATA, b"") + link.peer.seal(DATA, b"x"))
        await until(lambda: link.diary.data == b"x")
        link.peer.send_record(DATA, b"")
        await finish(link)

    one_of_each.run(main)


def test_data_behind_close_notify_is_ignored(net: Net, one_of_each: Loop) -> None:
    """RFC 9846 §6.1: "Any data received after a closure alert has been received MUST be ignored"."""

    async def main() -> None:
        link = scripted(net, Keeper(keep_open=True))
        link.peer.send_data(b"x")
        link.peer.send_alert()
        link.peer.send_data(b"y")
        await until(lambda: "eof" in link.diary.events)
        await turns()
        assert link.diary.data == b"x"
        link.transport.close()
        assert await link.hear_data() == b""
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "data", "eof", "lost"]

    one_of_each.run(main)


def test_truncation_that_is_refused(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, suppress_ragged_eofs=False)
        link.peer.send_data(b"x")
        link.peer.end()
        await until(lambda: link.diary.lost)
        assert link.diary.events == ["made", "data", "lost"]
        assert isinstance(link.diary.error, TruncatedError)

    one_of_each.run(main)


def test_cut_inside_a_record(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.peer.send_data(b"x")
        link.peer.send_raw(link.peer.seal(DATA, bytes(100))[:50])
        link.peer.end()
        await until(lambda: link.diary.lost)
        assert link.diary.data == b"x"
        assert link.transport.get_extra_info("ktls").truncated

    one_of_each.run(main)


def test_data_that_came_with_the_handshake(net: Net, loop: Loop) -> None:
    """TLS 1.2 servers, and clients of TLS 1.3, may write as soon as their Finished is out: it is delivered after ``connection_made``."""

    async def main() -> None:
        case = Case(version=TLS12, role="client")
        order: list[str] = []
        link = await connect(
            net,
            loop,
            case,
            protocol=Keeper(
                on_made=lambda _: order.append("made"), on_data=lambda _: order.append("data")
            ),
        )
        link.theirs.sendall(b"first")
        await until(lambda: link.diary.data == b"first")
        assert order == ["made", "data"]
        link.transport.close()
        await until(lambda: link.diary.lost)

    loop.run(main)
