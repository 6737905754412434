"""Listeners whose connections are kernel TLS, and ``connect_tcp``."""

from __future__ import annotations

import functools
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

import anyio
from anyio.abc import Listener, SocketStream, TaskGroup
from anyio.streams.tls import TLSAttribute

from ktls.context import create_default_context
from ktls.settings import Settings

from .stream import KTLSStream

__all__ = ("KTLSListener", "connect_tcp", "create_tcp_listener")

_log: Final = logging.getLogger("ktls.anyio")


class KTLSListener(Listener[KTLSStream]):
    """Shakes hands on every connection that another listener (of TCP) accepts, each in the connection's own task.

    Extra attributes: those of the listener, and ``TLSAttribute.standard_compatible``.
    """

    def __init__(
        self,
        listener: Listener[SocketStream],
        ssl_context: ssl.SSLContext,
        standard_compatible: bool = True,
        handshake_timeout: float = 30,
        *,
        settings: Settings | None = None,
    ) -> None:
        """``handshake_timeout`` is in seconds; ``standard_compatible`` and ``settings`` are handed to ``KTLSStream.wrap``."""
        self.listener = listener
        self.ssl_context = ssl_context
        self.standard_compatible = standard_compatible
        self.handshake_timeout = handshake_timeout
        self.settings = settings

    @staticmethod
    async def handle_handshake_error(exc: BaseException, stream: SocketStream) -> None:
        """Deal with a handshake that failed or took too long: close the connection, log the error (logger ``ktls.anyio``).

        Raises ``exc`` again if it is no ``Exception``, or a cancellation.
        """
        await anyio.aclose_forcefully(stream)
        cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
        if not cancelled:
            _log.error("Error during TLS handshake", exc_info=exc)
        if cancelled or not isinstance(exc, Exception):
            raise exc

    async def serve(
        self, handler: Callable[[KTLSStream], Any], task_group: TaskGroup | None = None
    ) -> None:
        """Accept connections until cancelled, and start ``handler`` in ``task_group`` for each that has shaken hands."""

        @functools.wraps(handler)
        async def shake_hands(stream: SocketStream) -> None:
            try:
                with anyio.fail_after(self.handshake_timeout):
                    tls = await KTLSStream.wrap(
                        stream,
                        server_side=True,
                        ssl_context=self.ssl_context,
                        standard_compatible=self.standard_compatible,
                        settings=self.settings,
                    )
            except BaseException as error:
                await self.handle_handshake_error(error, stream)
            else:
                await handler(tls)

        await self.listener.serve(shake_hands, task_group)

    async def aclose(self) -> None:
        """Stop listening; connections go on."""
        await self.listener.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """See the class."""
        return {
            **self.listener.extra_attributes,
            TLSAttribute.standard_compatible: lambda: self.standard_compatible,
        }


async def create_tcp_listener(
    *,
    ssl_context: ssl.SSLContext,
    local_host: str | None = None,
    local_port: int = 0,
    family: socket.AddressFamily = socket.AF_UNSPEC,
    backlog: int = 65536,
    reuse_port: bool = False,
    standard_compatible: bool = True,
    handshake_timeout: float = 30,
    settings: Settings | None = None,
) -> KTLSListener:
    """Listen as ``anyio.create_tcp_listener`` does, and speak TLS with ``ssl_context``; further arguments as ``KTLSListener``'s."""
    arguments: dict[str, Any] = {"family": family}
    listener = await anyio.create_tcp_listener(
        local_host=local_host,
        local_port=local_port,
        backlog=backlog,
        reuse_port=reuse_port,
        **arguments,
    )
    return KTLSListener(
        listener, ssl_context, standard_compatible, handshake_timeout, settings=settings
    )


async def connect_tcp(
    remote_host: str,
    remote_port: int,
    *,
    local_host: str | None = None,
    ssl_context: ssl.SSLContext | None = None,
    tls_standard_compatible: bool = True,
    tls_hostname: str | None = None,
    happy_eyeballs_delay: float = 0.25,
    settings: Settings | None = None,
) -> KTLSStream:
    """Connect as ``anyio.connect_tcp`` does, and shake hands. The arguments are that function's.

    ``ssl_context`` is ``ktls.create_default_context()`` if left out, ``tls_hostname`` is ``remote_host``. Raises what ``anyio.connect_tcp`` raises while connecting, and what
    ``KTLSStream.wrap`` raises; the connection is closed then.
    """
    context = ssl_context if ssl_context is not None else create_default_context()
    stream = await anyio.connect_tcp(
        remote_host,
        remote_port,
        local_host=local_host,
        happy_eyeballs_delay=happy_eyeballs_delay,
    )
    try:
        return await KTLSStream.wrap(
            stream,
            server_side=False,
            hostname=tls_hostname or remote_host,
            ssl_context=context,
            standard_compatible=tls_standard_compatible,
            settings=settings,
        )
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise
