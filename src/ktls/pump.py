"""Moves a handshake engine's bytes over a socket, for a front end that waits by itself.

Reads exactly what the engine asks for, never past the end of a record: so the kernel can take over the receiving direction at a record boundary. Two system calls per
record are the price; a handshake has a handful.
"""

from __future__ import annotations

import socket
import ssl
from typing import final

from ktls.handshake.engine import HandshakeEngine

__all__ = ("HandshakePump",)


@final
class HandshakePump:
    """One handshake on one socket. Every call goes as far as it can; ``wants_write`` tells what a ``BlockingIOError`` waits for."""

    __slots__ = ("_engine", "_out", "_sock", "wants_write")

    def __init__(self, sock: socket.socket, engine: HandshakeEngine) -> None:
        self._sock = sock
        self._engine = engine
        self._out = memoryview(b"")
        self.wants_write = False

    def run(self) -> None:
        """Shake hands. ``BlockingIOError``: wait, then call again. Errors of the engine come after its alert was sent, as far as that was possible."""
        try:
            while not self._engine.step():
                self._flush()
                self._read()
        except ssl.SSLError:
            try:
                self._flush()
            except OSError:
                pass  # the alert could not be sent; the error that caused it matters more
            raise
        self._flush()

    def _flush(self) -> None:
        while True:
            if not self._out:
                self._out = memoryview(self._engine.data_to_send())
                if not self._out:
                    self.wants_write = False
                    return
            self.wants_write = True
            self._out = self._out[self._sock.send(self._out) :]

    def _read(self) -> None:
        data = self._sock.recv(self._engine.bytes_needed())
        if data:
            self._engine.feed(data)
        else:
            self._engine.eof()
