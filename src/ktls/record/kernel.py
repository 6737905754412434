"""Records protected by the kernel: ``TLS_TX`` and ``TLS_RX`` on a TCP socket.

Theory of operation
-------------------
Once keys are set, plain ``send``, ``recv_into`` and ``sendfile`` are TLS, and that is the whole hot path. Everything else here is about how the kernel
says that something else is next, and about what it does not say (measured on 6.12 and 7.2; kernel documentation: networking/tls.rst):

- A control record makes plain ``recv`` fail with EIO and stay where it is; ``recvmsg`` with a control buffer gets it. So reading
  tries ``recv_into`` first and turns EIO into ``ControlRecord``.
- A plain ``recv`` that returns 0 is the end of TCP, or has met data records without data with a control record behind them. ``recvmsg`` can tell: only the end has no type.
- When the kernel *decrypts* a handshake record that begins with 0x18 (TLS 1.3), it stops opening records until ``TLS_RX`` is set again: EKEYEXPIRED, and silence
  from ``poll``. For a KeyUpdate the new key follows at once (``install``). But a fragment of one, or a continuation that begins
  with that byte by chance, stops it too: then we set the *old* key at its current sequence number before the next read.
- Framing errors are reported once; then reads wait for ever and ``poll`` is silent. After ECONNRESET or EPIPE was reported once,
  ``send`` pretends to succeed and drops the data. So both halves remember their first fatal error.
- A failed read leaves its error in SO_ERROR, where the next send would find it: it is cleared, so that the alert can go out. The kernel also looks at the next
  header before anybody reads; then a send is the first to be told that it is a bad one.
- ``close`` and ``shutdown`` throw away what is still queued above TCP. A *blocking* ``send`` that has returned has no such rest. After a non-blocking one there may be: a kernel thread
  moves it when the peer has acknowledged something, and until it runs even ``SIOCOUTQ == 0`` proves nothing (measured: of 172 closes with small buffers, 2 lost data although it was seen twice).
  So we count. What was given to us, and as many headers and tags as the kernel has made records, has to have been acknowledged (``tcpi_bytes_acked``). ``flush`` is that test.
- ``sendfile`` leaves its last record open as long as less was sent than asked for. If it then finds the end of the file it sends that record off *waiting for room*,
  O_NONBLOCK or not: a slow peer holds the whole event loop. So it is never asked for more than the file has.
- Zero-length records can't be sent, MSG_MORE leaves a record open that ``close`` would lose: neither is ever used.

What this module does not do: it never reads ahead, never decides what a record means, never waits by itself, and does not attach
the ULP to a socket in use (``attach`` belongs right after connect or accept).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import Final, final

from ktls.protocol.enums import ContentType, HandshakeType, ProtocolVersion
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite

from .aead import record_type
from .interface import DEAD_ERRNOS, ControlRecord, LayerName, ReadBuffer, WriteBuffer
from .interruption import of_a_handler
from .linux import (
    CRYPTO_INFO,
    SOL_TLS,
    TCP_ULP,
    TLS_GET_RECORD_TYPE,
    TLS_RX,
    TLS_SET_RECORD_TYPE,
    TLS_TX,
    TLS_TX_MAX_PAYLOAD_LEN,
    pack_crypto_info,
    unpack_rec_seq,
)
from .refusal import refused, refused_for_a_sender
from .tcp import acknowledged, given_to_tcp, queued_by_tcp

__all__ = ("KernelReceiver", "KernelSender", "attach")

_CONTROL_SPACE: Final = socket.CMSG_SPACE(1)
#: The most buffers that one system call takes (UIO_MAXIOV of linux/uio.h).
_IOV_MAX: Final = 1024
#: A function of C: see ``interruption``.
_fileno: Final = socket.socket.fileno
_KEY_UPDATE_BYTE: Final = bytes((HandshakeType.KEY_UPDATE,))


def attach(sock: socket.socket) -> None:
    """Attach the ``tls`` ULP. Until keys are set the socket remains plain TCP.

    To be called right after connect or accept: once the peer has sent FIN it fails with ENOTCONN. Attached already is fine.
    Raises ``OSError``: ENOENT (module absent, or not loaded and we may not load it), ENOTCONN, ENOPROTOOPT/EOPNOTSUPP (not TCP).
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    except OSError as error:
        if error.errno != errno.EEXIST or _ulp(sock) != b"tls":
            raise


