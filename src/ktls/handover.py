"""Handing a TLS connection to another process: ``export_state`` here, ``from_state`` there, and the descriptor in between."""

from __future__ import annotations

import socket
from typing import Self

from ktls.handshake.handoff import Offload
from ktls.protocol.enums import Role
from ktls.protocol.errors import LocalProtocolError
from ktls.record.driver import Driver
from ktls.record.handover import check_socket, restore_driver, take_driver

from .closing import ClosingSocket
from .established import Established, EstablishedFacts
from .settings import Settings
from .state import ExportedState, StateSnapshot

__all__ = ("HandoverSocket",)


def _settings_of(snapshot: StateSnapshot) -> Settings:
    """Return what was carried of the settings."""
    return Settings(
        offload=snapshot.offload,
        key_limits=snapshot.driver.connection.limits,
        shutdown_timeout=snapshot.shutdown_timeout,
    )


class HandoverSocket(EstablishedFacts, ClosingSocket):
    """A TLS socket whose connection can move to another process."""

    __slots__ = ()

    _server_hostname: str | None
    _unreported: bytes

    def export_state(self) -> ExportedState:
        """Take the connection out of this process: return what another one needs to go on with it, beside the descriptor. **The result is secret.**

        From here on this object is dead, since a connection can have one owner only: what uses it raises ``LocalProtocolError``, ``close`` closes our descriptor and says nothing to the peer.
        Until then ``fileno()`` is there to be sent (``socket.send_fds``). If nobody goes on, the peer sees the connection end without close_notify.

        ``LocalProtocolError``, and the connection is as it was: something accepted has not been sent, a key change is under way, a handshake message has come in part only, another thread
        is sending or receiving, the handshake engine protects the connection. ``ValueError`` before the handshake.

        Sessions stay here: ``session`` there is None. Nor are later secrets written to a key log there.
        """
        self._refuse_exported()
        driver, established = self._driver, self._facts()
        if not isinstance(driver, Driver):
            raise LocalProtocolError("the handshake engine protects this connection")
        if self._unreported:
            raise LocalProtocolError("a send has to be repeated first")
        offload = Offload(driver.tx_layer, driver.rx_layer, established.offload_reason)
        settings = self._settings
        snapshot = StateSnapshot(
            driver=take_driver(driver),
            version=established.version,
            cipher=established.cipher,
            info=established.info,
            server_hostname=self._server_hostname,
            tls_exporter=established.tls_exporter,
            offload=settings.offload,
            offload_reason=established.offload_reason,
            shutdown_timeout=settings.shutdown_timeout,
            suppress_ragged_eofs=self._suppress_ragged_eofs,
        )
        self._driver = None
        self._release()
        if settings.observer is not None:
            settings.observer.connection_ended(offload, None)
        return ExportedState(snapshot)

    @classmethod
    def from_state(
        cls,
        sock: socket.socket,
        state: ExportedState | bytes,
        *,
        settings: Settings | None = None,
    ) -> Self:
        """Go on with a connection that another process has exported. ``sock`` is the descriptor that came with it; it is detached, its timeout stays.

        ``settings`` take the place of those that the connection had (its key limits and ``shutdown_timeout`` were carried; an observer can't be). There is no ``context``.

        ``ValueError``: the state is damaged, of another version of the format, or not of this socket, which is as it was. A state must be used once only: in the kernel a second use
        is refused once a key has changed, for layers in user space nobody can tell.
        """
        try:
            exported = (
                state if isinstance(state, ExportedState) else ExportedState.from_bytes(state)
            )
        finally:
            del state  # bytes print, and tracebacks may show locals
        snapshot = exported.snapshot
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            raise NotImplementedError("only stream sockets are supported")
        check_socket(sock, snapshot.driver)
        if settings is None:
            settings = _settings_of(snapshot)
        # For what it refuses, as long as the socket is still the caller's.
        restore_driver(sock, snapshot.driver, limits=settings.key_limits)
        self = cls.__new__(cls)
        self._driver = None
        self._established = None
        ClosingSocket.__init__(
            self, sock, settings=settings, suppress_ragged_eofs=snapshot.suppress_ragged_eofs
        )
        is_server = snapshot.driver.connection.role is Role.SERVER
        self._resumed(is_server, snapshot.server_hostname)
        self._go_on(snapshot)
        return self

    def _go_on(self, snapshot: StateSnapshot) -> None:
        """Be at work where ``snapshot`` was taken."""
        settings = self._settings
        observer = settings.observer
        self._driver = driver = restore_driver(
            self._raw,
            snapshot.driver,
            limits=settings.key_limits,
            on_key_change=observer.key_changed if observer is not None else None,
        )
        self._established = Established(
            snapshot.version,
            snapshot.cipher,
            snapshot.info,
            None,
            snapshot.offload_reason,
            snapshot.tls_exporter,
        )
        if observer is not None:
            observer.handshake_completed(
                snapshot.version,
                snapshot.cipher[0],
                snapshot.info.session_reused,
                Offload(driver.tx_layer, driver.rx_layer, snapshot.offload_reason),
            )

    def _resumed(self, server_side: bool, server_hostname: str | None) -> None:
        """Be as after the handshake, without having made one."""
        raise NotImplementedError

    def _refuse_exported(self) -> None:
        if self._driver is None and self._established is not None and self.fileno() >= 0:
            raise LocalProtocolError(
                "the state of this connection was exported: it is elsewhere now"
            )

    def shutdown(self, how: int) -> None:
        """See ``ClosingSocket.shutdown``."""
        self._refuse_exported()
        super().shutdown(how)

    def unwrap(self) -> socket.socket:
        """See ``ClosingSocket.unwrap``."""
        self._refuse_exported()
        return super().unwrap()
