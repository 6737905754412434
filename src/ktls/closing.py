"""Closing a socket without losing what was accepted.

Theory of operation
-------------------
A ``send`` on a kernel TLS socket that has returned can still have a record queued above TCP, and ``close`` and ``shutdown`` throw that queue away: the peer gets half a
record and a clean FIN. SO_LINGER does not help, nor does waiting for POLLOUT. What was measured to be safe: a *blocking* send of the last record (close_notify), which returns
when everything is with TCP; or, without blocking, waiting until TCP has nothing unacknowledged (SIOCOUTQ is 0).

So a socket with a timeout, or without one, sends close_notify blocking, for as long as SO_SNDTIMEO lets it. (Layers in this process have no such queue: there it is enough that TCP has
accepted everything.) A non-blocking socket tries without waiting, and if anything is still under way a thread waits in its place.

TCP has a trap of its own: ``close`` with unread data in the receive buffer sends RST, and RST destroys what is still on its way. So what has
come in is read and dropped first. What comes later can still do that; whoever must know that the peer got everything has to read until its close_notify (``unwrap``).
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import threading
import time
from typing import Final

from ktls.handshake.handoff import RecordDriver

__all__ = ("close_in_background", "drop_unread", "finish", "try_finish")

_DROP_READS: Final = 64
_DROP_SIZE: Final = 64 * 1024


def finish(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    """Send everything accepted, then close_notify, then FIN, waiting ``timeout`` seconds at most.

    Raises ``TimeoutError`` if not all went out, and ``OSError`` from the network.
    """
    try:
        if driver.tx_layer == "kernel":
            _close_notify_blocking(sock, driver, timeout)
        else:
            _close_notify_polling(sock, driver, timeout)
    except BlockingIOError:
        raise TimeoutError(
            errno.ETIMEDOUT, f"the peer did not take all data within {timeout:g} seconds"
        ) from None
    _shut_down(sock)


def _close_notify_blocking(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    seconds = int(timeout)
    timeval = struct.pack("@ll", seconds, max(1, int((timeout - seconds) * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    mode = sock.gettimeout()
    sock.setblocking(True)
    try:
        driver.close_notify()
        driver.run_owed()
    finally:
        sock.settimeout(mode)


def _close_notify_polling(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    """Wait for room, not in the kernel: there each piece that goes out would start the time anew."""
    deadline = time.monotonic() + timeout
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    while True:
        try:
            driver.close_notify(socket.MSG_DONTWAIT)
            driver.flush(socket.MSG_DONTWAIT)
            return
        except BlockingIOError:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise
            poller.poll(remaining * 1000)


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
    """Finish and close ``sock``, the one that ``driver`` uses, in a thread of its own. The interpreter waits for it at exit, ``timeout`` seconds at most."""

    def run() -> None:
        with sock:
            try:
                finish(sock, driver, timeout)
            except OSError:
                pass  # nobody is left who could be told
            drop_unread(sock)

    try:
        threading.Thread(target=run, name="ktls-close").start()
    except RuntimeError:  # no more threads, or the interpreter is on its way out
        run()


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
