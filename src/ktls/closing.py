"""Closing a socket without losing what was accepted.

Theory of operation
-------------------
A ``send`` on a kernel TLS socket that has returned can still have a record queued above TCP, and ``close`` and ``shutdown`` throw that queue away: the peer gets half a
record and a clean FIN. SO_LINGER does not help, nor does waiting for POLLOUT. What was measured to be safe: a *blocking* send of the last record (close_notify), which returns
when everything is with TCP; or, without blocking, waiting until the peer's TCP has acknowledged every byte that the accepted data make (``KernelSender.flush`` counts them).

So a socket with a timeout, or without one, sends close_notify blocking, for as long as SO_SNDTIMEO lets it. (Layers in this process have no such queue: there it is enough that TCP has
accepted everything.) A non-blocking socket tries without waiting, and if anything is still under way a thread waits in its place.

TCP has a trap of its own: ``close`` with unread data in the receive buffer sends RST, and RST destroys what is still on its way. So what has
come in is read and dropped first; where the kernel can't open it, so that nobody can, we wait until the alert for it has arrived. What comes later can still do that; whoever must know that the peer got everything has to read until its close_notify (``unwrap``).

Another thread that waits in a call of the same connection is woken by ``close`` (``shutdown`` does that), and gets an ``OSError``.

A fork copies the connection's state, but there is only one connection: two processes that both send, or close, ruin it. So it belongs to the process that shook hands;
in any other, ``close`` lets the descriptor go and says nothing to the peer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import struct
import threading
import time
from typing import Final, final

from ktls.handshake.handoff import RecordDriver
from ktls.record.interface import DEAD_ERRNOS
from ktls.record.tcp import queued_by_tcp

from .files import FileSocket
from .settings import Settings
from .waiting import for_read, for_write

__all__ = (
    "ClosingSocket",
    "close_in_background",
    "drop_unread",
    "finish",
    "may_pass",
    "shut_down",
    "try_finish",
)

_DROP_READS: Final = 64
_PASSING: Final = (errno.EINTR, errno.ENOMEM, errno.ENOBUFS)
#: Milliseconds between two looks at what is acknowledged.
_TICK: Final = 2
_DROP_SIZE: Final = 64 * 1024


@final
class _Process:
    """This process, as long as it is the same: every fork makes another one."""

    __slots__ = ("token",)

    def __init__(self) -> None:
        self.token = object()

    def forked(self) -> None:
        self.token = object()


_process: Final = _Process()
os.register_at_fork(after_in_child=_process.forked)


def finish(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    """Send everything accepted, then close_notify, then FIN, waiting ``timeout`` seconds at most.

    Raises ``TimeoutError`` if not all went out, and ``OSError`` from the network. An error that may pass (no memory) is waited out.
    """
    deadline = time.monotonic() + timeout
    pause = select.poll()
    while True:
        try:
            _say_all(sock, driver, timeout, deadline)
            break
        except BlockingIOError:
            raise TimeoutError(
                errno.ETIMEDOUT, f"the peer did not take all data within {timeout:g} seconds"
            ) from None
        except OSError as error:
            if not may_pass(error) or time.monotonic() >= deadline:
                raise
        pause.poll(_TICK)
    shut_down(sock)


def _ends_closing(error: OSError) -> bool:
    """Whether ``error`` says that nobody wants anything any more, or that TLS has failed before. EBADMSG is what a reader has left."""
    return (
        isinstance(error, ssl.SSLError)
        or error.errno in DEAD_ERRNOS
        or error.errno in (errno.EBADMSG, errno.EBADF)
    )


def may_pass(error: OSError) -> bool:
    """Whether ``error`` says something about this moment only: who closes has to try again, or what was accepted is lost."""
    return error.errno in _PASSING and not isinstance(error, ssl.SSLError)


def _say_all(sock: socket.socket, driver: RecordDriver, timeout: float, deadline: float) -> None:
    if driver.tx_layer == "kernel" and driver.tx_closed:
        # It went out without waiting: that proves nothing.
        _wait_for_acknowledgement(sock, driver, deadline)
    elif driver.tx_layer == "kernel":
        _close_notify_blocking(sock, driver, timeout)
    else:
        _close_notify_polling(sock, driver, deadline)
    if driver.refused_in_kernel:
        # Nobody can read what was refused, so ``close`` will reset the connection: the alert must have arrived.
        _wait_for_acknowledgement(sock, driver, deadline)


def _close_notify_blocking(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    seconds = int(timeout)
    timeval = struct.pack("@ll", seconds, max(1, int((timeout - seconds) * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    mode = sock.gettimeout()
    sock.setblocking(True)
    try:
        driver.close_notify(patience=timeout)
        driver.run_owed()
    finally:
        sock.settimeout(mode)


def _wait_for_acknowledgement(sock: socket.socket, driver: RecordDriver, deadline: float) -> None:
    """Wait until TCP has nothing under way any more; there is no event for that, only for the end of the connection."""
    poller = select.poll()
    poller.register(sock, 0)  # POLLERR and POLLHUP
    while True:
        try:
            driver.flush(socket.MSG_DONTWAIT)
            if not queued_by_tcp(sock):
                return
            raise BlockingIOError(errno.EAGAIN, "not all is acknowledged yet")
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        if poller.poll(_TICK):
            return  # nobody is there who could acknowledge anything


def _close_notify_polling(sock: socket.socket, driver: RecordDriver, deadline: float) -> None:
    """Wait for room, not in the kernel: there each piece that goes out would start the time anew."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    while True:
        try:
            remaining = max(0.0, deadline - time.monotonic())
            driver.close_notify(socket.MSG_DONTWAIT, patience=remaining)
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
        driver.close_notify(socket.MSG_DONTWAIT, patience=0)
        driver.flush(socket.MSG_DONTWAIT)
    except OSError as error:
        if isinstance(error, BlockingIOError) or may_pass(error):
            return False
        raise
    shut_down(sock)
    return True


