"""Changes of keys: ours, the peer's, both at once; by limits, and where the kernel can't."""

from __future__ import annotations

import ssl
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

import ktls
from ktls.protocol.enums import ContentType, Direction, KeyChangeCause
from ktls.protocol.errors import KeyLimitError, LocalProtocolError
from ktls.protocol.suites import MAX_FRAGMENT

from ..sockets.helpers import Case, Net, matrix, pattern, read_exactly
from ..support import TLS13, has_kernel_tls, has_rekey
from .helpers import (
    CLOSE_NOTIFY,
    KEY_UPDATE,
    KEY_UPDATE_REQUEST,
    TLS12_SUITE,
    Keeper,
    Loop,
    Scripted,
    connect,
    result,
    scripted,
    turns,
    until,
)

if TYPE_CHECKING:
    from ktls.handshake.handoff import Offload

DATA = ContentType.APPLICATION_DATA
APPLICATION = (Direction.TX, KeyChangeCause.APPLICATION)
REQUESTED = (Direction.TX, KeyChangeCause.PEER_REQUEST)
LIMIT = (Direction.TX, KeyChangeCause.LIMIT)
PEER = (Direction.RX, KeyChangeCause.PEER)

#: Our sending key can be changed: in user space, or by a kernel that can.
can_change = has_rekey() or not has_kernel_tls()
#: Where the kernel can't, these are for the layer that can.
LAYER: Any = {} if can_change else {"offload": "userspace"}
CHANGING: Any = "auto" if can_change else "userspace"


@dataclass
class Watcher:
    """An observer that keeps all it is told."""

    keys: list[tuple[Direction, KeyChangeCause]] = field(default_factory=list)
    begun: list[tuple[str, str, bool, Offload]] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)
    ended: list[tuple[Offload, BaseException | None]] = field(default_factory=list)

    def handshake_completed(
        self, version: str, cipher: str, session_reused: bool, offload: Offload
    ) -> None:
        self.begun.append((version, cipher, session_reused, offload))

    def handshake_failed(self, error: BaseException) -> None:
        self.failed.append(error)

    def key_changed(self, direction: Direction, cause: KeyChangeCause) -> None:
        self.keys.append((direction, cause))

    def connection_ended(self, offload: Offload, error: BaseException | None) -> None:
        self.ended.append((offload, error))


def info(link: Scripted) -> ktls.aio.KTLSObject:
    found: ktls.aio.KTLSObject = link.transport.get_extra_info("ktls")
    return found


def generations(link: Any) -> tuple[int, int]:
    """How often the keys have changed: sending, receiving."""
    usage = link.transport.get_extra_info("ktls").key_usage
    return usage.tx.generation, usage.rx.generation


async def finish(link: Scripted) -> None:
    link.transport.abort()
    await until(lambda: link.diary.lost)


# --- on demand -------------------------------------------------------------------------------------------------------


def test_our_key(net: Net, one_of_each: Loop) -> None:
    watcher = Watcher()

    async def main() -> None:
        link = scripted(net, observer=watcher, **LAYER)
        link.transport.write(b"old")
        info(link).refresh_traffic_keys()
        link.transport.write(b"new")
        assert await link.hear(3) == [(23, b"old"), (22, KEY_UPDATE), (23, b"new")]
        assert generations(link) == (1, 0)
        assert info(link).key_usage.tx.records == 1
        assert watcher.keys == [APPLICATION]
        await finish(link)

    one_of_each.run(main)


def test_two_hundred_in_a_row(net: Net, one_of_each: Loop) -> None:
    watcher = Watcher()

    async def main() -> None:
        link = scripted(net, observer=watcher, **LAYER)
        for number in range(200):
            info(link).refresh_traffic_keys()
            link.transport.write(b"%d" % number)
            link.peer.send_raw(link.peer.seal_key_update() + link.peer.seal(DATA, b"."))
        records = await link.hear(400)
        assert records[::2] == [(22, KEY_UPDATE)] * 200
        assert records[1::2] == [(23, b"%d" % number) for number in range(200)]
        await until(lambda: len(link.diary.data) == 200)
        assert generations(link) == (200, 200)
        assert watcher.keys.count(APPLICATION) == watcher.keys.count(PEER) == 200
        await finish(link)

    one_of_each.run(main)


def test_asking_the_peer(net: Net, one_of_each: Loop) -> None:
    watcher = Watcher()

    async def main() -> None:
        link = scripted(net, observer=watcher, **LAYER)
        info(link).refresh_traffic_keys(request_peer=True)
        assert await link.hear() == [(22, KEY_UPDATE_REQUEST)]
        link.peer.send_key_update()
        link.peer.send_data(b"x")
        await until(lambda: link.diary.data == b"x")
        assert watcher.keys == [APPLICATION, PEER]
        await finish(link)

    one_of_each.run(main)


def test_the_peer_asks(net: Net, one_of_each: Loop) -> None:
    watcher = Watcher()

    async def main() -> None:
        link = scripted(net, observer=watcher, **LAYER)
        link.peer.send_key_update(request=True)
        assert await link.hear() == [(22, KEY_UPDATE)]
        link.transport.write(b"new key")
        assert await link.hear() == [(23, b"new key")]
        assert sorted(watcher.keys, key=str) == sorted([REQUESTED, PEER], key=str)
        await finish(link)

    one_of_each.run(main)


def test_both_at_once(net: Net, one_of_each: Loop) -> None:
    """Requests that cross: each side answers the other's, and neither goes on for ever."""

    async def main() -> None:
        link = scripted(net, **LAYER)
        link.peer.send_key_update(request=True)
        info(link).refresh_traffic_keys(request_peer=True)
        records = await link.hear(2)
        assert sorted(records) == [(22, KEY_UPDATE), (22, KEY_UPDATE_REQUEST)]
        link.peer.send_key_update()
        link.peer.send_data(b"x")
        await until(lambda: link.diary.data == b"x")
        link.transport.write(b"y")
        assert await link.hear() == [(23, b"y")]
        assert generations(link) == (2, 2)
        await finish(link)

    one_of_each.run(main)


@pytest.mark.parametrize("case", matrix(versions=(TLS13,), peers=("ktls",)), ids=str)
def test_with_a_real_peer(net: Net, loop: Loop, case: Case) -> None:
    async def main() -> None:
        changing = Case(
            version=TLS13,
            role=case.role,
            peer="ktls",
            offload=case.offload if case.may_refresh else "userspace",
        )
        link = await connect(net, loop, changing, changing_peer=True)
        for turn in range(5):
            link.ktls.refresh_traffic_keys(request_peer=True)
            link.transport.write(b"ping%d" % turn)
            assert await result(net.spawn(read_exactly, link.theirs, 5)) == b"ping%d" % turn
            link.theirs.refresh_traffic_keys(request_peer=turn == 3)
            link.theirs.sendall(b"pong%d" % turn)
            await until(lambda turn=turn: link.diary.data.endswith(b"pong%d" % turn))  # type: ignore[misc]  # mypy infers no lambda with a default
        link.theirs.sendall(b"!")
        await until(lambda: link.diary.data.endswith(b"!"))
        assert generations(link) == (6, 10)
        link.transport.close()
        await until(lambda: link.diary.lost)

    loop.run(main)


# --- while TCP is full -----------------------------------------------------------------------------------------------


def test_while_tcp_is_full(net: Net, one_of_each: Loop) -> None:
    """The KeyUpdate waits in front of what is queued, and takes its key with it."""

    async def main() -> None:
        link = scripted(net, buffers=4096, **LAYER)
        data = pattern(1_000_000)
        link.transport.write(data)
        for _ in range(3):
            info(link).refresh_traffic_keys()
        link.transport.write(b"tail")
        link.peer.send_key_update(request=True)
        link.peer.send_data(b"reading goes on")
        await until(lambda: link.diary.data == b"reading goes on")
        received = await result(net.spawn(link.peer.read_data, len(data) + 4))
        assert received == data + b"tail"
        assert link.peer.rx_generation == 4
        await finish(link)

    one_of_each.run(main)


