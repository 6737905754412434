"""Taking the socket out of a loop's own plain transport.

A transport gives its socket to nobody, so we take a duplicate of the descriptor and let the transport close its own. That is safe when the transport will neither read nor write any more:
reading is paused, and what was written has gone out. What it has read before went to its protocol; it can't be put back, which is why ``Untouched`` pauses at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, final

__all__ = ("Untouched", "can_take_over", "take_over")


@final
class Untouched(asyncio.Protocol):
    """The protocol of a connection that will be taken over: reads nothing, and knows when everything written has gone."""

    def __init__(self) -> None:
        self._drained: asyncio.Future[None] | None = None
        self._lost: BaseException | None = None

    def connection_made(self, transport: Any) -> None:
        """Read nothing."""
        transport.pause_reading()

    def pause_writing(self) -> None:
        """Called while something waits to be sent."""
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Called when nothing does any more."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the wait: nothing more will go out."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(exc or ConnectionAbortedError("the connection was closed"))

    async def drained(self, transport: Any) -> None:
        """Wait until everything written has gone."""
        if self._drained is None and transport.get_write_buffer_size():
            # So much that the protocol before us was told to pause; we hear only of the end of it.
            self.pause_writing()
        if self._drained is not None:
            await self._drained


def can_take_over(transport: Any) -> bool:
    """Whether ``transport`` is a loop's own TCP transport in plain text, or too late for any answer: ``take_over`` says that."""
    # uvloop's transports are no asyncio.Transport.
    if not hasattr(transport, "get_extra_info"):
        return False
    if transport.is_closing():
        return True  # its socket may be gone; uvloop's own start_tls would wait for ever
    sock = transport.get_extra_info("socket")
    return (
        sock is not None
        and transport.get_extra_info("sslcontext") is None
        and sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type == socket.SOCK_STREAM
    )


async def take_over(transport: Any) -> socket.socket:
    """Return the connection of ``transport`` as a socket; the transport is closed. ``OSError`` if the connection was lost, ``TypeError`` if it can't be taken."""
    if not can_take_over(transport):
        raise TypeError(f"transport {transport!r} is not supported by start_tls()")
    if transport.is_closing():
        raise ConnectionAbortedError("the connection was closed")
    waiting = Untouched()
    transport.pause_reading()
    transport.set_protocol(waiting)
    try:
        # With both limits at 0, pause_writing is called at once if anything waits.
        transport.set_write_buffer_limits(0)
        await waiting.drained(transport)
        sock = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
    finally:
        transport.abort()
    return sock
