"""A stream that tries first and waits afterwards: the base of ``KTLSStream``.

Theory of operation
-------------------
Everything is tried first and waited for afterwards, with ``anyio.wait_readable`` and ``wait_writable``, which both backends have. That order is not a matter of speed: ``poll`` does not
show a KeyUpdate that the kernel has decrypted ahead, so who waits first waits for ever. A read that says "would block" has met all that had come.

Who waits for what:

- One task reads and one task writes, at most (``BusyResourceError``).
- Either may find something to send that is not the application's: the answer to a KeyUpdate, an alert. If TCP has no room for it the driver owes it, and the task that reads waits for room as well.
  So two tasks may wait for room, and anyio allows one for each descriptor: the second waits for the first, which wakes it however its own wait ends.
- A task that sends for long, or that waits for room while nobody reads, looks for control records in between (``settle``): the peer's KeyUpdate is answered, its alert ends the
  sending. But not while another task waits for something to read: ``settle`` may take bytes from TCP, and that task would not hear of them.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from anyio import BrokenResourceError, ClosedResourceError
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from ktls.handshake.handoff import RecordDriver

__all__ = ("WaitingStream",)

_T = TypeVar("_T")


class WaitingStream:
    """A connection and its driver, and the tasks that wait for either. ``_closed`` is its subclass's to set."""

    def __init__(self, sock: socket.socket, driver: RecordDriver) -> None:
        self._sock = sock
        self._driver = driver
        self._closed = False
        #: The first error that ended the connection.
        self._error: OSError | None = None
        #: Set while a task waits for room; it tells the others when its wait has ended.
        self._room: anyio.Event | None = None
        #: Whether a task waits for something to read.
        self._awaits_data = False

    async def _attempt(
        self, operation: Callable[[], _T], wait: Callable[[], Awaitable[None]]
    ) -> _T:
        """Try ``operation``; while it would block, wait and try again. A checkpoint in any case, but none that could be cancelled once it was done."""
        await checkpoint_if_cancelled()
        waited = False
        while True:
            self._check_open()
            try:
                result = operation()
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._broken(error) from error
            else:
                if not waited:
                    await cancel_shielded_checkpoint()
                return result
            await wait()
            waited = True

    def _broken(self, error: OSError) -> BrokenResourceError:
        self._error = self._error or error
        return BrokenResourceError()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedResourceError

    async def _wait_readable(self) -> None:
        self._awaits_data = True
        try:
            if self._driver.owes:
                await self._wait_for_either()
            else:
                await anyio.wait_readable(self._sock)
        finally:
            self._awaits_data = False

    async def _wait_for_either(self) -> None:
        """Wait for something to read, or for room to send what is owed, and send it. The caller looks whether the stream was closed meanwhile."""

        async def push() -> None:
            try:
                await self._wait_writable()
                self._driver.run_owed()
            except ClosedResourceError:
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(push)
            try:
                await anyio.wait_readable(self._sock)
            except ClosedResourceError:
                pass
            group.cancel_scope.cancel()

    async def _wait_writable(self) -> None:
        if self._room is not None:
            await self._room.wait()
            return
        self._room = anyio.Event()
        try:
            await anyio.wait_writable(self._sock)
        finally:
            self._room.set()
            self._room = None
        self._settle()

    def _settle(self) -> None:
        """Handle control records that have come, if nobody else is about to."""
        if not self._awaits_data and not self._closed:
            self._driver.settle(read_ahead=True)
