"""A process that serves: the only one, or one of several workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from ktls.aio import new_event_loop

from .line_writer import LineWriter
from .serving import FileServer

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    import ktls

__all__ = ("STOP", "STOP_NOW", "Plan", "serve")

#: What comes through a worker's lifeline. Its end, when the supervisor has died, means ``STOP``.
STOP: Final = b"s"
STOP_NOW: Final = b"n"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is served, and how; the same in all workers."""

    root: str
    context: ktls.SSLContext
    #: Seconds that requests under way have when the server is told to stop.
    grace: float
    metrics_listener: socket.socket | None = None
    #: Where the workers' metrics are put together; None with one process.
    metrics_directory: Path | None = None


def serve(plan: Plan, listener: socket.socket, lifeline: int | None = None) -> None:
    """Serve on ``listener`` until SIGTERM, SIGINT or what the ``lifeline`` says. A second signal ends it at once; with a lifeline, only ``STOP_NOW`` does."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(plan, listener, lifeline))


async def _serve(plan: Plan, listener: socket.socket, lifeline: int | None) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()  # what was announced comes before the log
    log, complaints = LineWriter(1), LineWriter(2)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(complaints.close)
        stack.callback(log.close)
        metrics = None
        if plan.metrics_listener is not None:
            from .metrics import Metrics, MetricsServer

            metrics = Metrics(plan.metrics_directory)
            plan.context.observer = metrics
            await stack.enter_async_context(MetricsServer(metrics, plan.metrics_listener))
        server = FileServer(
            listener,
            plan.context,
            plan.root,
            log=log.write,
            complain=complaints.write,
            grace=plan.grace,
            metrics=metrics,
        )
        with _obeying_signals(server, lifeline):
            await server.run()


@contextlib.contextmanager
def _obeying_signals(server: FileServer, lifeline: int | None) -> Any:
    """Let signals and the lifeline stop ``server``."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    told = False

    def on_signal() -> None:
        nonlocal told
        # A service manager signals all processes of a group, the supervisor hears of it, too: for a worker, two are not more than one.
        server.stop(now=told and lifeline is None)
        told = True

    def on_lifeline() -> None:
        assert lifeline is not None
        command = os.read(lifeline, 1)
        server.stop(now=command == STOP_NOW)
        if not command:  # the supervisor has gone
            loop.remove_reader(lifeline)

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if lifeline is not None:
        loop.add_reader(lifeline, on_lifeline)
    try:
        yield
    finally:
        if lifeline is not None:
            loop.remove_reader(lifeline)
        for number in numbers:
            loop.remove_signal_handler(number)
