"""``SSLContext``, a subclass of ``ssl.SSLContext`` whose sockets are ``KTLSSocket``, and ``wrap_socket`` for plain contexts."""

from __future__ import annotations

import os
import socket
import ssl
import sys
from typing import TYPE_CHECKING, Any

from ktls.handshake.handoff import OffloadPolicy
from ktls.handshake.keylog import tap_for
from ktls.handshake.sessions import SessionCache
from ktls.protocol.limits import KeyLimits

from .settings import Observer, Settings, settings_of
from .sockets import KTLSSocket

if TYPE_CHECKING:
    from _typeshed import StrPath

__all__ = ("SSLContext", "create_default_context", "wrap_socket")


class SSLContext(ssl.SSLContext):
    """An ``ssl.SSLContext`` that can also say what should be done with the kernel.

    Everything about certificates, versions, suites and verification is the base class's, unchanged.
    """

    _ktls_settings: Settings

    def __init__(self, protocol: int = ssl.PROTOCOL_TLS_CLIENT) -> None:
        super().__init__()
        self._ktls_settings = Settings(session_cache=SessionCache())
        tap_for(self)  # now, while nobody uses the context yet

    def __new__(
        cls, protocol: int = ssl.PROTOCOL_TLS_CLIENT, *args: Any, **kwargs: Any
    ) -> SSLContext:
        """Make a context for clients, or for servers with ``ssl.PROTOCOL_TLS_SERVER``."""
        return super().__new__(cls, protocol)

    @property
    def offload(self) -> OffloadPolicy:
        """``auto``: the kernel where it can. ``kernel``: both directions in the kernel, or ``OffloadError``. ``userspace``: never the kernel."""
        return self._ktls_settings.offload

    @offload.setter
    def offload(self, policy: OffloadPolicy) -> None:
        if policy not in ("auto", "kernel", "userspace"):
            raise ValueError(f"offload must be auto, kernel or userspace, not {policy!r}")
        self._ktls_settings.offload = policy

    @property
    def key_limits(self) -> KeyLimits:
        """When traffic keys are refreshed (or, where they can't be, when sending ends)."""
        return self._ktls_settings.key_limits

    @key_limits.setter
    def key_limits(self, limits: KeyLimits) -> None:
        self._ktls_settings.key_limits = limits

    @property
    def shutdown_timeout(self) -> float:
        """Seconds that ``close`` may take to deliver what was accepted."""
        return self._ktls_settings.shutdown_timeout

    @shutdown_timeout.setter
    def shutdown_timeout(self, seconds: float) -> None:
        self._ktls_settings.shutdown_timeout = seconds

    @property
    def keep_session(self) -> bool:
        """Clients: whether the engine is kept for session tickets (about 27 KB a connection). Without it nothing is resumed."""
        return self._ktls_settings.keep_session

    @keep_session.setter
    def keep_session(self, keep: bool) -> None:
        self._ktls_settings.keep_session = keep

    @property
    def session_cache(self) -> SessionCache | None:
        """Clients: sessions by host and port, resumed without being asked; None for none."""
        return self._ktls_settings.session_cache

    @session_cache.setter
    def session_cache(self, cache: SessionCache | None) -> None:
        self._ktls_settings.session_cache = cache

    @property
    def observer(self) -> Observer | None:
        """Who is told what happens on connections of this context; None for nobody."""
        return self._ktls_settings.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._ktls_settings.observer = observer

    @property  # type: ignore[override]  # typeshed forgets that it may be None
    def keylog_filename(self) -> str | None:
        """Where the user wants TLS secrets logged (RFC 9850), the secrets of KeyUpdates included; None for nowhere."""
        return tap_for(self).user_keylog

    @keylog_filename.setter
    def keylog_filename(self, path: StrPath | None) -> None:
        tap_for(self).user_keylog = None if path is None else os.fspath(path)

    def wrap_socket(  # type: ignore[override]  # a KTLSSocket is no ssl.SSLSocket
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> KTLSSocket:
        """Wrap ``sock``, which is detached; as ``ssl.SSLContext.wrap_socket``. A listening socket wraps what it accepts."""
        return KTLSSocket(
            sock,
            self,
            settings=self._ktls_settings,
            server_side=server_side,
            server_hostname=server_hostname,
            do_handshake_on_connect=do_handshake_on_connect,
            suppress_ragged_eofs=suppress_ragged_eofs,
            session=session,
        )


def create_default_context(
    purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH,
    *,
    cafile: StrPath | None = None,
    capath: StrPath | None = None,
    cadata: str | bytes | None = None,
    offload: OffloadPolicy = "auto",
) -> SSLContext:
    """Make a context with the settings of ``ssl.create_default_context``: for clients, or with ``ssl.Purpose.CLIENT_AUTH`` for servers."""
    is_client = purpose == ssl.Purpose.SERVER_AUTH
    context = SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER)
    context.offload = offload
    if sys.version_info >= (3, 13):
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    if cafile or capath or cadata:
        context.load_verify_locations(cafile, capath, cadata)
    elif context.verify_mode != ssl.CERT_NONE:
        context.load_default_certs(purpose)
    keylog = os.environ.get("SSLKEYLOGFILE")
    if keylog and not sys.flags.ignore_environment:
        context.keylog_filename = keylog
    return context


def wrap_socket(
    sock: socket.socket,
    context: ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    do_handshake_on_connect: bool = True,
    suppress_ragged_eofs: bool = True,
    session: ssl.SSLSession | None = None,
    settings: Settings | None = None,
) -> KTLSSocket:
    """Wrap ``sock`` with any context of the ``ssl`` module; ``settings`` says what a plain one can't.

    ``TypeError`` for a context of another library, even one that claims to be an ``ssl.SSLContext``.
    """
    return KTLSSocket(
        sock,
        context,
        settings=settings if settings is not None else settings_of(context),
        server_side=server_side,
        server_hostname=server_hostname,
        do_handshake_on_connect=do_handshake_on_connect,
        suppress_ragged_eofs=suppress_ragged_eofs,
        session=session,
    )
