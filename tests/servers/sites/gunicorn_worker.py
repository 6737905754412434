"""gunicorn's worker: uvicorn's, with two options changed."""

from __future__ import annotations

from typing import Any, ClassVar

from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]  # has annotations, but says so nowhere

__all__ = ("KTLSWorker",)


class KTLSWorker(UvicornWorker):  # type: ignore[misc]  # see above
    """``gunicorn --worker-class`` names it."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "ktls.aio:new_event_loop",
        "http": "ktls.asgi:PathSendProtocol",
    }
