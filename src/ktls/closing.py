"""Closing a socket without losing what was accepted.

Theory of operation
-------------------
A ``send`` on a kernel TLS socket that has returned can still have a record queued above TCP, and ``close`` and ``shutdown`` throw that queue away: the peer gets half a
record and a clean FIN. SO_LINGER does not help, nor does waiting for POLLOUT. What was measured to be safe: a *blocking* send of the last record (close_notify), which returns
when everything is with TCP; or, without blocking, waiting until TCP has nothing unacknowledged (SIOCOUTQ is 0).

So a socket with a timeout, or without one, sends close_notify blocking, for as long as SO_SNDTIMEO lets it. A non-blocking socket tries without waiting, and if anything is still
under way a thread waits in its place.

TCP has a trap of its own: ``close`` with unread data in the receive buffer sends RST, and RST destroys what is still on its way. So what has
come in is read and dropped first. What comes later can still do that; whoever must know that the peer got everything has to read until its close_notify (``unwrap``).
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from typing import Final

from ktls.handshake.handoff import RecordDriver

__all__ = ("close_in_background", "drop_unread", "finish", "try_finish")

_DROP_READS: Final = 64
_DROP_SIZE: Final = 64 * 1024


def finish(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    """Send everything accepted, then close_notify, then FIN, waiting ``timeout`` seconds at most. The socket becomes blocking.

    Raises ``TimeoutError`` if not all went out, and ``OSError`` from the network.
    """
    seconds = int(timeout)
    timeval = struct.pack("@ll", seconds, max(1, int((timeout - seconds) * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.setblocking(True)
    try:
        driver.close_notify()
        driver.run_owed()
        if driver.tx_layer != "kernel":
            driver.flush()
    except BlockingIOError:
        raise TimeoutError(
            errno.ETIMEDOUT, f"the peer did not take all data within {timeout:g} seconds"
        ) from None
    _shut_down(sock)


def try_finish(sock: socket.socket, driver: RecordDriver) -> bool:
    """Do the same without waiting; return False if something is still under way. Calling again repeats nothing."""
    try:
        driver.close_notify(socket.MSG_DONTWAIT)
        driver.flush(socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    _shut_down(sock)
    return True


def close_in_background(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    """Finish and close ``sock`` in a thread of its own. The interpreter waits for it at exit, ``timeout`` seconds at most."""

    def run() -> None:
        with sock:
            try:
                finish(sock, driver, timeout)
            except OSError:
                pass  # nobody is left who could be told
            drop_unread(sock)

    threading.Thread(target=run, name="ktls-close").start()


def drop_unread(sock: socket.socket) -> None:
    """Read and drop what has come in, so that ``close`` does not reset the connection."""
    for _ in range(_DROP_READS):
        try:
            data, control, _, _ = sock.recvmsg(
                _DROP_SIZE, socket.CMSG_SPACE(1), socket.MSG_DONTWAIT
            )
        except OSError:
            return
        if not data and not control:
            return


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the peer has gone already
            raise
