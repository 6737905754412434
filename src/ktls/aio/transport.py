"""``KTLSTransport``: an asyncio transport whose bytes are TLS, on any loop that has ``add_reader`` and ``add_writer``.

Reading is in ``reading``, writing in ``writing``, the end in ``closing``; here is what holds them together: errors, the life of the connection, and
what may be asked about it. It is made by ``handshake`` when a handshake is complete.

Behaviour is that of asyncio's own TLS transport, with these differences: half close works (TLS 1.3); closing waits until the peer's TCP has everything, not for its
close_notify; a file can be sent in the middle of writes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import struct
import warnings
from asyncio import constants
from asyncio.trsock import TransportSocket
from fcntl import ioctl
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from ktls.closing import drop_unread, shut_down
from ktls.handshake.handoff import Offload, RecordDriver
from ktls.protocol.errors import LocalProtocolError, TruncatedError
from ktls.record.linux import SIOCOUTQ

from .closing import Closer
from .established import KTLSObject
from .reading import AGAIN, MAX_READS
from .writing import WritingTransport, say_close_notify

if TYPE_CHECKING:
    import socket
    import ssl

    from ktls.established import Established

    from .terms import Terms

__all__ = ("KTLSTransport", "Owner")

_log = logging.getLogger("ktls.aio")

#: What ``read_now`` says when there is nothing to read.
_NOTHING: Final = -1


class Owner(Protocol):
    """Who keeps account of connections: a server."""

    def detach(self, connection: Any) -> None:
        """Note that ``connection`` is no more."""
        ...


@final
class KTLSTransport(WritingTransport):
    """One connection after its handshake. See the module; not to be made by applications."""

    __slots__ = (
        "_closer",
        "_lost_offload",
        "_object",
        "_owner",
        "_peername",
        "_sockname",
        "established",
        "server_side",
        "terms",
        "truncated",
    )

    # asyncio's own machinery asks for these: ``start_tls`` for TLS inside of TLS; ``loop.sendfile`` of a loop that isn't ours copies.
    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.FALLBACK

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        driver: RecordDriver,
        established: Established,
        protocol: asyncio.BaseProtocol,
        terms: Terms,
        *,
        names: tuple[Any, Any],
        owner: Owner | None,
    ) -> None:
        """``names``: of the peer, and of our socket. ``owner`` is told once the socket is closed."""
        self._init_reading(loop, sock, driver)
        self._init_writing()
        self.set_protocol(protocol)
        self.terms = terms
        #: Known also when the terms are gone.
        self.server_side = terms.server_side
        self.established = established
        #: Whether TCP ended without close_notify.
        self.truncated = False
        self._peername, self._sockname = names
        self._owner = owner
        self._closer: Closer | None = None
        self._object: KTLSObject | None = None
        self._lost_offload: Offload | None = None

    def __repr__(self) -> str:
        state = "lost" if self._lost else "closing" if self._closing else "open"
        return f"<ktls.aio.KTLSTransport fd={self._fd} {state} {self.offload}>"

    def __del__(self) -> None:
        # Without a complete __init__ there is nothing to close.
        sock = getattr(self, "_sock", None)
        if sock is not None and sock.fileno() >= 0 and not self._lost:
            warnings.warn(
                f"unclosed transport {self!r}", ResourceWarning, stacklevel=2, source=self
            )
            sock.close()

    # --- what may be asked -------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what asyncio's own TLS transport knows by ``name``, or a ``KTLSObject`` for ``ktls`` and ``ssl_object``."""
        match name:
            case "peername":
                return self._peername
            case "sockname":
                return self._sockname
            case "socket":
                return TransportSocket(self._sock)
            case "sslcontext":
                context = self.context
                return context if context is not None else default
            case "ssl_object" | "ktls":
                if self._object is None:
                    self._object = KTLSObject(self)
                return self._object
            case "peercert":
                return KTLSObject(self).getpeercert()
            case "cipher":
                return self.established.cipher
            case "compression":
                return self.established.info.compression
            case _:
                return default

    @property
    def context(self) -> ssl.SSLContext | None:
        """The context; None once the connection closes, if nobody else holds it."""
        if hasattr(self, "terms"):
            return self.terms.context
        return self._closer.context() if self._closer is not None else None

    @property
    def offload(self) -> Offload:
        """Where the records are (or were) protected, and why not in the kernel."""
        if self._lost_offload is not None:
            return self._lost_offload
        driver = self._driver
        return Offload(driver.tx_layer, driver.rx_layer, self.established.offload_reason)

    def running_driver(self) -> RecordDriver:
        """Return the driver; ``ValueError`` once the connection has ended."""
        if self._lost:
            raise ValueError("the connection has ended")
        return self._driver

    def refresh_traffic_keys(self, request_peer: bool) -> None:
        """See ``KTLSObject``."""
        try:
            self.running_driver().refresh_traffic_keys(request_peer)
        except BlockingIOError:
            self._wait_for_room()

    def can_write_eof(self) -> bool:
        """Whether ``write_eof`` works: TLS 1.3 has a half close. (Not where the handshake engine protects the records.)"""
        return self.established.version == "TLSv1.3" and self.offload.tx != "engine"

    # --- for the closer ----------------------------------------------------------------------------------------

    @property
    def driver(self) -> RecordDriver:
        """The driver."""
        return self._driver

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        return self._loop

    @property
    def writes_pending(self) -> bool:
        """Whether data waits to be sent."""
        return self._queue is not None

    def watch_for_room(self) -> None:
        """Have the closer go on when TCP has room."""
        self._wait_for_room()

    def unwatch_room(self) -> None:
        """Stop watching: what is waited for now has no event."""
        self._stop_writing()

    def check_acknowledged(self) -> None:
        """``BlockingIOError`` while TCP has something that the peer's has not acknowledged."""
        queued: int = struct.unpack("=i", ioctl(self._fd, SIOCOUTQ, bytes(4)))[0]
        if queued:
            raise BlockingIOError(errno.EAGAIN, f"{queued} bytes are not acknowledged yet")

    def hung_up(self) -> bool:
        """Whether TCP's connection is no more, in both directions."""
        poller = select.poll()
        poller.register(self._fd, 0)  # POLLERR and POLLHUP
        return bool(poller.poll(0))

    # --- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to deliver data; after ``connection_made``."""
        self._start_reading()

    def close(self) -> None:
        """Send what was written, then close_notify, then close; ``connection_lost(None)`` when it is done.

        ``connection_lost(TimeoutError)`` if the peer does not take it all within the shutdown timeout.
        """
        self._close(None)

    def abort(self) -> None:
        """Close at once, without a goodbye; ``connection_lost(None)`` follows. What was written may be lost."""
        self.end(None)

    def _close(self, error: BaseException | None) -> None:
        if self._closing:
            return
        self._closing = True
        self._stop_reading()
        terms = self.terms
        self._closer = Closer(self, error, terms)
        # A peer that is slow to take our last bytes is not to keep the context alive, nor the engine.
        if self.established.tickets is not None:
            self.established.tickets.close()
        del self.terms
        self._closer.begin(self._loop, terms.shutdown_timeout)
        if not self._lost and not self._ended:
            self._reading = True
            self._loop.add_reader(self._fd, self._discard)
            self._loop.call_soon(self._discard)  # what ``poll`` hides must go, too

    def _say_goodbye(self) -> None:
        if self._closer is not None:
            self._closer.go_on()
            return
        try:
            if not say_close_notify(self._driver):
                self._wait_for_room()
                return
            self._stop_writing()
            self._driver.flush()
            shut_down(self._sock)
        except AGAIN:
            # The FIN can't go now without cutting a record off; ``close`` will send it, at the latest.
            if self._driver.unsent:
                self._wait_for_room()
            return
        except OSError as error:
            self._write_failed(error)

    def _discard(self) -> None:
        """While we close: read and drop. See ``closing``."""
        if not self._reading:
            return
        try:
            for _ in range(MAX_READS):
                count = self._driver.receiving.read_now(self._shared.buffer)
                if count <= 0:
                    break
        except OSError:
            count = 0
        if count:
            if count != _NOTHING:
                self._look_soon(self._discard_again)  # the others get their turn
            return
        self._ended = True
        self._stop_reading()
        if self._closer is not None:
            self._closer.go_on()

    def _discard_again(self) -> None:
        self._looking = False
        self._discard()

    def end(self, error: BaseException | None) -> None:
        """End the connection now: nothing more is read or sent, and the protocol will be told ``error``."""
        if self._lost:
            return
        self._closing = True
        self._lost = 1
        if self._closer is not None:
            self._closer.cancel()
        self._stop_reading()
        self._stop_writing()
        self._drop_queue(error)
        self._loop.call_soon(self._call_connection_lost, error)

    def _call_connection_lost(self, error: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._lost_offload = self.offload
            if self._closer is not None:
                drop_unread(self._sock, self._driver)
            self._sock.close()
            if self._closer is not None:
                observer = self._closer.observer
            else:
                observer = self.terms.settings.observer
                if self.established.tickets is not None:
                    self.established.tickets.close()
                del self.terms
            # It holds the secrets, which nobody needs any more.
            del self._driver
            self._protocol = self._closer = self._object = None
            if observer is not None:
                observer.connection_ended(self._lost_offload, error)
            if self._owner is not None:
                self._owner.detach(self)
                self._owner = None

    # --- errors ------------------------------------------------------------------------------------------------

    def _read_failed(self, error: OSError) -> None:
        """The driver has queued an alert if one is due: give it the time that an orderly end gets."""
        self._ended = True
        self._report(error, "Fatal read error on TLS transport")
        self._drop_queue(error)
        self._close(error)

    def _write_failed(self, error: OSError) -> None:
        if isinstance(error, LocalProtocolError) and self._driver.peer_closed:
            error = _closed_early()  # as above; written to in eof_received
        self._report(error, "Fatal write error on TLS transport")
        self._drop_queue(error)
        if self._closer is None:
            self._close(error)
        else:
            self.end(error)

    def _refuse_truncation(self, truncation: TruncatedError | None) -> bool:
        self.truncated = truncation is not None
        if truncation is None or self.terms.suppress_ragged_eofs:
            return False
        self._drop_queue(truncation)
        self._close(truncation)
        return True

    def _closed_by_peer(self) -> None:
        error = None
        if self._queue is not None and self._driver.peer_closed and self.offload.tx != "engine":
            # TLS 1.2: close_notify has closed both directions, "discarding any pending writes" (RFC 5246 §7.2.1).
            error = _closed_early()
            self._drop_queue(error)
        self._close(error)

    def _fatal_error(
        self, error: BaseException, message: str = "Fatal error on TLS transport"
    ) -> None:
        self._report(error, message)
        self.end(error)

    def _force_close(self, error: BaseException | None) -> None:
        # Asked for by asyncio's TLS inside of ours.
        self.end(error)

    def _report(self, error: BaseException, message: str) -> None:
        """As asyncio does: what the network does is no news, what a protocol raises is."""
        if isinstance(error, OSError):
            if self._loop.get_debug():
                _log.debug("%r: %s", self, message, exc_info=error)
            return
        self._loop.call_exception_handler(
            {
                "message": message,
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )


def _closed_early() -> ConnectionResetError:
    return ConnectionResetError(
        errno.ECONNRESET, "the peer closed the connection before everything was sent"
    )
