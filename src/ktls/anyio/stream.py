"""``KTLSStream``: a TLS connection as a byte stream of anyio.

Theory of operation
-------------------
How it waits is in ``waiting``.

Cancellation never tears a record or a change of keys: the driver's steps do not wait, and what they have left to do is done by the next call. It may tear an *item* of ``send`` in two.
Then nobody knows how much of it will arrive, and a close_notify would tell the peer that it has got everything. So the sending side is broken from there on, and ``aclose`` ends TCP
without close_notify, which the peer reports as truncation.

What this module does not do: threads. A stream belongs to its event loop.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, ResourceGuard
from anyio.abc import ByteStream, SocketStream
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from ktls.closing import drop_unread, try_finish
from ktls.context import create_default_context
from ktls.files import SendableFile, regular_file
from ktls.protocol.errors import LocalProtocolError, TruncatedError
from ktls.record.meter import MAX_PIECE
from ktls.settings import Settings, settings_of

from .attributes import attributes_of
from .opening import Opened, Opening, take_over
from .waiting import WaitingStream

__all__ = ("KTLSStream",)

#: ``receive(n)`` allocates n bytes while it tries; more than this at once only costs memory.
_MAX_RECEIVE: Final = 256 * 1024
#: Bytes of a file without a descriptor, read and sent at once.
_COPY_SIZE: Final = 256 * 1024
#: Seconds between two looks whether the peer has acknowledged everything, the first and the last.
_FIRST_TICK: Final = 0.001
_LAST_TICK: Final = 0.05


@final
class KTLSStream(WaitingStream, ByteStream):
    """A TLS connection over TCP, protected by the kernel where it can. Made by ``wrap``, ``connect_tcp`` or a ``KTLSListener``.

    Extra attributes: all of ``SocketAttribute``, all of ``KTLSAttribute``, and all of ``TLSAttribute`` but ``shared_ciphers``. ``TLSAttribute.ssl_object`` is no ``ssl.SSLObject``, but
    has its query methods.
    """

    def __init__(self, opened: Opened, settings: Settings, *, standard_compatible: bool) -> None:
        """Not for applications: use ``wrap``."""
        super().__init__(opened.sock, opened.driver)
        self._opened = opened
        self._settings = settings
        self._standard_compatible = standard_compatible
        self._receiving = ResourceGuard("reading from")
        self._sending = ResourceGuard("writing to")
        #: Whether a part of an item was sent, and the rest was not.
        self._torn = False
        self._said_eof = False

    @classmethod
    async def wrap(
        cls,
        transport_stream: SocketStream | socket.socket,
        *,
        server_side: bool | None = None,
        hostname: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        standard_compatible: bool = True,
        settings: Settings | None = None,
    ) -> KTLSStream:
        """Shake hands over a connection, and take it over: ``transport_stream`` is closed (a socket: detached), whatever comes of it.

        ``server_side`` is True if left out without a ``hostname``; ``ssl_context`` is ``ktls.create_default_context()`` if left out. ``standard_compatible=False``: the end of TCP
        is the end of the stream, with or without close_notify (ours is sent in any case). ``settings`` says what a plain context can't.

        Raises ``TypeError`` for a transport that is no plain TCP connection, or a foreign context; ``ssl.SSLError`` if the handshake fails, ``BrokenResourceError`` if the
        connection ends in it. Cancelled, or after an error, the connection is closed.
        """
        if server_side is None:
            server_side = not hostname
        if ssl_context is None:
            purpose = ssl.Purpose.CLIENT_AUTH if server_side else ssl.Purpose.SERVER_AUTH
            ssl_context = create_default_context(purpose)
        if settings is None:
            settings = settings_of(ssl_context)
        sock, early = await take_over(transport_stream)
        try:
            opening = Opening(
                sock, ssl_context, server_side=server_side, hostname=hostname, settings=settings
            )
            opened = await opening.run(early)
            return cls(opened, settings, standard_compatible=standard_compatible)
        except BaseException:
            drop_unread(sock)  # so that an alert gets through
            sock.close()
            raise

    def __repr__(self) -> str:
        state = "closed" if self._closed else str(self._opened.offload)
        return f"<ktls.anyio.KTLSStream fd={self._sock.fileno()} {self._opened.facts.version()} {state}>"

    # --- receiving ---------------------------------------------------------------------------------------------

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive between 1 and ``max_bytes`` bytes. Cancelled, it has taken nothing.

        Raises ``EndOfStream`` after the peer's close_notify, ``BrokenResourceError`` if the connection ended otherwise (its cause is a ``KTLSError`` or an ``OSError``;
        ``TruncatedError`` without close_notify), ``ClosedResourceError`` after or during ``aclose``, ``BusyResourceError`` if another task is receiving.
        """
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        with self._receiving:
            read = functools.partial(self._read, min(max_bytes, _MAX_RECEIVE))
            data = await self._attempt(read, self._wait_readable)
        if not data:
            raise EndOfStream
        return data

    def _read(self, size: int) -> bytes:
        # Allocated for each try: a connection that waits holds no buffer.
        buffer = bytearray(size)
        try:
            count = self._driver.recv_into(buffer, size)
        except TruncatedError:
            if self._standard_compatible:
                raise
            return b""
        del buffer[count:]
        return bytes(buffer)

    # --- sending -----------------------------------------------------------------------------------------------

    async def send(self, item: bytes) -> None:
        """Send all of ``item``.

        Cancelled (or after an error) when a part was sent already, the sending side is broken: the stream can only be received from, and closed. Cancelled before that, nothing
        has happened.

        Raises ``BrokenResourceError`` if the connection has ended (its cause is a ``KTLSError`` or an ``OSError``), ``ClosedResourceError`` after ``send_eof``, and after or
        during ``aclose``, ``BusyResourceError`` if another task is sending.
        """
        with self._sending:
            self._check_may_send()
            await self._send(memoryview(item).cast("B"))

    async def _send(self, view: memoryview) -> None:
        if not view:
            await checkpoint()
        while view:
            view = view[await self._send_some(view) :]
            self._torn = len(view) > 0
            await self._push_out(last=not view)

    async def _send_some(self, view: memoryview) -> int:
        return await self._attempt(functools.partial(self._driver.send, view), self._wait_writable)

    async def _push_out(self, *, last: bool) -> None:
        """After each piece that was accepted: get it out of this process (kernel TLS never has it there), and see to what has come meanwhile."""
        if self._driver.unsent:
            await self._attempt(self._driver.flush, self._wait_writable)
        if not last:
            self._settle()

    def _check_may_send(self) -> None:
        self._check_open()
        if self._said_eof:
            raise ClosedResourceError
        if self._torn:
            raise BrokenResourceError("an item was sent in part only")

    async def send_eof(self) -> None:
        """Close our side with close_notify, behind everything sent; receiving goes on. TCP's own end is left to ``aclose``.

        ``NotImplementedError`` before TLS 1.3, where close_notify ends both directions. Otherwise raises as ``send``.
        """
        version = self._opened.facts.version()
        if version != "TLSv1.3":
            raise NotImplementedError(f"only TLS 1.3 can close one direction, this is {version}")
        with self._sending:
            self._check_open()
            if self._torn:
                raise BrokenResourceError("an item was sent in part only")
            self._said_eof = True
            close = functools.partial(self._driver.close_notify, patience=0)
            await self._attempt(close, self._wait_writable)
            await self._push_out(last=True)

    async def refresh_traffic_keys(self, request_peer: bool = False) -> None:
        """Change our sending key (KeyUpdate), and ask the peer to change its own with ``request_peer``. May be called while other tasks send and receive.

        ``LocalProtocolError``: TLS 1.2, a kernel without rekey, our side is closed; nothing changed. Cancelled, the change may still be pending; it happens before the next data
        is sent. Otherwise raises as ``send``.
        """
        await checkpoint_if_cancelled()
        self._check_open()
        try:
            self._driver.refresh_traffic_keys(request_peer)
        except BlockingIOError:
            pass
        except LocalProtocolError:
            raise
        except OSError as error:
            raise self._broken(error) from error
        await self._attempt(self._push_owed, self._wait_writable)

    def _push_owed(self) -> None:
        self._driver.run_owed()
        if self._driver.unsent:
            self._driver.flush()  # reports an error that lasts, which the other does not
        if self._driver.owes:
            raise BlockingIOError(errno.EAGAIN, "commands are still owed")

    # --- files -------------------------------------------------------------------------------------------------

    async def sendfile(
        self,
        file: SendableFile | anyio.AsyncFile[bytes],
        offset: int = 0,
        count: int | None = None,
    ) -> int:
        """Send ``file`` from ``offset``, ``count`` bytes or up to its end; return how many bytes were sent, less if the file is shorter.

        With kernel TLS that is ``os.sendfile``: nothing is copied to this process, and the disk is waited for in the event loop's thread, as asyncio does it. Files without a
        descriptor are read (in a worker thread) and sent. The file's position is behind the last byte sent, also after an exception or a cancellation, which otherwise leave what
        ``send`` leaves. ``ValueError`` for a file in text mode or a ``count`` below 1. Otherwise raises as ``send``, and ``OSError`` from the file.
        """
        source: Any = file.wrapped if isinstance(file, anyio.AsyncFile) else file
        if "b" not in getattr(source, "mode", "b"):
            raise ValueError("file should be opened in binary mode")
        if count is not None and count <= 0:
            raise ValueError(f"count must be a positive integer (got {count!r})")
        with self._sending:
            self._check_may_send()
            fd = regular_file(source)
            if fd is None:
                return await self._copy(source, offset, count)
            return await self._sendfile(source, fd, offset, count)

    async def _sendfile(self, file: Any, fd: int, offset: int, count: int | None) -> int:
        total = 0
        try:
            while count is None or total < count:
                piece = MAX_PIECE if count is None else min(MAX_PIECE, count - total)
                send = functools.partial(self._driver.sendfile, fd, offset + total, piece)
                sent = await self._attempt(send, self._wait_writable)
                if not sent:
                    break
                total += sent
                self._torn = total != count
                await self._push_out(last=False)
            self._torn = False
        finally:
            if total:
                file.seek(offset + total)
        return total

    async def _copy(self, file: Any, offset: int, count: int | None) -> int:
        if offset:
            file.seek(offset)
        read = sent = 0
        try:
            while count is None or read < count:
                size = _COPY_SIZE if count is None else min(_COPY_SIZE, count - read)
                view = memoryview(await anyio.to_thread.run_sync(file.read, size))
                if not view:
                    break
                read += len(view)
                while view:
                    accepted = await self._send_some(view)
                    sent += accepted
                    view = view[accepted:]
                    self._torn = True
                    await self._push_out(last=False)
            self._torn = False
        except BaseException:
            with contextlib.suppress(OSError, TypeError):  # where that can't be done
                file.seek(sent - read, os.SEEK_CUR)
            raise
        return sent

    # --- the end -----------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Deliver everything sent, say close_notify, and close. Does not wait for the peer's close_notify; what it still sends is dropped.

        Takes as long as the peer takes to acknowledge everything, at most ``settings.shutdown_timeout`` seconds: then ``BrokenResourceError`` caused by ``TimeoutError``, for
        data was lost. Tasks that are in ``receive`` or ``send`` get ``ClosedResourceError``. Cancelled (``anyio.aclose_forcefully``), it closes at once, without close_notify.
        """
        if self._closed:
            await checkpoint()
            return
        self._closed = True
        anyio.notify_closing(self._sock)
        try:
            await checkpoint()
            if not self._torn:
                await self._finish()
        finally:
            self._release()

    async def _finish(self) -> None:
        timeout = self._settings.shutdown_timeout
        with anyio.move_on_after(timeout) as scope:
            try:
                await self._deliver()
            except OSError:
                pass  # the peer has gone: that is what closing is for
        if scope.cancelled_caught:
            self._error = TimeoutError(
                errno.ETIMEDOUT, f"the peer did not take all data within {timeout:g} seconds"
            )
            raise BrokenResourceError from self._error
        drop_unread(self._sock, self._driver)

    async def _deliver(self) -> None:
        """Wait until the peer's TCP has everything. There is no event for that; see ``ktls.closing``."""
        tick = _FIRST_TICK
        poller = select.poll()
        poller.register(self._sock, 0)
        while not try_finish(self._sock, self._driver):
            if any(events & select.POLLHUP for _, events in poller.poll(0)):
                return  # nobody is there who could acknowledge anything
            drop_unread(self._sock, self._driver)  # a peer that has to send first can go on
            await anyio.sleep(tick)
            tick = min(2 * tick, _LAST_TICK)

    def _release(self) -> None:
        self._sock.close()
        tickets = self._opened.established.tickets
        if tickets is not None:
            tickets.close()
        if self._settings.observer is not None:
            self._settings.observer.connection_ended(self._opened.offload, self._error)

    # --- facts -------------------------------------------------------------------------------------------------

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """See the class."""
        return attributes_of(self._opened, self._standard_compatible)