def _ulp(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_ULP, 16).rstrip(b"\0")


@final
class KernelSender:
    """``RecordSender`` over ``TLS_TX``. Creating it sets the key; ``OSError`` if the kernel refuses, and the socket is then still plain."""

    __slots__ = (
        "_base",
        "_dead",
        "_first",
        "_octets",
        "_sock",
        "_suite",
        "can_change_key",
        "max_fragment",
    )

    name: LayerName = "kernel"

    def __init__(
        self,
        sock: socket.socket,
        suite: CipherSuite,
        keys: TrafficKeys,
        sequence_number: int = 0,
        *,
        can_change_key: bool,
        max_fragment: int = MAX_FRAGMENT,
    ) -> None:
        self._sock = sock
        self._suite = suite
        self._dead: OSError | None = None
        self.can_change_key = can_change_key
        self.max_fragment = max_fragment
        #: Bytes that TCP had when the present key came into use, and the number of its first record.
        self._base = given_to_tcp(sock)
        self._first = sequence_number
        #: Bytes of plain text accepted under the present key.
        self._octets = 0
        # First what may be refused: once the key is set there is no way back to a plain socket.
        if max_fragment != MAX_FRAGMENT:
            sock.setsockopt(SOL_TLS, TLS_TX_MAX_PAYLOAD_LEN, struct.pack("=H", max_fragment))
        sock.setsockopt(SOL_TLS, TLS_TX, pack_crypto_info(suite, keys, sequence_number))

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """See ``RecordSender``. One system call."""
        if self._dead is not None:
            raise self._dead_again()
        try:
            sent = self._sock.send(data, flags)
        except BaseException as error:
            self._missed(error, len(data))
            raise
        self._octets += sent
        return sent

    def send_vector(self, buffers: list[ReadBuffer], flags: int = 0) -> int:
        """See ``RecordSender``. One system call; the pieces share records."""
        if self._dead is not None:
            raise self._dead_again()
        try:
            sent = self._sock.sendmsg(buffers[:_IOV_MAX], (), flags)
        except BaseException as error:
            self._missed(error, sum(map(len, buffers)))
            raise
        self._octets += sent
        return sent

    def send_record(self, content_type: ContentType, fragment: bytes, flags: int = 0) -> None:
        """See ``RecordSender``."""
        if self._dead is not None:
            raise self._dead_again()
        control = [(SOL_TLS, TLS_SET_RECORD_TYPE, bytes((content_type,)))]
        sent: list[int] = []
        try:
            # One step: see ``interruption``.
            sent += map(self._sock.sendmsg, ((fragment,),), (control,), (flags,))
        except OSError as error:
            self._note(error)
            raise
        finally:
            if sent:
                self._octets += sent[0]

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """See ``RecordSender``. One system call; the kernel reads the file and encrypts, nothing is copied to this process."""
        if self._dead is not None:
            raise self._dead_again()
        sent: list[int] = []
        try:
            left = os.fstat(fd).st_size - offset
            size = min(count, left) if left > 0 else count
            # As in ``send_record``; and after ``fileno`` another thread could close the socket, and the number be somebody else's.
            ours = map(_fileno, (self._sock,))
            sent += map(os.sendfile, ours, (fd,), (offset,), (size,))
        except OSError as error:
            self._note(error)
            raise
        finally:
            if sent:
                self._octets += sent[0]
        return sent[0]

    def install(self, keys: TrafficKeys) -> None:
        """See ``RecordSender``. EBUSY where the kernel has no rekey."""
        info = pack_crypto_info(self._suite, keys, 0)
        before = self._base, self._first, self._octets
        # No call in between: so this can be repeated if an exception of a signal handler comes after the second.
        self._base, self._first, self._octets = self._expected(), 0, 0
        try:
            self._sock.setsockopt(SOL_TLS, TLS_TX, info)
        except OSError as error:
            if not of_a_handler(error):
                self._base, self._first, self._octets = before
            raise
        finally:
            del info  # it holds the key, and tracebacks may show locals

    def sequence_number(self) -> int:
        """See ``RecordSender``. Asks the kernel, which counts every record, whoever sent it."""
        return _rec_seq(self._sock, TLS_TX, self._suite)

    @property
    def unsent(self) -> bool:
        """See ``RecordSender``. What the kernel has accepted it sends."""
        return False

    def flush(self, flags: int = 0) -> None:
        """See ``RecordSender``. All that was accepted has to have been acknowledged by the peer's TCP: see the theory."""
        if self._dead is not None:
            raise self._dead_again()
        queued = queued_by_tcp(self._sock) or self._expected() - acknowledged(self._sock)
        if queued > 0:
            raise BlockingIOError(errno.EAGAIN, f"{queued} bytes are not acknowledged yet")

    def _expected(self) -> int:
        """How many bytes TCP has got, or will get, for everything accepted so far."""
        records = self.sequence_number() - self._first
        return self._base + self._octets + records * self._suite.record_overhead

    @property
    def sock(self) -> socket.socket:
        """The socket."""
        return self._sock

    def _missed(self, error: BaseException, size: int) -> None:
        """Note what ``error`` says of a send of ``size`` bytes that has not returned."""
        if isinstance(error, OSError) and not of_a_handler(error):
            self._note(error)
        else:
            # Before or after it was sent, who knows. If before, ``flush`` will wait for too much, which loses nothing.
            self._octets += size

    def _note(self, error: OSError) -> None:
        """Remember a fatal error. Raises ``RemoteProtocolError`` if it is one of receiving, which nobody has read yet."""
        if error.errno in DEAD_ERRNOS:
            self._dead = error
        elif refused(error.errno):
            # Not cleared by this send: else the error would be its own.
            told = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            refusal = refused_for_a_sender(self._sock, told)
            if refusal is not None:
                raise refusal from error

    def _dead_again(self) -> OSError:
        assert self._dead is not None
        return type(self._dead)(self._dead.errno, self._dead.strerror)