def test_nothing_but_a_key_update_waits(net: Net, one_of_each: Loop) -> None:
    """No data behind it to take it along."""

    async def main() -> None:
        link = scripted(net, buffers=4096, **LAYER)
        total = 0
        while link.transport.get_write_buffer_size() == 0:
            link.transport.write(bytes(1000))
            total += 1000
        info(link).refresh_traffic_keys()
        link.peer.send_key_update(request=True)
        assert await result(net.spawn(link.peer.read_data, total)) == bytes(total)
        await until(lambda: generations(link) == (2, 1))
        link.transport.write(b"x")
        assert (await link.hear(3 - link.peer.rx_generation))[-1] == (23, b"x")
        await finish(link)

    one_of_each.run(main)


def test_close_behind_a_key_update(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, buffers=4096, **LAYER)
        data = pattern(100_000)
        link.transport.write(data)
        info(link).refresh_traffic_keys()
        link.transport.close()
        link.peer.send_key_update(request=True)
        messages, whole = await result(net.spawn(link.peer.read_all))
        assert whole
        assert messages[-1].fragment == CLOSE_NOTIFY
        assert b"".join(m.fragment for m in messages if m.content_type == DATA) == data
        await until(lambda: link.diary.lost)
        assert link.diary.error is None

    one_of_each.run(main)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_limit_over_a_large_write(net: Net, one_of_each: Loop) -> None:
    watcher = Watcher()

    async def main() -> None:
        limits = ktls.KeyLimits(records=20)
        link = scripted(net, key_limits=limits, observer=watcher, **LAYER)
        data = pattern(100 * MAX_FRAGMENT)
        link.transport.write(data)
        assert await result(net.spawn(link.peer.read_data, len(data))) == data
        assert 4 <= link.peer.rx_generation <= 10
        assert set(watcher.keys) == {LIMIT}
        assert info(link).key_usage.tx.limit == 20
        assert info(link).key_usage.tx.records <= 20
        await finish(link)

    one_of_each.run(main)


def test_limit_over_sendfile(net: Net, loop: Loop) -> None:
    async def main() -> None:
        case = Case(peer="ktls", offload=CHANGING)
        settings = ktls.Settings(key_limits=ktls.KeyLimits(records=20), offload=CHANGING)
        link = await connect(net, loop, case, changing_peer=True, settings=settings)
        data = pattern(200 * MAX_FRAGMENT)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            reading = net.spawn(read_exactly, link.theirs, len(data))
            assert await loop.sendfile(link.transport, file) == len(data)
        assert await result(reading) == data
        assert generations(link)[0] >= 9
        link.transport.close()
        await until(lambda: link.diary.lost)

    loop.run(main)


def test_limit_that_can_not_be_met(net: Net, one_of_each: Loop) -> None:
    """TLS 1.2 has no KeyUpdate: the sending side is closed in order, and the protocol told why."""

    async def main() -> None:
        limits = ktls.KeyLimits(records=10)
        link = scripted(net, suite=TLS12_SUITE, key_limits=limits)
        for _ in range(20):
            link.transport.write(b"x")
        records = await link.hear_all()
        assert records == [(23, b"x")] * 10 + [(21, CLOSE_NOTIFY)]
        await until(lambda: link.diary.lost)
        assert isinstance(link.diary.error, KeyLimitError)

    one_of_each.run(main)


# --- where it can't be done ------------------------------------------------------------------------------------------


def test_no_key_update_in_tls12(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net, suite=TLS12_SUITE)
        with pytest.raises(LocalProtocolError):
            info(link).refresh_traffic_keys()
        link.transport.write(b"x")
        assert await link.hear() == [(23, b"x")]
        await finish(link)

    one_of_each.run(main)


