"""What TCP has taken of a connection, and what of it the peer's TCP has acknowledged."""

from __future__ import annotations

import socket
import struct
from fcntl import ioctl

from .linux import SIOCOUTQ, TCPI_BYTES_ACKED

__all__ = ("acknowledged", "given_to_tcp", "queued_by_tcp")


def acknowledged(sock: socket.socket) -> int:
    """Return how many bytes of this connection the peer's TCP has acknowledged."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCPI_BYTES_ACKED + 8)
    count: int = struct.unpack_from("=Q", info, TCPI_BYTES_ACKED)[0]
    return count


def queued_by_tcp(sock: socket.socket) -> int:
    """Return how many bytes TCP has that are not acknowledged."""
    queued: int = struct.unpack("=i", ioctl(sock.fileno(), SIOCOUTQ, bytes(4)))[0]
    return queued


def given_to_tcp(sock: socket.socket) -> int:
    """Return how many bytes TCP was given since the connection began."""
    before = acknowledged(sock)
    while True:
        queued = queued_by_tcp(sock)
        now = acknowledged(sock)
        if now == before:  # else some were counted twice, or not at all
            return now + queued
        before = now
