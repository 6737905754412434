"""Event loops whose own ``ssl=`` arguments mean kernel TLS: programs that have never heard of ``ktls`` get it from one option.

``_KernelTLS`` goes in front of a loop's class and overrides its public methods; whatever is not TLS over TCP goes to the loop itself, and so does TLS that ``ktls`` can't do (Unix sockets, TLS inside of
TLS, contexts of other libraries), with one line in the log.
"""

from __future__ import annotations

import asyncio
import functools
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from . import api
from .sendfile import sendfile
from .takeover import can_take_over
from .transport import KTLSTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = (
    "KTLSEventLoop",
    "KTLSEventLoopPolicy",
    "install",
    "new_event_loop",
    "new_uvloop_event_loop",
    "run",
)

_T = TypeVar("_T")


#: The mixin below goes in front of any loop's class.
_AnyLoop: Any = object


class _KernelTLS(_AnyLoop):  # type: ignore[misc]  # its base is decided by who inherits
    """The overrides. Signatures are those of the loops: what isn't looked at here is passed on."""

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        context, sock = options.get("ssl"), options.get("sock")
        if context:
            reason = api.unfit(context, sock)
            if reason is None:
                return await api.create_connection(protocol_factory, host, port, **options)
            api.say_why("a connection", reason)
        return await super().create_connection(protocol_factory, host, port, **options)

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        context, sock = options.get("ssl"), options.get("sock")
        if context is not None and not isinstance(context, bool):
            reason = api.unfit(context, sock)
            if reason is None:
                return await api.create_server(protocol_factory, host, port, **options)
            api.say_why("a server", reason)
        return await super().create_server(protocol_factory, host, port, **options)

    async def connect_accepted_socket(
        self, protocol_factory: Any, sock: Any, **options: Any
    ) -> Any:
        context = options.get("ssl")
        if context and not isinstance(context, bool):
            reason = api.unfit(context, sock)
            if reason is None:
                return await api.connect_accepted_socket(protocol_factory, sock, **options)
            api.say_why("an accepted connection", reason)
        return await super().connect_accepted_socket(protocol_factory, sock, **options)

    async def start_tls(
        self, transport: Any, protocol: Any, sslcontext: Any, **options: Any
    ) -> Any:
        reason = api.unfit(sslcontext)
        if reason is None and not can_take_over(transport):
            reason = f"{type(transport).__name__} is not plain TCP"
        if reason is None:
            return await api.start_tls(transport, protocol, sslcontext, **options)
        api.say_why("start_tls", reason)
        if isinstance(transport, KTLSTransport):
            # asyncio's TLS runs on any transport and any loop, uvloop's only on transports of its own.
            inside: Any = asyncio.BaseEventLoop.start_tls
            return await inside(self, transport, protocol, sslcontext, **options)
        return await super().start_tls(transport, protocol, sslcontext, **options)

    async def sendfile(
        self,
        transport: Any,
        file: Any,
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool = True,
    ) -> int:
        if isinstance(transport, KTLSTransport):
            return await sendfile(transport, file, offset, count, fallback=fallback)
        sent: int = await super().sendfile(transport, file, offset, count, fallback=fallback)
        return sent


class KTLSEventLoop(_KernelTLS, asyncio.SelectorEventLoop):
    """asyncio's own loop, with kernel TLS."""


@functools.cache
def _uvloop_class() -> type[asyncio.AbstractEventLoop]:
    """Return uvloop's loop, with kernel TLS. ``ImportError`` without uvloop."""
    import uvloop

    base: Any = uvloop.Loop  # its stub is no AbstractEventLoop in every detail

    class _UvloopEventLoop(_KernelTLS, base):  # type: ignore[misc]  # see above
        """uvloop's loop, with kernel TLS."""

    found: type[asyncio.AbstractEventLoop] = _UvloopEventLoop
    return found


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Make a loop of asyncio's whose TLS is kernel TLS. For ``uvicorn --loop ktls.aio:new_event_loop``, ``asyncio.Runner(loop_factory=...)``."""
    return KTLSEventLoop()


def new_uvloop_event_loop() -> asyncio.AbstractEventLoop:
    """Make a loop of uvloop's whose TLS is kernel TLS. ``ImportError`` if uvloop is not installed (``pip install 'ktls[uvloop]'``)."""
    return _uvloop_class()()


def run(
    main: Coroutine[Any, Any, _T],
    *,
    debug: bool | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop,
) -> _T:
    """Run ``main`` as ``asyncio.run`` does, on a loop whose TLS is kernel TLS."""
    with asyncio.Runner(debug=debug, loop_factory=loop_factory) as runner:
        return runner.run(main)


with warnings.catch_warnings():
    # Policies are deprecated from Python 3.14 on; ``install`` is for programs whose ``asyncio.run`` can't be reached otherwise.
    warnings.simplefilter("ignore", DeprecationWarning)
    _DefaultPolicy = asyncio.DefaultEventLoopPolicy


class KTLSEventLoopPolicy(_DefaultPolicy):
    """Makes loops whose TLS is kernel TLS."""

    def __init__(
        self, loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
    ) -> None:
        super().__init__()
        self._loop_factory = loop_factory

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """Make one."""
        return self._loop_factory()


def install(
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop,
) -> None:
    """Make every event loop of this process that is made from here on (``asyncio.run``, ...) one whose TLS is kernel TLS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(KTLSEventLoopPolicy(loop_factory))