def test_no_key_update_after_the_end(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        link.transport.write_eof()
        with pytest.raises(LocalProtocolError):
            info(link).refresh_traffic_keys()
        await finish(link)
        with pytest.raises(ValueError, match="ended"):
            info(link).refresh_traffic_keys()

    one_of_each.run(main)


@pytest.mark.norekey
def test_kernel_that_can_not(net: Net, one_of_each: Loop) -> None:
    async def main() -> None:
        link = scripted(net)
        assert (info(link).offload.tx, info(link).offload.rx) == ("kernel", "userspace")
        with pytest.raises(LocalProtocolError):
            info(link).refresh_traffic_keys()
        link.transport.write(b"x")
        assert await link.hear() == [(23, b"x")]
        # Its own key the peer may change, as receiving is done in this process.
        link.peer.send_raw(link.peer.seal_key_update() + link.peer.seal(DATA, b"y"))
        await until(lambda: link.diary.data == b"y")
        await finish(link)

    one_of_each.run(main)


@pytest.mark.norekey
def test_demand_that_the_kernel_can_not_meet(net: Net, one_of_each: Loop) -> None:
    """The peer wants us to change our key: it may be used no more, so the next write ends the connection, in order."""

    async def main() -> None:
        link = scripted(net)
        link.peer.send_key_update(request=True)
        link.peer.send_data(b"still heard")
        await until(lambda: link.diary.data == b"still heard")
        link.transport.write(b"never")
        assert await link.hear_all() == [(21, CLOSE_NOTIFY)]
        await until(lambda: link.diary.lost)
        assert isinstance(link.diary.error, KeyLimitError)

    one_of_each.run(main)


# --- what is told ----------------------------------------------------------------------------------------------------


def trusting_nobody() -> ssl.SSLContext:
    """A client that trusts nobody."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def test_observer(net: Net, loop: Loop, case: Case) -> None:
    watcher = Watcher()

    async def main() -> None:
        settings = ktls.Settings(observer=watcher, offload=case.offload)
        link = await connect(net, loop, case, settings=settings)
        (begun,) = watcher.begun
        assert begun == (link.ktls.version(), link.ktls.cipher()[0], False, link.ktls.offload)  # type: ignore[index]  # after a handshake it is no None
        offload = link.ktls.offload
        link.transport.abort()
        await until(lambda: link.diary.lost)
        assert watcher.ended == [(offload, None)]
        assert not watcher.failed
        strangers = trusting_nobody()
        with pytest.raises(ssl.SSLError) as caught:
            await connect(net, loop, Case(peer="stdlib"), context=strangers, settings=settings)
        assert watcher.failed == [caught.value]
        assert len(watcher.begun) == len(watcher.ended) == 1

    loop.run(main)


def test_observer_of_a_lost_connection(net: Net, one_of_each: Loop) -> None:
    watcher = Watcher()

    async def main() -> None:
        link = scripted(net, observer=watcher)
        link.transport.pause_reading()
        link.peer.reset()
        link.transport.resume_reading()
        await until(lambda: link.diary.lost)
        ((_, error),) = watcher.ended
        assert error is link.diary.error
        assert isinstance(error, ConnectionResetError)

    one_of_each.run(main)


def test_usage(net: Net, one_of_each: Loop) -> None:
    """Exact, whatever made the records; until the connection has ended."""

    async def main() -> None:
        link = scripted(net)
        usage = info(link).key_usage
        assert (usage.tx.records, usage.rx.records) == (0, 0)
        link.transport.write(bytes(3 * MAX_FRAGMENT))
        link.transport.writelines([b"a", b"b"])
        link.peer.send_data(b"x")
        link.peer.send_data(b"y")
        await until(lambda: link.diary.data == b"xy")
        usage = info(link).key_usage
        assert (usage.tx.records, usage.rx.records) == (4, 2)
        link.transport.close()
        await turns()
        await link.hear(5)
        await until(lambda: link.diary.lost)
        with pytest.raises(ValueError, match="ended"):
            _ = info(link).key_usage
        assert isinstance(info(link).offload, ktls.Offload)

    one_of_each.run(main)


def test_keys_of_a_paused_connection(net: Net, one_of_each: Loop) -> None:
    """Nobody reads, so nobody answers; after the pause all is as it should be."""

    async def main() -> None:
        link = scripted(net, Keeper(), **LAYER)
        link.transport.pause_reading()
        for _ in range(3):
            link.peer.send_key_update(request=True)
        link.peer.send_data(b"x")
        await turns(20)
        link.transport.resume_reading()
        await until(lambda: link.diary.data == b"x")
        link.transport.write(b"y")
        records = await link.hear()
        while records[-1] != (23, b"y"):
            records += await link.hear()
        assert 1 <= len(records) - 1 <= 3  # one answer may do for several requests
        await finish(link)

    one_of_each.run(main)
