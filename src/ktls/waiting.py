"""A socket that tries first and waits afterwards: the base of ``KTLSSocket``.

Theory of operation
-------------------
Two socket objects share the descriptor. ``self`` is what the application holds: its timeout, its address, its options. ``_raw`` is what the record layers use, and it never has a Python
timeout: with one, Python would poll before each read, and ``poll`` does not show a KeyUpdate that the kernel has decrypted ahead.
So every operation is tried first, and only when it would block do we poll, until the timeout of ``self``.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, final

from ktls.handshake.handoff import RecordDriver

__all__ = ("WaitingSocket", "for_read", "for_write")

_T = TypeVar("_T")


def for_read() -> bool:
    """What ``perform`` is told by an operation that waits for something to come."""
    return False


def for_write() -> bool:
    """What ``perform`` is told by an operation that waits for room to send."""
    return True


def _closed() -> OSError:
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


@final
class _RawSocket(socket.socket):
    """A second socket object for a descriptor that somebody else owns and closes."""

    __slots__ = ()

    def __del__(self) -> None:
        self.detach()


class WaitingSocket(socket.socket):
    """A stream socket with a raw twin, and a driver once there is one."""

    __slots__ = ("_driver", "_raw", "_read_flags")

    _driver: RecordDriver | None
    #: For reading: whoever shuts down makes the descriptor blocking for a while, and a reader with a timeout must not be caught by that.
    _read_flags: int

    def __init__(self, sock: socket.socket) -> None:
        """Take over the descriptor of ``sock``, which is detached, and its timeout."""
        timeout = sock.gettimeout()
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        sock.detach()
        self._raw = _RawSocket(self.family, self.type, self.proto, fileno=self.fileno())
        self._driver = None
        self.settimeout(timeout)

    def settimeout(self, value: float | None) -> None:
        """Set the timeout in seconds of every operation; None: wait for ever; 0: non-blocking."""
        super().settimeout(value)
        # The record layers never see a Python timeout (see the theory above).
        self._raw.settimeout(None if value is None else 0.0)
        self._read_flags = 0 if value is None else socket.MSG_DONTWAIT

    def setblocking(self, flag: bool) -> None:
        """Set blocking or non-blocking mode."""
        self.settimeout(None if flag else 0.0)

    def perform(
        self, operation: Callable[[], _T], writes: Callable[[], bool], name: str | None = None
    ) -> _T:
        """Run ``operation``, and whenever it would block wait, until the timeout. ``writes`` says what it waits for, ``name`` what timed out."""
        timeout = self.gettimeout()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return operation()
            except BlockingIOError:
                pass
            write = writes()
            if timeout == 0.0:
                kind = ssl.SSLWantWriteError if write else ssl.SSLWantReadError
                code = ssl.SSL_ERROR_WANT_WRITE if write else ssl.SSL_ERROR_WANT_READ
                raise kind(code, "The operation did not complete")
            self._wait(write, deadline, name or ("write" if write else "read"))

    def _wait(self, write: bool, deadline: float | None, name: str) -> None:
        driver = self._driver
        events = select.POLLOUT if write else select.POLLIN
        if driver is not None and driver.owes:
            events |= select.POLLOUT  # an owed answer need not wait for the next data
        poller = select.poll()
        fd = self.fileno()
        if fd < 0:
            raise _closed()
        poller.register(fd, events)
        remaining = None if deadline is None else deadline - time.monotonic()
        # The operation was tried just now. Being ready is not enough: a peer may send for ever what is no whole record, or records that the kernel drops.
        if remaining is not None and remaining <= 0:
            raise TimeoutError(f"The {name} operation timed out")
        poller.poll(None if remaining is None else remaining * 1000)
        if driver is not None and driver.owes:
            driver.run_owed()

    def _refuse_closed(self) -> None:
        """For a read that was ended by another thread, which closed the socket: that is no end of what the peer sends. ``OSError`` (EBADF)."""
        if self._driver is None:
            raise _closed()

    # --- what makes no sense on TLS ----------------------------------------------------------------------------

    def _unsupported(self, name: str) -> NoReturn:
        raise NotImplementedError(f"{name} not allowed on instances of {type(self).__name__}")

    def dup(self) -> NoReturn:
        """Not possible: two objects can't share the state of one connection."""
        self._unsupported("dup")

    def recvfrom(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible on a stream of records."""
        self._unsupported("recvfrom")

    def recvfrom_into(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible on a stream of records."""
        self._unsupported("recvfrom_into")

    def recvmsg(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: control messages are the record layer's."""
        self._unsupported("recvmsg")

    def recvmsg_into(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: control messages are the record layer's."""
        self._unsupported("recvmsg_into")

    def sendmsg(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: control messages are the record layer's."""
        self._unsupported("sendmsg")

    def sendto(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible on a stream of records."""
        self._unsupported("sendto")
