"""Several processes that serve one address, and the one that looks after them.

Theory of operation
    The supervisor makes all listening sockets, with SO_REUSEPORT, one per worker, and forks. It keeps the sockets: connections that wait in the queue of a worker that dies are
    accepted by the one that takes its place. It forks instead of starting programs because the TLS context, made before, is then the same everywhere: the keys of its
    session tickets are in it, and a client resumes with any worker what it began with another. To fork is safe here: the supervisor has no threads and no event loop.

    It waits for signals with ``sigtimedwait``: they are blocked, so nothing is interrupted, and a death can't be missed. Workers are told to stop through a
    pipe each, not by signals: ^C and service managers signal the workers, too, and a worker must be able to tell "stop" twice from "stop at once".
    The pipe's end tells them that the supervisor has died.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from .serve_process import STOP, STOP_NOW

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ("Supervisor",)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
#: A worker that lived for less time than this had no chance: the next one waits as long.
_RESTART_DELAY: Final = 1.0
#: Beyond the grace, for a worker to end by itself.
_KILL_DELAY: Final = 5.0


@final
@dataclass(frozen=True, slots=True)
class _Worker:
    number: int
    pid: int
    #: Our end of the pipe.
    lifeline: int
    started: float


@final
class Supervisor:
    """Runs ``work(listener, lifeline)`` in a process per listener until SIGTERM or SIGINT, and again where one ends before."""

    def __init__(
        self,
        listeners: list[socket.socket],
        work: Callable[[socket.socket, int], None],
        *,
        grace: float,
        on_death: Callable[[int], None],
    ) -> None:
        self._listeners = listeners
        self._work = work
        self._grace = grace
        self._on_death = on_death
        self._workers: dict[int, _Worker] = {}
        #: Number of a worker to be started, and when.
        self._due: dict[int, float] = dict.fromkeys(range(len(listeners)), 0.0)
        #: When those are killed that do not stop; None until they were told to.
        self._deadline: float | None = None
        self._killed = False

    def run(self) -> bool:
        """Return when all workers have ended after a signal: whether they did so by themselves."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._start_due()
            while self._workers or self._due:
                found = signal.sigtimedwait(_SIGNALS, self._patience())
                if found is not None and found.si_signo != signal.SIGCHLD:
                    self._stop()
                self._reap()
                self._start_due()
                self._kill_overdue()
        finally:
            self._kill()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return not self._killed

    def _patience(self) -> float:
        now = time.monotonic()
        times = [*self._due.values(), *([] if self._deadline is None else [self._deadline])]
        return max(0.0, min(times, default=now + 3600.0) - now)

    # --- beginning -----------------------------------------------------------------------------------------------

    def _start_due(self) -> None:
        now = time.monotonic()
        for number in [number for number, when in self._due.items() if when <= now]:
            del self._due[number]
            self._start(number)

    def _start(self, number: int) -> None:
        theirs, ours = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else both processes would write what is in it
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            self._be_worker(number, theirs)
        os.close(theirs)
        self._workers[pid] = _Worker(number, pid, ours, time.monotonic())

    def _be_worker(self, number: int, lifeline: int) -> None:
        status = 1
        try:
            for worker in self._workers.values():
                os.close(worker.lifeline)  # else their end would not be seen
            for other in self._listeners:
                if other is not self._listeners[number]:
                    other.close()
            self._work(self._listeners[number], lifeline)
            status = 0
        except BaseException as error:
            _say(f"a worker failed: {type(error).__name__}: {error}")
        finally:
            os._exit(status)

    # --- ending --------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """The first time: gracefully. After that: now."""
        first = self._deadline is None
        patience = (self._grace if first else 0.0) + _KILL_DELAY
        self._deadline = time.monotonic() + patience
        self._due.clear()
        for listener in self._listeners:
            listener.close()
        for worker in self._workers.values():
            with suppress(BrokenPipeError):
                os.write(worker.lifeline, STOP if first else STOP_NOW)

    def _reap(self) -> None:
        for worker in list(self._workers.values()):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid == 0:
                continue
            del self._workers[pid]
            os.close(worker.lifeline)
            self._on_death(pid)
            code = os.waitstatus_to_exitcode(status)
            if self._deadline is None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                _say(f"worker {pid} {how}; another takes its place")
                now = time.monotonic()
                delay = _RESTART_DELAY if now - worker.started < _RESTART_DELAY else 0.0
                self._due[worker.number] = now + delay
            elif code != 0:
                self._killed = True

    def _kill_overdue(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._kill()

    def _kill(self) -> None:
        for worker in self._workers.values():
            _say(f"worker {worker.pid} does not stop and is killed")
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
            os.close(worker.lifeline)
            self._on_death(worker.pid)
            self._killed = True
        self._workers.clear()


def _say(message: str) -> None:
    with suppress(OSError):
        print(f"ktls: {' '.join(message.split())}", file=sys.stderr, flush=True)
