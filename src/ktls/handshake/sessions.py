"""A client's sessions, kept for the next connection to the same server."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, TypeAlias, final

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

__all__ = ("SessionCache", "SessionKey")

#: Host and port, as the connection was asked for. The host is the name that the certificate is checked against.
SessionKey: TypeAlias = tuple[str, int]

#: Servers send two tickets or so, for as many connections in parallel; more per server is a waste.
_MAX_PER_KEY: Final = 4
#: No ticket may be used for longer than seven days, in seconds (RFC 9846 §4.7.1).
_MAX_LIFETIME: Final = 604_800


@final
class SessionCache:
    """Sessions of **one** context, by server; the servers least recently used are dropped first. Thread-safe.

    A session carries the verification of the certificate over to the next connection, so it must not be shared with a context that verifies
    differently (``ssl`` refuses that, too).
    """

    __slots__ = ("_clock", "_lock", "_max_entries", "_sessions")

    def __init__(self, max_entries: int = 256, *, clock: Callable[[], float] = time.time) -> None:
        """``max_entries`` is the number of servers; ``clock`` gives seconds since the epoch."""
        if max_entries < 1:
            raise ValueError("a session cache needs room for one entry at least")
        self._max_entries = max_entries
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[SessionKey, list[tuple[ssl.SSLSession, bool]]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<SessionCache with sessions of {len(self)} servers>"

    def __len__(self) -> int:
        return len(self._sessions)

    def store(self, key: SessionKey, session: ssl.SSLSession, *, single_use: bool = True) -> None:
        """Keep ``session``.

        ``single_use`` is for TLS 1.3, where a ticket used twice lets an observer link the connections (RFC 9846 §C.4). A TLS 1.2 session
        replaces the one before.
        """
        with self._lock:
            sessions = self._sessions.setdefault(key, [])
            if not single_use:
                sessions.clear()
            sessions.append((session, single_use))
            del sessions[:-_MAX_PER_KEY]
            self._sessions.move_to_end(key)
            while len(self._sessions) > self._max_entries:
                self._sessions.popitem(last=False)

    def take(self, key: SessionKey) -> ssl.SSLSession | None:
        """Return the newest session for ``key`` that has not expired, or None. One for single use is taken out."""
        with self._lock:
            sessions = self._sessions.get(key)
            if sessions is None:
                return None
            now = self._clock()
            found: ssl.SSLSession | None = None
            while sessions and found is None:
                session, single_use = sessions[-1]
                alive = now < session.time + min(session.timeout, _MAX_LIFETIME)
                if single_use or not alive:
                    sessions.pop()
                if alive:
                    found = session
            if sessions:
                self._sessions.move_to_end(key)
            else:
                del self._sessions[key]
            return found

    def clear(self) -> None:
        """Forget all sessions."""
        with self._lock:
            self._sessions.clear()
