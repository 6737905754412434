"""What client and server of the soak agree on: the bytes, the header of a round, sending and receiving with account kept.

Every stream of a round is a piece of one endless pattern, so that any byte that is lost, repeated or out of place shows at once, at its place.
A connection has rounds. A round has a header from the client, ``up`` bytes of the client's and ``down`` bytes of the server's, and an end: the client's acknowledgement, or (the last round only) both
sides' close_notify.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import ktls.aio
from ktls.protocol.errors import LocalProtocolError

__all__ = (
    "ACK",
    "ACKNOWLEDGED",
    "DUPLEX",
    "ECHO",
    "HALF_CLOSED",
    "HEADER_SIZE",
    "SEQUENTIAL",
    "Account",
    "End",
    "Header",
    "Line",
    "Mismatch",
    "make_file",
    "together",
)

#: How the streams of a round depend on each other.
ECHO, SEQUENTIAL, DUPLEX = range(3)
#: How a round ends.
ACKNOWLEDGED, HALF_CLOSED = range(2)
ACK: Final = b"K"

_FORMAT: Final = struct.Struct("!QBBIIIHB")
HEADER_SIZE: Final = _FORMAT.size
_PATTERN_SIZE: Final = 1 << 20
#: Twice, so that a piece may begin anywhere.
_PATTERN: Final = memoryview(random.Random(0).randbytes(_PATTERN_SIZE) * 2)
_PIECES: Final = (1, 37, 1_000, 16_384, 16_385, 65_536)


class Mismatch(AssertionError):
    """A byte that was not sent, or not here."""


class End(Exception):
    """The stream ended too early. ``clean``: with close_notify."""

    def __init__(self, clean: bool) -> None:
        super().__init__(f"early end, {'with' if clean else 'without'} close_notify")
        self.clean = clean


class Header(NamedTuple):
    """Begins a round. ``start``: where in the pattern; ``cancel``: milliseconds until the server cancels its handler, or 0; ``style``, the server's: 1: changes keys, 2: sends files, 4: reads slowly."""

    connection: int
    mode: int
    ending: int
    up: int
    down: int
    start: int
    cancel: int
    style: int

    def encode(self) -> bytes:
        return _FORMAT.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        return cls._make(_FORMAT.unpack(data))


@dataclass
class Account:
    """What one side knows of a connection at its end."""

    rounds: int = 0
    written: int = 0
    received: int = 0
    #: How the other direction ended: ``clean``, ``truncated``, or (an error, or we did not wait) None.
    end: str | None = None
    #: Whether we have ended our direction in order: what was written has to arrive.
    goodbye: bool = False
    #: Whether we closed in order, and were told that everything has arrived.
    closed: bool = False
    #: Disturbed on purpose, by this side or by agreement.
    disturbed: bool = False
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_file(path: Path) -> None:
    """Write the pattern down, for ``sendfile``."""
    path.write_bytes(_PATTERN)


@dataclass
class Line:
    """One side of a connection, with its account."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    rng: random.Random
    file: Path
    may_refresh: bool
    may_request: bool
    account: Account = field(default_factory=Account)
    #: Seconds between two reads.
    slowness: float = 0.0

    @property
    def ktls(self) -> Any:
        """The connection's ``KTLSObject``; None where it is a stranger's."""
        return self.writer.get_extra_info("ktls")

    # --- receiving -------------------------------------------------------------------------------------------------

    async def exactly(self, count: int) -> bytes:
        """Read that much; ``End`` if there is nothing at all or not enough."""
        data = b""
        while len(data) < count:
            data += await self._read(count - len(data))
        return data

    async def _read(self, limit: int) -> bytes:
        data = await self.reader.read(limit)
        if not data:
            facts = self.ktls
            clean = facts is not None and not facts.truncated
            self.account.end = "unknown" if facts is None else "clean" if clean else "truncated"
            raise End(clean)
        self.account.received += len(data)
        return data

    async def pieces(self, start: int, size: int) -> AsyncIterator[bytes]:
        """Receive ``size`` bytes of the pattern; each piece is checked."""
        at = 0
        while at < size:
            data = await self._read(min(size - at, self.rng.choice((1_000, 16_384, 65_536))))
            if data != _piece(start + at, len(data)):
                raise Mismatch(f"at {at} of {size}, {len(data)} bytes")
            at += len(data)
            yield data
            if self.slowness:
                await asyncio.sleep(self.slowness * self.rng.random())

    async def receive(self, start: int, size: int, *, end: bool = False) -> None:
        """Receive ``size`` bytes, and close_notify with ``end``."""
        async for _ in self.pieces(start, size):
            self.maybe_refresh()
        if end:
            await self.expect_end()

    async def expect_end(self) -> None:
        """Nothing more, and close_notify."""
        try:
            data = await self._read(1)
        except End as end:
            if not end.clean:
                raise
            return
        raise Mismatch(f"{data!r} after the end")

    # --- sending ---------------------------------------------------------------------------------------------------

    def write(self, data: bytes | memoryview) -> None:
        self.writer.write(data)
        self.account.written += len(data)

    async def send(self, start: int, size: int, *, files: bool, end: bool = False) -> None:
        """Send ``size`` bytes of the pattern by all means there are, and close_notify with ``end``."""
        rng, at = self.rng, 0
        while at < size:
            piece = min(size - at, rng.choice(_PIECES))
            means = rng.random()
            if files and means < 0.3:
                piece = min(size - at, rng.randrange(1, 300_000))
                await self._send_file(start + at, piece)
            elif means < 0.5:
                cuts = sorted(rng.randrange(piece + 1) for _ in range(3))
                whole = _piece(start + at, piece)
                parts = zip([0, *cuts], [*cuts, piece], strict=True)
                self.writer.writelines([whole[begin:end] for begin, end in parts])
                self.account.written += piece
            else:
                self.write(_piece(start + at, piece))
            at += piece
            self.maybe_refresh()
            # Not behind the last piece: whoever has got that may close, and ``drain`` would complain.
            if at < size and rng.random() < 0.7:
                await self.writer.drain()
            if rng.random() < 0.02:
                await asyncio.sleep(rng.random() / 10)
        if end:
            self.send_end()

    async def _send_file(self, start: int, size: int) -> None:
        offset = start % _PATTERN_SIZE
        with self.file.open("rb") as file:
            file.seek(offset)
            if self.writer.is_closing():
                raise ConnectionAbortedError("closed already")
            try:
                sent = await ktls.aio.sendfile(self.writer, file, offset, size)
                if sent != size:
                    raise Mismatch(f"sendfile sent {sent} of {size}")
            finally:
                # The position tells, also after a cancellation, what has been accepted.
                self.account.written += file.tell() - offset

    # --- keys, and the end -----------------------------------------------------------------------------------------

    def maybe_refresh(self, probability: float = 0.05) -> None:
        if self.may_refresh and not self.account.goodbye and self.rng.random() < probability:
            try:
                self.ktls.refresh_traffic_keys(
                    request_peer=self.may_request and self.rng.random() < 0.5
                )
            except LocalProtocolError:
                if not self.writer.is_closing():
                    raise
            except (ValueError, OSError):
                pass  # the connection has ended, or nobody is there: whoever reads or writes will be told, the reader behind what has come in

    def send_end(self) -> None:
        """Close our direction."""
        self.account.goodbye = True
        self.writer.write_eof()

    async def close(self) -> None:
        """Close in order; what was written has then arrived, or this raises."""
        self.account.goodbye = True
        self.writer.close()
        await self.writer.wait_closed()
        self.account.closed = True


async def together(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run both; the error of one ends the other, and is raised as it is."""
    tasks = asyncio.create_task(first), asyncio.create_task(second)
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _piece(start: int, size: int) -> memoryview:
    start %= _PATTERN_SIZE
    return _PATTERN[start : start + size]