def close_in_background(sock: socket.socket, driver: RecordDriver, timeout: float) -> None:
    """Finish and close ``sock``, the one that ``driver`` uses, in a thread of its own. The interpreter waits for it at exit, ``timeout`` seconds at most."""

    def run() -> None:
        with sock:
            try:
                finish(sock, driver, timeout)
            except OSError:
                pass  # nobody is left who could be told
            drop_unread(sock, driver)

    try:
        threading.Thread(target=run, name="ktls-close").start()
    except RuntimeError:  # no more threads, or the interpreter is on its way out
        run()


def drop_unread(sock: socket.socket, driver: RecordDriver | None = None) -> None:
    """Read and drop what has come in, so that ``close`` does not reset the connection. What the kernel of ``driver`` can't open it can't drop either."""
    if driver is not None and driver.stuck_in_kernel:
        return
    for _ in range(_DROP_READS):
        try:
            data, control, _, _ = sock.recvmsg(
                _DROP_SIZE, socket.CMSG_SPACE(1), socket.MSG_DONTWAIT
            )
        except OSError:
            return
        if not data and not control:
            return


def shut_down(sock: socket.socket) -> None:
    """Send FIN. Only when nothing is queued above TCP any more: see the theory."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the peer has gone already
            raise


class ClosingSocket(FileSocket):
    """A TLS socket that ends in order."""

    __slots__ = ("_owner", "_settings")

    def __init__(
        self, sock: socket.socket, *, settings: Settings, suppress_ragged_eofs: bool
    ) -> None:
        super().__init__(sock, suppress_ragged_eofs=suppress_ragged_eofs)
        self._settings = settings
        self._own()

    def _own(self) -> None:
        """Note that the connection is this process's."""
        self._owner = _process.token

    def _is_own(self) -> bool:
        return self._owner is _process.token

    def shutdown(self, how: int) -> None:
        """Shut down one half or both. For SHUT_WR and SHUT_RDWR close_notify goes out first, behind everything that was accepted; reading can go on after SHUT_WR.

        Non-blocking: ``ssl.SSLWantWriteError`` while close_notify can't go out; call again. While data is still on its way, TCP's own FIN is left to ``close``.
        """
        if how == socket.SHUT_RD or self._driver is None:
            super().shutdown(how)
            return
        if self.gettimeout() == 0.0:
            driver = self._driver
            self.perform(lambda: driver.close_notify(socket.MSG_DONTWAIT), for_write)
            try_finish(self._raw, driver)
        else:
            self._finish(self._driver)
        if how == socket.SHUT_RDWR:
            super().shutdown(socket.SHUT_RD)

    def unwrap(self) -> socket.socket:
        """Close both directions of TLS in order: send close_notify, wait for the peer's; return a socket for what may follow in plain text.

        A socket with kernel TLS can't become plain again: then ``self`` is returned, closed for both directions. Data that comes before the peer's close_notify is dropped.
        ``ssl.SSLError`` if plain text of the peer's was read together with its close_notify: it can't be put back.
        """
        driver = self._driver
        if driver is None:
            raise ValueError("handshake not done yet")
        self.perform(lambda: driver.close_notify(), for_write)
        scrap = bytearray(_DROP_SIZE)
        while self.perform(lambda: driver.recv_into(scrap, 0, self._read_flags), for_read):
            pass
        if "kernel" in (driver.tx_layer, driver.rx_layer):
            return self
        if driver.unread():
            raise ssl.SSLError("plain text came together with close_notify, and was read with it")
        self.perform(driver.flush, for_write)
        timeout = self.gettimeout()
        plain = socket.socket(self.family, self.type, self.proto, fileno=self.detach())
        plain.settimeout(timeout)
        return plain

    def detach(self) -> int:
        """Give the descriptor away without closing anything. With kernel TLS its new holder can go on, and see the keys."""
        self._driver = None
        self._raw.detach()
        self._release()
        return super().detach()

    def _real_close(self) -> None:
        driver, self._driver = self._driver, None
        inherited = False
        try:
            # After ``detach`` and ``unwrap`` the descriptor is somebody else's.
            if driver is not None and self.fileno() >= 0 and self._is_own():
                inherited = self._close_tls(driver)
        finally:
            if not inherited:
                if driver is not None and self._is_own():
                    self._wake()
                self._raw.detach()
            self._release()
            super()._real_close()  # type: ignore[misc]  # not in typeshed; ssl.SSLSocket overrides it too

    def _close_tls(self, driver: RecordDriver) -> bool:
        """Say goodbye; return whether somebody else closes the descriptor, later."""
        try:
            if self.gettimeout() != 0.0:
                self._finish(driver)
            elif not try_finish(self._raw, driver):
                super().detach()  # to the raw one, which the driver uses
                close_in_background(self._raw, driver, self._settings.shutdown_timeout)
                return True
        except TimeoutError:
            raise  # data was lost, and only we know
        except OSError as error:
            if not _ends_closing(error):
                raise  # the same
            return False  # the peer has gone: that is what closing is for
        drop_unread(self._raw, driver)
        return False

    def _wake(self) -> None:
        """Let no other thread wait any longer: the connection has ended."""
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)

    def _finish(self, driver: RecordDriver) -> None:
        timeout = self.gettimeout()
        limit = self._settings.shutdown_timeout
        finish(self._raw, driver, limit if timeout is None else min(timeout, limit))

    def _release(self) -> None:
        """Let go of what a connection holds beside its descriptor."""
        self._drop_pipe()
