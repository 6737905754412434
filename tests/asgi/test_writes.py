"""How many writes a response takes, seen at the transport; and what the cork does with what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

import ktls.asgi
from ktls.asgi.cork import Cork

from .helpers import App, body, pathsend, request, sends, start


class FakeTransport(asyncio.Transport):
    """Remembers what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.ended = ""

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.writes.append(b"".join(list_of_data))

    def write_eof(self) -> None:
        self.writes.append(b"EOF")

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def answer(app: App, check: Callable[[FakeTransport], None], asked: bytes = request()) -> None:
    """Let ``app`` answer one request on a fake transport, and look at that."""

    async def main() -> None:
        config = uvicorn.Config(app, interface="asgi3", log_config=None)
        state = ServerState()
        state.default_headers = []
        protocol = ktls.asgi.PathSendProtocol(config, state, {})
        transport = FakeTransport()
        protocol.connection_made(transport)
        protocol.data_received(asked)
        await asyncio.gather(*state.tasks)
        await settle()
        check(transport)
        protocol.connection_lost(None)

    asyncio.run(main())


def writes(*sizes: int) -> Callable[[FakeTransport], None]:
    """Check the sizes of all writes but the first, which has the head, and is that much longer."""

    def check(transport: FakeTransport) -> None:
        head, separator, first = transport.writes[0].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert separator
        assert [len(first), *map(len, transport.writes[1:])] == list(sizes)

    return check


def test_a_small_file_goes_out_with_its_head(small: Path) -> None:
    answer(sends(start(5000), pathsend(small)), writes(5000))


def test_a_small_file_in_a_chunk_goes_out_with_its_head_and_its_end(small: Path) -> None:
    answer(sends(start(), pathsend(small)), writes(len(b"1388\r\n") + 5000 + len(b"\r\n0\r\n\r\n")))


def test_a_body_goes_out_with_its_head() -> None:
    answer(sends(start(3), body(b"abc")), writes(3))


def test_a_record_is_the_limit(tmp_path: Path) -> None:
    def check(transport: FakeTransport) -> None:
        assert [len(written) for written in transport.writes] == [16 * 1024]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = tmp_path / scope["path"].strip("/")
        await sends(start(path.stat().st_size), pathsend(path))(scope, receive, send)

    head = len(b"HTTP/1.1 200 OK\r\ncontent-length: 16000\r\n\r\n")
    (tmp_path / "fits").write_bytes(bytes(16 * 1024 - head))
    answer(app, check, request(path="/fits"))

    def check_bigger(transport: FakeTransport) -> None:
        assert len(transport.writes[0]) == head

    (tmp_path / "bigger").write_bytes(bytes(16 * 1024 - head + 1))
    answer(app, check_bigger, request(path="/bigger"))


def test_a_head_waits_no_longer_than_a_turn_of_the_loop() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await settle()
        await send(body(b"event", more_body=True))
        await settle()
        await send(body(b"event"))

    answer(app, writes(0, len(b"5\r\nevent\r\n"), len(b"5\r\nevent\r\n0\r\n\r\n")))


def test_a_head_alone_is_sent_for_head() -> None:
    answer(sends(start(5), body()), writes(0), request("HEAD"))


def test_a_head_is_sent_before_the_connection_is_closed() -> None:
    def check(transport: FakeTransport) -> None:
        writes(0)(transport)
        assert transport.ended == "closed"

    answer(sends(start(5), body()), check, request("HEAD", "/", "Connection: close"))


def test_a_header_that_is_refused_leaves_nothing_held(caplog: pytest.LogCaptureFixture) -> None:
    def check(transport: FakeTransport) -> None:
        assert transport.writes == []
        assert transport.ended == "closed"

    answer(sends(start(None, 200, (b"x", b"\n"))), check)
    assert "Invalid HTTP header value" in caplog.text


def on_a_cork(act: Callable[[Cork], object]) -> FakeTransport:
    """Run ``act`` in a loop, and one turn of that more."""
    transport = FakeTransport()

    async def main() -> None:
        act(Cork(transport))
        await asyncio.sleep(0)

    asyncio.run(main())
    return transport


def test_an_abort_drops_what_is_held() -> None:
    def act(cork: Cork) -> None:
        with cork.holding():
            cork.write(b"head")
        assert cork.held == 4
        cork.abort()

    transport = on_a_cork(act)
    assert (transport.writes, transport.ended) == ([], "aborted")


def test_what_is_held_keeps_its_place() -> None:
    def act(cork: Cork) -> None:
        cork.write(b"before ")
        with cork.holding():
            cork.write(b"one ")
            cork.write(b"two ")
        cork.write(b"")
        cork.write(b"three ")
        cork.write(b"after ")
        with cork.holding():
            cork.write(b"end")

    transport = on_a_cork(act)
    assert transport.writes == [b"before ", b"one two three ", b"after ", b"end"]


def test_lines_and_ends_keep_theirs_too() -> None:
    def act(cork: Cork) -> None:
        with cork.holding():
            cork.writelines([b"one ", b"two "])
        cork.writelines([b"three ", b"four "])
        cork.writelines([b"five ", b"six "])
        with cork.holding():
            cork.write(b"seven")
        cork.write_eof()

    transport = on_a_cork(act)
    assert transport.writes == [b"one two three four ", b"five six ", b"seven", b"EOF"]
