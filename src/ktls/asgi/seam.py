"""What touches uvicorn's internals, all in one place; uvicorn has no hook for extensions of ASGI.

A protocol of uvicorn makes one ``RequestResponseCycle`` per request and calls ``self.app(scope, receive, send)``, where ``send`` is a method of that cycle.
So an application that stands before the real one can add to the scope and replace ``send``, and knows the cycle. The protocol writes to ``self.transport`` and gives that
to its cycles: there goes the ``Cork``. Nothing of uvicorn is copied or patched; which attributes are used is checked when a protocol's class is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Final, cast, final

import uvicorn

from .cork import Cork
from .sender import EXTENSIONS, Cycle, FileSender

__all__ = ("FileProtocolMixin", "FileSendingApp", "check_uvicorn")

_CYCLE_ATTRIBUTES: Final = (
    "disconnected",
    "flow",
    "response_complete",
    "response_started",
    "scope",
    "transport",
)
_PROTOCOL_ATTRIBUTES: Final = ("app", "flow", "transport")
_PROTOCOL_METHODS: Final = ("connection_made", "handle_websocket_upgrade")


def check_uvicorn(protocol: type, cycle: type, *attributes: str) -> None:
    """Check that uvicorn's classes have what is used of them; ``attributes`` are those of ``cycle`` that only one implementation of HTTP has.

    ``ImportError``, with uvicorn's version, if they have not.
    """

    def missing(cls: type, attributes: tuple[str, ...], methods: tuple[str, ...]) -> list[str]:
        # Instance attributes show nowhere but in the code that sets them.
        assigned = cls.__init__.__code__.co_names  # type: ignore[misc]  # on the class, to ask for its code
        lacking = [name for name in attributes if name not in assigned]
        lacking += [name for name in methods if not hasattr(cls, name)]
        return [f"{cls.__name__}.{name}" for name in lacking]

    lacking = missing(protocol, _PROTOCOL_ATTRIBUTES, _PROTOCOL_METHODS)
    lacking += missing(cycle, _CYCLE_ATTRIBUTES + attributes, ("send",))
    if lacking:
        raise ImportError(
            f"ktls.asgi does not know uvicorn {uvicorn.__version__}, which has no {', '.join(lacking)} "
            f"in {protocol.__module__}; please report this, and use an older uvicorn until then"
        )


@final
class FileSendingApp:
    """Calls ``app`` with the extensions in its scope, and a ``send`` that knows them."""

    __slots__ = ("_app", "_sender")

    def __init__(self, app: Callable[..., Awaitable[None]], sender: type[FileSender]) -> None:
        self._app = app
        self._sender = sender

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """Run the application for one request."""
        cycle: Cycle = send.__self__
        extensions = scope.setdefault("extensions", {})
        extensions.update((name, {}) for name in EXTENSIONS)
        return self._app(scope, receive, self._sender(cycle).send)


class FileProtocolMixin:
    """Put before one of uvicorn's HTTP protocols, makes it send files with the sender of its class."""

    file_sender: ClassVar[type[FileSender]]

    app: Any
    transport: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = FileSendingApp(self.app, self.file_sender)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection."""
        super().connection_made(transport)  # type: ignore[misc]  # of the class behind this one
        self.transport = Cork(cast(asyncio.Transport, transport))

    def handle_websocket_upgrade(self, *args: Any) -> None:
        """Hand the connection over; the next protocol gets the transport itself."""
        self.transport.flush()
        self.transport = self.transport.transport
        super().handle_websocket_upgrade(*args)  # type: ignore[misc]  # of the class behind this one
