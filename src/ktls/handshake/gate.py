"""No fork inside a handshake call.

A fork taken while another thread is inside the ``ssl`` module's key log lock leaves the child with a lock that nobody will open, and its first
handshake waits for ever. ``keylog`` registers the gate with ``os.register_at_fork``, in the right order with its own locks.

The same goes for modules: a fork taken while another thread imports one leaves the child with a module that never gets ready. The first handshake with a name
would import the codec ``idna``; so it is imported here.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # a fork amid its first import would hang the child
import threading
from typing import Final

__all__ = ("Gate", "gate")

#: The longest that a fork waits, in seconds. A handshake call takes about a millisecond; this is for callbacks that wait for the very
#: thread that forks.
_PATIENCE: Final = 5.0


class Gate:
    """Lets any number of handshake calls run (``with gate:`` around each), but none while the process forks."""

    def __init__(self) -> None:
        # ``with`` takes the lock itself: that is one step, while ``Condition.__enter__`` has a place where a signal handler could raise, and leave it held.
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._local = threading.local()
        self._running = 0
        self._forking = 0

    @property
    def _depth(self) -> int:
        """How many calls this thread is inside of."""
        depth: int = getattr(self._local, "depth", 0)
        return depth

    def __enter__(self) -> None:
        with self._lock:
            # A handshake inside a handshake's callback must not wait for a fork that waits for it.
            while self._forking and not self._depth:
                self._condition.wait()
            self._running += 1
            self._local.depth = self._depth + 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._local.depth -= 1
            self._running -= 1
            if self._forking:
                self._condition.notify_all()

    def before_fork(self) -> None:
        """Wait until no other thread is inside, and let nobody in."""
        with self._lock:
            self._forking += 1
            self._condition.wait_for(lambda: self._running == self._depth, timeout=_PATIENCE)

    def after_fork_in_parent(self) -> None:
        """Let them in again."""
        with self._lock:
            self._forking -= 1
            self._condition.notify_all()

    def after_fork_in_child(self) -> None:
        """Start anew: there is only this thread."""
        # Another thread, which is gone, may hold the old one.
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._running = self._depth
        self._forking = 0


#: The one of this process.
gate: Final = Gate()
