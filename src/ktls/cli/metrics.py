"""What ``ktls serve --metrics`` shows, in the format of Prometheus.

``Metrics`` counts: it is the ``Observer`` of the server's context, and the access log tells it of requests. With several workers each counts into files of its own
in one directory (``prometheus_client``'s multiprocess mode, chosen by an environment variable when that module is first imported, hence ``directory``), and all of
them listen on the one socket for metrics: whichever accepts answers for all, and none is indispensable.

The kernel's counters are those of the network namespace, not of this server: other programs' kernel TLS is in them, too.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final, final

from aiohttp import web

from .system import counters

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from ktls.handshake.handoff import Offload
    from ktls.protocol.enums import Direction, KeyChangeCause

__all__ = ("KernelCounters", "Metrics", "MetricsServer", "forget_worker")

_MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
_METHODS: Final = frozenset(("GET", "HEAD"))


@final
class Metrics:
    """Counts. ``directory``: shared with the other workers; None if there are none. To be made after the fork, in each process."""

    def __init__(self, directory: Path | None = None) -> None:
        if directory is not None:
            os.environ[_MULTIPROCESS] = str(directory)
        # Only now: the import decides where values are kept.
        from prometheus_client import CollectorRegistry, Counter, Gauge
        from prometheus_client.multiprocess import MultiProcessCollector

        self._registry = CollectorRegistry()
        own: CollectorRegistry | None = self._registry
        if directory is not None:
            MultiProcessCollector(self._registry, str(directory))  # type: ignore[no-untyped-call]  # it has no annotations
            own = None
        self._registry.register(KernelCounters())
        self._connections = Counter(
            "ktls_connections",
            "Connections that finished their handshake, by where their records are protected.",
            ("tx", "rx", "version", "cipher"),
            registry=own,
        )
        self._open = Gauge(
            "ktls_open_connections",
            "Connections now, by where their records are protected.",
            ("tx", "rx"),
            registry=own,
            multiprocess_mode="livesum",
        )
        self._handshakes = Counter(
            "ktls_handshakes",
            "Handshakes: full, resumed, failed.",
            ("outcome",),
            registry=own,
        )
        self._key_changes = Counter(
            "ktls_key_changes",
            "Traffic keys replaced, by direction (tx, rx) and cause.",
            ("direction", "cause"),
            registry=own,
        )
        self._errors = Counter(
            "ktls_errors",
            "What handshakes and connections failed of, by class of error.",
            ("phase", "error"),
            registry=own,
        )
        self._requests = Counter(
            "ktls_http_requests", "Answers, by method and status.", ("method", "code"), registry=own
        )
        self._bytes = Counter(
            "ktls_http_body_bytes",
            "Bytes of bodies sent, by where their records were protected.",
            ("tx",),
            registry=own,
        )
        for outcome in ("full", "resumed", "failed"):
            self._handshakes.labels(outcome)  # shown as 0 until there is one

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all values, and the media type, for what a scraper accepts."""
        from prometheus_client.exposition import choose_encoder

        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def request(self, method: str, status: int) -> None:
        """An answer is out, or as much of it as could be sent."""
        shown = method if method in _METHODS else "other"  # the client's choice: not without bound
        self._requests.labels(shown, str(status)).inc()

    def body_bytes(self, tx: str, count: int) -> None:
        """``count`` bytes of a body were sent."""
        self._bytes.labels(tx).inc(count)

    # --- see ktls.settings.Observer --------------------------------------------------------------------------------

    def handshake_completed(
        self, version: str, cipher: str, session_reused: bool, offload: Offload
    ) -> None:
        """See ``Observer``."""
        self._handshakes.labels("resumed" if session_reused else "full").inc()
        self._connections.labels(offload.tx, offload.rx, version, cipher).inc()
        self._open.labels(offload.tx, offload.rx).inc()

    def handshake_failed(self, error: BaseException) -> None:
        """See ``Observer``."""
        self._handshakes.labels("failed").inc()
        self._errors.labels("handshake", type(error).__name__).inc()

    def key_changed(self, direction: Direction, cause: KeyChangeCause) -> None:
        """See ``Observer``."""
        self._key_changes.labels(direction.value, cause.value).inc()

    def connection_ended(self, offload: Offload, error: BaseException | None) -> None:
        """See ``Observer``."""
        self._open.labels(offload.tx, offload.rx).dec()
        if error is not None:
            self._errors.labels("connection", type(error).__name__).inc()


@final
class KernelCounters:
    """Collects ``/proc/net/tls_stat``; nothing where the kernel has none."""

    def __init__(self, read: Callable[[], dict[str, int]] = counters) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield them: ``TlsCurr...`` are gauges, the rest only grow."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        found = self._read()
        if not found:
            return
        events = CounterMetricFamily(
            "ktls_kernel_events", "What the kernel counted in kernel TLS.", labels=("counter",)
        )
        current = GaugeMetricFamily(
            "ktls_kernel_connections", "Directions in kernel TLS now.", labels=("counter",)
        )
        for name, value in found.items():
            family = current if name.startswith("TlsCurr") else events
            family.add_metric((name,), value)
        yield events
        yield current


@final
class MetricsServer:
    """Answers GET ``/metrics`` on a listening socket, over plain HTTP."""

    def __init__(self, metrics: Metrics, listener: socket.socket) -> None:
        self._metrics = metrics
        self._listener = listener
        self._http: web.Server
        self._server: asyncio.Server

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        self._http = web.Server(self._answer, access_log=None)
        self._server = await loop.create_server(self._http, sock=self._listener)

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._http.shutdown(1.0)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path.partition("?")[0] != "/metrics":
            return web.Response(status=404)
        body, media_type = self._metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": media_type})


def forget_worker(pid: int, directory: Path) -> None:
    """Take what a dead worker had open out of the gauges. What it counted stays counted."""
    for file in directory.glob(f"gauge_live*_{pid}.db"):
        file.unlink(missing_ok=True)
