"""The blocking front end: ``KTLSSocket``, a ``socket.socket`` whose bytes are TLS.

Code written for ``ssl.SSLSocket`` works on it unchanged. Underneath a driver runs the records; this module only waits.

How it waits is in ``waiting``. Applications with non-blocking sockets poll by themselves. For them each short read is followed by a look for control records that ``poll`` would hide (``driver.settle``).
"""

from __future__ import annotations

import errno
import functools
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final

from ktls.handshake.engine import HandshakeEngine, engine_for
from ktls.handshake.handoff import Offload, RecordDriver, hand_off, prepare
from ktls.protocol.errors import LocalProtocolError, TruncatedError
from ktls.protocol.limits import KeyUsage

from .established import Established
from .handover import HandoverSocket
from .pump import HandshakePump
from .settings import Settings
from .waiting import for_read, for_write

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from ktls.handshake.result import HandshakeResult

__all__ = ("KTLSSocket",)

#: ``recv(n)`` allocates n bytes; more than this at once only costs memory.
_MAX_RECV: Final = 256 * 1024


class KTLSSocket(HandoverSocket):
    """A TLS connection over TCP, protected by the kernel where it can. Made by ``SSLContext.wrap_socket`` or ``ktls.wrap_socket``.

    As ``ssl.SSLSocket``: timeouts and non-blocking mode (``ssl.SSLWantReadError``, ``ssl.SSLWantWriteError``), ``makefile``, ``suppress_ragged_eofs``, listening
    sockets whose ``accept`` wraps. More than it: ``offload``, ``key_usage``, ``refresh_traffic_keys``, ``sendfile`` without a copy, ``recvfile``, half close.

    One thread may read while another writes and a third refreshes keys.
    """

    __slots__ = (
        "_context",
        "_established",
        "_handshake_on_connect",
        "_prepared",
        "_pump",
        "_server_hostname",
        "_server_side",
        "_session",
        "_unavailable",
        "_unreported",
    )

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        settings: Settings,
        server_side: bool = False,
        server_hostname: str | None = None,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._driver = None
        self._established = None  # both for ``repr``, should we not get any further
        # Refuses a context that is not ssl's own, before the socket changes hands.
        engine_for(context)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            raise NotImplementedError("only stream sockets are supported")
        if server_side and (server_hostname or session is not None):
            raise ValueError("server_hostname and session can only be specified in client mode")
        if context.check_hostname and not server_side and not server_hostname:
            raise ValueError("check_hostname requires server_hostname")
        super().__init__(sock, settings=settings, suppress_ragged_eofs=suppress_ragged_eofs)
        self._context = context
        self._begin(server_side, server_hostname)
        self._handshake_on_connect = do_handshake_on_connect
        self._session = session
        try:
            if self._is_connected():
                self._connected()
        except BaseException:
            self.close()
            raise

    def _begin(self, server_side: bool, server_hostname: str | None) -> None:
        self._server_side = server_side
        self._server_hostname = server_hostname
        self._pump: tuple[HandshakePump, HandshakeEngine] | None = None
        self._prepared = False
        self._unavailable: str | None = None
        self._unreported = b""

    def _resumed(self, server_side: bool, server_hostname: str | None) -> None:
        self._begin(server_side, server_hostname)
        self._handshake_on_connect = False
        self._session = None
        self._prepared = True

    def __repr__(self) -> str:
        if self._driver is not None:
            state = f"{self.offload}"
        elif self._established is None:
            state = "no handshake yet"
        else:
            state = "exported" if self.fileno() >= 0 else "closed"
        return f"<ktls.KTLSSocket fd={self.fileno()} {self.version()} {state}>"

    # --- before the handshake ----------------------------------------------------------------------------------

    @property
    def context(self) -> ssl.SSLContext:
        """The context that the socket was made with. ``AttributeError`` after ``from_state``: contexts stay where they are."""
        return self._context

    @property
    def server_side(self) -> bool:
        """Whether we are the server."""
        return self._server_side

    @property
    def server_hostname(self) -> str | None:
        """The name of the server that was asked for; on a server, the one that the client asked for (SNI)."""
        if self._server_side and self._established is not None:
            return self._established.info.server_name
        return self._server_hostname

    def connect(self, address: Any) -> None:
        """Connect, and shake hands unless ``do_handshake_on_connect`` is off."""
        self._check_may_connect()
        super().connect(address)
        self._connected()

    def connect_ex(self, address: Any) -> int:
        """Connect as ``connect`` does, but return an errno instead of raising for errors of the connect call."""
        self._check_may_connect()
        error = super().connect_ex(address)
        if not error:
            self._connected()
        return error

    def _check_may_connect(self) -> None:
        if self._server_side:
            raise ValueError("can't connect in server-side mode")
        if self._prepared:
            raise ValueError("attempt to connect already-connected KTLSSocket!")

    def accept(self) -> tuple[KTLSSocket, Any]:
        """Accept a connection and wrap it with the settings of this socket; shakes hands unless that is off."""
        sock, address = super().accept()
        try:
            return self._wrap_accepted(sock), address
        except BaseException:
            sock.close()
            raise

    def _wrap_accepted(self, sock: socket.socket) -> KTLSSocket:
        return type(self)(
            sock,
            self._context,
            settings=self._settings,
            server_side=True,
            do_handshake_on_connect=self._handshake_on_connect,
            suppress_ragged_eofs=self._suppress_ragged_eofs,
        )

    def _is_connected(self) -> bool:
        try:
            self.getpeername()
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EINVAL):
                raise
            return False
        return True

    def _connected(self) -> None:
        self._prepare()
        if self._handshake_on_connect:
            if self.gettimeout() == 0.0:
                raise ValueError(
                    "do_handshake_on_connect should not be specified for non-blocking sockets"
                )
            self.do_handshake()

    def _prepare(self) -> None:
        self._prepared = True
        self._unavailable = prepare(self._raw, self._settings.offload)

    def do_handshake(self, block: bool = False) -> None:
        """Shake hands; does nothing if that was done. ``block``: without a timeout, whatever the socket's.

        Raises what the engine raises (``ssl.SSLCertVerificationError``, ...), ``OffloadError``, ``TimeoutError``, ``ssl.SSLWantReadError``.
        """
        if self._driver is not None:
            return
        self._refuse_exported()
        timeout = self.gettimeout()
        if block and timeout == 0.0:
            self.settimeout(None)
        try:
            if self._pump is None:
                self._pump = self._start()
            pump, engine = self._pump
            self.perform(pump.run, lambda: pump.wants_write, "handshake")
            self._pump = None
            self._hand_off(engine.result())
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError as error:
            if self._settings.observer is not None:
                self._settings.observer.handshake_failed(error)
            raise
        finally:
            if block and timeout == 0.0:
                self.settimeout(timeout)

    def _hand_off(self, result: HandshakeResult) -> None:
        observer = self._settings.observer
        self._driver, reason = hand_off(
            self._raw,
            result,
            policy=self._settings.offload,
            unavailable=self._unavailable,
            limits=self._settings.key_limits,
            on_key_change=observer.key_changed if observer is not None else None,
        )
        self._established = established = Established.of(result, reason)
        self._own()
        self._session = None
        cache, key = self._settings.session_cache, self._cache_key()
        if cache is not None and key is not None and result.tickets is not None:
            result.tickets.subscribe(functools.partial(cache.store, key))
        if observer is not None:
            reused = established.info.session_reused
            observer.handshake_completed(
                established.version, established.cipher[0], reused, self.offload
            )

    def _start(self) -> tuple[HandshakePump, HandshakeEngine]:
        self.getpeername()  # ENOTCONN is clearer than what the engine would say
        if not self._prepared:  # a connect that did not wait has ended meanwhile
            self._prepare()
        cache, key = self._settings.session_cache, self._cache_key()
        if cache is not None and key is not None and self._session is None:
            self._session = cache.take(key)
        engine = engine_for(self._context)(
            self._context,
            server_side=self._server_side,
            server_hostname=self._server_hostname,
            session=self._session,
            keep_session=self._settings.keep_session,
        )
        return HandshakePump(self._raw, engine), engine

    def _cache_key(self) -> tuple[str, int] | None:
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if self._server_side or not self._server_hostname or not internet:
            return None
        return self._server_hostname, int(self.getpeername()[1])

    # --- what is going on --------------------------------------------------------------------------------------

    @property
    def offload(self) -> Offload:
        """Where the records are protected, and why not in the kernel. ``ValueError`` before the handshake."""
        driver, facts = self._running(), self._facts()
        return Offload(driver.tx_layer, driver.rx_layer, facts.offload_reason)

    @property
    def key_usage(self) -> KeyUsage:
        """Records protected by the current keys, exactly, from the record layers' own counters. ``ValueError`` before the handshake."""
        return self._running().key_usage()

    def refresh_traffic_keys(self, request_peer: bool = False) -> None:
        """Change our sending key (KeyUpdate), and ask the peer to change its own with ``request_peer``.

        ``LocalProtocolError``: TLS 1.2, a kernel without rekey, our side is closed; nothing changed. On a non-blocking socket, or after a ``TimeoutError``, the change may still
        be pending; it happens before the next data is sent.
        """
        driver = self._ready()
        try:
            driver.refresh_traffic_keys(request_peer)
        except BlockingIOError:
            if self.gettimeout() != 0.0:
                self.perform(lambda: self._push_owed(driver), for_write)

    @staticmethod
    def _push_owed(driver: RecordDriver) -> None:
        driver.run_owed()
        if driver.unsent:
            driver.flush()  # says so if the connection is gone, which ``run_owed`` never does
        if driver.owes:
            raise BlockingIOError(errno.EAGAIN, "commands are still owed")

    def pending(self) -> int:
        """Return how many decrypted bytes can be read that ``poll`` does not show."""
        return self._driver.pending() if self._driver is not None else 0

    def _running(self) -> RecordDriver:
        self._refuse_exported()
        if self._driver is None:
            raise ValueError("handshake not done yet")
        return self._driver

    def _ready(self) -> RecordDriver:
        """Return the driver, shaking hands first if that was put off."""
        if self._driver is None:
            self.do_handshake()
        return self._running()

    def _resume(self, session: ssl.SSLSession) -> None:
        if self._server_side:
            raise ValueError("Cannot set session for server-side SSLSocket")
        self._session = session

    def _real_close(self) -> None:
        observer = self._settings.observer
        if observer is None or self._driver is None:
            super()._real_close()
            return
        offload, failure = self.offload, None
        try:
            super()._real_close()
        except OSError as error:
            failure = error
            raise
        finally:
            observer.connection_ended(offload, failure)

    def _release(self) -> None:
        tickets = self._established.tickets if self._established is not None else None
        if tickets is not None and self._is_own():  # else a lock may be held that nobody opens
            tickets.close()
        super()._release()

    # --- receiving ---------------------------------------------------------------------------------------------

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        """Receive into ``buffer``; 0 at the end. Raises ``KTLSError`` of several kinds (see ``ktls.protocol.errors``), ``OSError``, ``TimeoutError``."""
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to recv_into() on {type(self)}")
        with memoryview(buffer).cast("B") as view:
            size = min(nbytes or len(view), len(view))
            if size < 0:
                raise ValueError("negative nbytes in recv_into")
            return self._recv_into(view, size) if size else 0

    def recv(self, bufsize: int = 1024, flags: int = 0) -> bytes:
        """Receive up to ``bufsize`` bytes; b"" at the end. Raises as ``recv_into``."""
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to recv() on {type(self)}")
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        if not bufsize:
            return b""
        buffer = bytearray(min(bufsize, _MAX_RECV))
        count = self._recv_into(buffer, len(buffer))
        del buffer[count:]
        return bytes(buffer)

    def read(self, len: int = 1024, buffer: WriteableBuffer | None = None) -> int | bytes:  # noqa: A002  # ssl.SSLSocket's name for it
        """Receive as ``ssl.SSLSocket.read`` does: bytes, or a count if there is a ``buffer``."""
        return self.recv(len) if buffer is None else self.recv_into(buffer, len)

    def _recv_into(self, buffer: bytearray | memoryview, size: int) -> int:
        driver = self._driver or self._ready()
        try:
            try:
                count = driver.recv_into(buffer, size, self._read_flags)
            except BlockingIOError:
                count = self.perform(
                    lambda: driver.recv_into(buffer, size, self._read_flags), for_read
                )
        except TruncatedError:
            self._refuse_closed()
            if not self._suppress_ragged_eofs:
                raise
            return 0
        if count < size and self.gettimeout() == 0.0:
            driver.settle()
        return count

    # --- sending -----------------------------------------------------------------------------------------------

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """Send; return how many bytes were accepted. Raises ``KTLSError`` of several kinds, ``OSError``, ``TimeoutError``."""
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to send() on {type(self)}")
        driver = self._driver or self._ready()
        view = data if isinstance(data, bytes | bytearray) else memoryview(data).cast("B")
        if self._unreported:
            return self._report(driver, view)
        try:
            sent = driver.send(view)
        except BlockingIOError:
            sent = self.perform(lambda: driver.send(view), for_write)
        if driver.unsent:
            self._push_out(driver, view, sent)
        return sent

    def _push_out(
        self, driver: RecordDriver, view: bytes | bytearray | memoryview, sent: int
    ) -> None:
        """Get out what was accepted but is still in this process (never with kernel TLS): the application may only read from here on.

        If ``send`` can't wait (so long) for that, then as OpenSSL does, it asks to be called again with the same data, and reports it then.
        """
        try:
            self.perform(lambda: driver.flush(), for_write)
        except (ssl.SSLWantWriteError, TimeoutError):
            self._unreported = bytes(view[:sent])
            raise

    def _report(self, driver: RecordDriver, view: bytes | bytearray | memoryview) -> int:
        count = min(len(view), len(self._unreported))
        if bytes(view[:count]) != self._unreported[:count]:
            raise LocalProtocolError("after SSLWantWriteError the same data must be sent again")
        if driver.failure is not None:
            raise driver.failure.with_traceback(None)
        self.perform(lambda: driver.flush(), for_write)
        self._unreported = self._unreported[count:]
        return count

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        """Send all of ``data``. After an exception it is unknown how much was accepted."""
        with memoryview(data) as whole, whole.cast("B") as view:
            size = len(view)
            sent = self.send(view, flags)
            while sent < size:
                self._ready().settle(read_ahead=True)  # as in ``sendfile``
                sent += self.send(view[sent:], flags)

    def write(self, data: ReadableBuffer) -> int:
        """Send as ``ssl.SSLSocket.write`` does."""
        return self.send(data)