@final
class KernelReceiver:
    """``RecordReceiver`` over ``TLS_RX``. Creating it sets the key; the TCP stream must be at the start of record ``sequence_number``.

    ``OSError`` if the kernel refuses, and this direction is then still raw bytes.
    """

    __slots__ = ("_dead", "_halted", "_sock", "_suite", "can_change_key")

    name: LayerName = "kernel"

    def __init__(
        self,
        sock: socket.socket,
        suite: CipherSuite,
        keys: TrafficKeys,
        sequence_number: int = 0,
        *,
        can_change_key: bool,
    ) -> None:
        self._sock = sock
        self._suite = suite
        self._dead: OSError | None = None
        # Either dead, or stopped by the kernel until the old key is set again.
        self._halted = False
        self.can_change_key = can_change_key
        info = pack_crypto_info(suite, keys, sequence_number)
        try:
            sock.setsockopt(SOL_TLS, TLS_RX, info)
        except OSError as error:
            # EBUSY: no rekey here. It may be the same key, of an attempt that a signal handler's exception has ended too late.
            if error.errno != errno.EBUSY or sock.getsockopt(SOL_TLS, TLS_RX, len(info)) != info:
                raise
        finally:
            del info  # it holds the key, and tracebacks may show locals

    @property
    def sock(self) -> socket.socket:
        """The socket, for reads that need nothing else as long as all is well. What goes wrong is for ``translate``."""
        return self._sock

    @property
    def dead(self) -> bool:
        """Whether a read has failed for good."""
        return self._dead is not None

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """See ``RecordReceiver``. One system call, unless a control record is next."""
        if self._halted:
            self._go_on()
        try:
            count = self._sock.recv_into(buffer, nbytes, flags)
        except OSError as error:
            raise self.translate(error) from None
        if not count and not self._at_eof():
            raise ControlRecord
        return count

    def read_record(self, flags: int = 0) -> InboundPlainMessage | None:
        """See ``RecordReceiver``."""
        if self._halted:
            self._go_on()
        try:
            data, control, _, _ = self._sock.recvmsg(MAX_FRAGMENT, _CONTROL_SPACE, flags)
        except OSError as error:
            if error.errno == errno.EIO:  # with room for the type it can't mean that
                raise
            raise self.translate(error) from None
        if not control:
            return None if not data else InboundPlainMessage(ContentType.APPLICATION_DATA, data)
        level, kind, value = control[0]
        if (level, kind) != (SOL_TLS, TLS_GET_RECORD_TYPE):
            raise AssertionError(f"control message {level}/{kind} on a TLS socket")
        content_type = record_type(value[0])
        if content_type == ContentType.HANDSHAKE and data[:1] == _KEY_UPDATE_BYTE:
            self._halted = self._suite.version is ProtocolVersion.TLSv1_3
        return InboundPlainMessage(content_type, data)

    def record_waits(self) -> bool:
        """Whether ``read_record`` would return a control record or raise a fatal error, also when ``poll`` does not show it; reads nothing.

        For callers who poll by themselves. One byte is peeked: that opens one record at most, so it can't itself hide a KeyUpdate behind data.
        """
        if self._halted:
            self._go_on()
        return self._peek(in_doubt=False)

    def _peek(self, *, in_doubt: bool) -> bool:
        """As ``record_waits``; ``in_doubt`` is the answer where the kernel gives none (no memory)."""
        try:
            data = self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if of_a_handler(error):
                raise
            # Also this may be the one and only report of an error.
            found = isinstance(self.translate(error), ControlRecord) or self._dead is not None
            return found or in_doubt
        return not data and not self._at_eof()

    def splice(self, pipe: int, count: int) -> int:
        """Move up to ``count`` bytes of application data, one record at most, into the pipe ``pipe``; 0 at the end of the TCP stream.

        Raises as ``recv_into`` does.
        """
        # The kernel does not look at the mode of the descriptor here.
        flags = 0 if self._sock.getblocking() else os.SPLICE_F_NONBLOCK
        while True:
            if self._halted:
                self._go_on()
            try:
                ours = map(_fileno, (self._sock,))  # as in ``sendfile``
                [moved] = map(os.splice, ours, (pipe,), (count,), (None,), (None,), (flags,))
            except OSError as error:
                if error.errno == errno.EIO:  # of control records ``splice`` says EINVAL
                    raise
                if error.errno != errno.EINVAL:
                    raise self.translate(error) from None
                # A control record is next, or this was the one and only report of a framing error.
                if self._peek(in_doubt=True):  # then ``read_record`` will say
                    raise ControlRecord from None
                raise self.translate(error) from None
            # 0 is the end of the stream, or a record without data.
            if moved or self._at_eof():
                return moved

    def _at_eof(self) -> bool:
        """Whether the TCP stream has ended, after a read that gave nothing: see the theory."""
        try:
            data, control, _, _ = self._sock.recvmsg(
                1, _CONTROL_SPACE, socket.MSG_PEEK | socket.MSG_DONTWAIT
            )
        except OSError as error:
            if of_a_handler(error):
                raise
            self.translate(error)  # remembers what is reported once
            return False
        return not data and not control

    def install(self, keys: TrafficKeys) -> None:
        """See ``RecordReceiver``. Wakes pollers. EBUSY where the kernel has no rekey."""
        self._sock.setsockopt(SOL_TLS, TLS_RX, pack_crypto_info(self._suite, keys, 0))
        self._halted = False

    def sequence_number(self) -> int:
        """See ``RecordReceiver``. Asks the kernel."""
        return _rec_seq(self._sock, TLS_RX, self._suite)

    def pending(self) -> int:
        """See ``RecordReceiver``. Nothing is ever held here."""
        return 0

    def _go_on(self) -> None:
        """Raise if dead. Else go on with the old key: the kernel has stopped for what was not (yet) a whole KeyUpdate."""
        if self._dead is not None:
            raise self._dead.with_traceback(None)
        size = CRYPTO_INFO[self._suite.aead].size
        try:
            # No local variable for what holds the key: tracebacks may show them.
            self._sock.setsockopt(SOL_TLS, TLS_RX, self._sock.getsockopt(SOL_TLS, TLS_RX, size))
        except OSError as error:
            if error.errno != errno.EBUSY:  # EBUSY: no rekey, so it had not stopped either
                raise
        # Not sooner: after an error it still stands.
        self._halted = False

    def translate(self, error: OSError) -> Exception:
        """Turn the errno of a read into what the contract says, and remember it if it is fatal."""
        if error.errno == errno.EIO:
            return ControlRecord()
        if refusal := refused(error.errno):
            self._dead = refusal
            # The error may be told only once: another one must not hide it.
            with contextlib.suppress(OSError):
                self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # clears it
        elif error.errno in DEAD_ERRNOS:
            self._dead = error
        else:
            return error
        self._halted = True
        return self._dead


def _rec_seq(sock: socket.socket, direction: int, suite: CipherSuite) -> int:
    # The answer holds the key as well: it goes no further than this line.
    return unpack_rec_seq(sock.getsockopt(SOL_TLS, direction, CRYPTO_INFO[suite.aead].size))
