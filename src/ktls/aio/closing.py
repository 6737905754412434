"""How an asyncio connection ends: in order, within a time limit, and without losing what was accepted.

Theory of operation
-------------------
A record that ``send`` has accepted may still be queued in the kernel above TCP, and ``close`` and ``shutdown`` throw that queue away; the peer then gets half a
record and a clean FIN. A blocking ``send`` of close_notify would wait for it, but may not be used here, and no event tells when the queue is empty. What proves it is that the peer's TCP has
acknowledged every byte (``KernelSender.flush`` counts them). So after close_notify we look at that, at once (on loopback, or with a quick peer, that is all), then from a timer with growing pauses. The
peer's answer, if one comes, makes us look sooner. After a reset nothing more is acknowledged, for ever; POLLHUP tells of that.

Where the records are protected in this process no queue is above TCP, yet the same is waited for: a socket that was closed answers whatever comes (a KeyUpdate will do) with RST, and
what TCP has not yet delivered is gone.

Meanwhile what comes in is read and dropped: unread data would make TCP reset the connection at ``close`` and destroy what is on its way; and a peer that writes before
it reads would never take our data.

``shutdown_timeout`` bounds all of it; then the connection is cut, and the protocol is told ``TimeoutError``. asyncio's own TLS transport waits for the peer's close_notify instead,
which TLS does not ask for (RFC 9846 §6.1), and then trusts that TCP delivers.
"""

from __future__ import annotations

import asyncio
import errno
import weakref
from typing import TYPE_CHECKING, Final, final

from ktls.closing import may_pass

from .writing import say_close_notify

if TYPE_CHECKING:
    from .terms import Terms
    from .transport import KTLSTransport

__all__ = ("Closer",)

#: Seconds between two looks: the first pause, and the longest.
_FIRST_PAUSE: Final = 0.001
_LAST_PAUSE: Final = 0.5


@final
class Closer:
    """The end of one connection, from ``begin`` to ``connection_lost``. ``error`` is what the protocol will be told."""

    __slots__ = (
        "_deadline",
        "_done",
        "_error",
        "_pause",
        "_timer",
        "_transport",
        "context",
        "observer",
    )

    def __init__(self, transport: KTLSTransport, error: BaseException | None, terms: Terms) -> None:
        #: What is still needed of the terms.
        self.context = weakref.ref(terms.context)
        self.observer = terms.settings.observer
        self._transport = transport
        self._error = error
        self._pause = _FIRST_PAUSE
        self._done = False
        self._deadline: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        """Go as far as possible now; what is left goes on with events and timers, for ``timeout`` seconds at most."""
        self.go_on()
        if not self._done:
            self._deadline = loop.call_later(timeout, self._too_late)

    def go_on(self) -> None:
        """Take the next step: there is room, time has passed, or something has come in."""
        transport = self._transport
        if transport.writes_pending:
            return  # comes back when the queue is empty
        try:
            # To a TCP connection that the peer has ended, asyncio's own TLS says no goodbye either.
            if not transport.truncated and not say_close_notify(transport.driver):
                transport.watch_for_room()
                return
            transport.driver.flush()
            transport.check_acknowledged()
        except BlockingIOError:
            self._look_later()
            return
        except OSError as error:
            if may_pass(error):
                self._look_after_a_while()
                return
            # The peer has gone: that is what closing is for.
        transport.end(self._error)

    def _look_later(self) -> None:
        transport = self._transport
        if transport.driver.unsent:
            transport.watch_for_room()  # sealed in this process: TCP will say when there is room
            return
        transport.unwatch_room()
        if transport.hung_up():
            transport.end(self._error)  # nobody is there who could acknowledge anything
            return
        self._look_after_a_while()

    def _look_after_a_while(self) -> None:
        transport = self._transport
        if self._timer is None:
            self._timer = transport.loop.call_later(self._pause, self._look)
            self._pause = min(2 * self._pause, _LAST_PAUSE)

    def _look(self) -> None:
        self._timer = None
        self.go_on()

    def _too_late(self) -> None:
        self._transport.end(self._error or TimeoutError(errno.ETIMEDOUT, "SSL shutdown timed out"))

    def cancel(self) -> None:
        """Have nothing more happen."""
        self._done = True
        for handle in (self._deadline, self._timer):
            if handle is not None:
                handle.cancel()
        self._deadline = self._timer = None
