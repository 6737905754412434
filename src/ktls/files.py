"""Files: ``sendfile`` into a TLS connection, ``recvfile`` out of one, without a copy where the kernel protects the records."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import socket
import stat
from fcntl import F_SETPIPE_SZ, fcntl
from typing import IO, Any, Final, Protocol, TypeAlias, final

from ktls.handshake.handoff import RecordDriver
from ktls.protocol.errors import TruncatedError
from ktls.record.meter import MAX_PIECE

from .waiting import WaitingSocket, for_read, for_write

__all__ = (
    "FileCopier",
    "FileMover",
    "FileSocket",
    "FileSplicer",
    "Pipe",
    "SendableFile",
    "regular_file",
)

_COPY_SIZE: Final = 64 * 1024
_PIPE_SIZE: Final = 256 * 1024


class SendableFile(Protocol):
    """What ``sendfile`` needs of a file; with a ``fileno`` of a regular file nothing is copied."""

    def read(self, size: int, /) -> bytes:
        """Read up to ``size`` bytes; b"" at the end."""
        ...

    def seek(self, offset: int, /) -> object:
        """Set the position."""
        ...


def regular_file(file: Any) -> int | None:
    """Return the descriptor of a regular file, or None for whatever else can be read or written."""
    try:
        fd: int = file.fileno()  # BytesIO has one that raises, other readers have none
        return fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except (AttributeError, io.UnsupportedOperation):
        return None


@final
class Pipe:
    """A pipe for ``splice``, which never waits at its ends: the socket is what one waits for."""

    __slots__ = ("reads", "writes")

    def __init__(self) -> None:
        self.reads, self.writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # users with many big pipes get no more of them
            fcntl(self.writes, F_SETPIPE_SZ, _PIPE_SIZE)

    def __del__(self) -> None:
        for fd in (self.reads, self.writes):
            os.close(fd)


@final
class FileSplicer:
    """Moves decrypted records through a pipe into a file: two system calls a record, no copy in this process."""

    __slots__ = ("_driver", "_file", "_offset", "_pipe")

    def __init__(self, driver: RecordDriver, pipe: Pipe, file: IO[bytes]) -> None:
        self._driver = driver
        self._pipe = pipe
        self._file = file
        self._offset = file.tell()

    def move(self, count: int) -> int:
        """Move up to ``count`` bytes; 0 at the end. ``BlockingIOError`` if nothing has come."""
        moved = self._driver.splice(self._pipe.writes, count)
        left = moved
        while left:
            written = self._write(left)
            self._offset += written
            left -= written
        return moved

    def _write(self, count: int) -> int:
        fd = self._file.fileno()
        try:
            return os.splice(self._pipe.reads, fd, count, offset_dst=self._offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # Some files can't be spliced into (O_APPEND, a few file systems).
        data = os.read(self._pipe.reads, count)
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], self._offset + written)
        return written

    def finish(self) -> None:
        """Set the position of the file behind what was written."""
        self._file.seek(self._offset)


@final
class FileCopier:
    """Reads decrypted bytes and writes them."""

    __slots__ = ("_buffer", "_driver", "_file", "_flags")

    def __init__(self, driver: RecordDriver, file: IO[bytes], flags: int) -> None:
        self._driver = driver
        self._file = file
        self._flags = flags
        self._buffer = bytearray(_COPY_SIZE)

    def move(self, count: int) -> int:
        """Move up to ``count`` bytes; 0 at the end. ``BlockingIOError`` if nothing has come."""
        moved = self._driver.recv_into(self._buffer, min(count, len(self._buffer)), self._flags)
        written = 0
        with memoryview(self._buffer) as view:
            while written < moved:  # raw files may take only a part
                written += self._write(view[written:moved])
        return moved

    def _write(self, data: memoryview) -> int:
        try:
            written: int | None = self._file.write(data)
        except BlockingIOError:
            written = None  # must not be taken for the socket's
        if written is None:
            raise ValueError("non-blocking files are not supported")
        return written

    def finish(self) -> None:
        """Hold nothing back."""
        self._file.flush()


#: Either of them.
FileMover: TypeAlias = FileSplicer | FileCopier


class FileSocket(WaitingSocket):
    """A TLS socket that can send and receive files. ``_ready`` and ``send`` are its subclass's."""

    __slots__ = ("_pipe", "_suppress_ragged_eofs")

    def __init__(self, sock: socket.socket, *, suppress_ragged_eofs: bool) -> None:
        super().__init__(sock)
        self._suppress_ragged_eofs = suppress_ragged_eofs
        self._pipe: Pipe | None = None

    def _ready(self) -> RecordDriver:
        raise NotImplementedError

    def sendfile(self, file: SendableFile, offset: int = 0, count: int | None = None) -> int:
        """Send ``file`` from ``offset``, ``count`` bytes or up to its end; return how many bytes were sent, less if the file is shorter.

        With kernel TLS that is ``os.sendfile``: nothing is copied to this process, keys are metered and refreshed in time. Files without a descriptor are read and sent.
        The file's position is behind the last byte sent, also after an exception. ``ValueError`` on non-blocking sockets, as ``socket.sendfile``.
        """
        if "b" not in getattr(file, "mode", "b"):
            raise ValueError("file should be opened in binary mode")
        if count is not None and count <= 0:
            raise ValueError(f"count must be a positive integer (got {count!r})")
        if self.gettimeout() == 0.0:
            raise ValueError("non-blocking sockets are not supported")
        driver = self._ready()
        fd = regular_file(file)
        if fd is None:
            return self._sendfile_use_send(file, offset, count)
        total = 0
        try:
            while count is None or total < count:
                piece = MAX_PIECE if count is None else min(MAX_PIECE, count - total)
                sent = self.perform(
                    functools.partial(driver.sendfile, fd, offset + total, piece), for_write
                )
                if not sent:
                    break
                total += sent
                if driver.unsent:
                    self.perform(lambda: driver.flush(), for_write)
                # Nobody may be reading while we send for long: a KeyUpdate, or an alert, must not wait for the end.
                driver.settle(read_ahead=True)
        finally:
            if total:
                file.seek(offset + total)
        return total

    def _sendfile_use_send(self, file: SendableFile, offset: int, count: int | None) -> int:
        if offset:
            file.seek(offset)
        total = 0
        while count is None or total < count:
            data = file.read(_PIPE_SIZE if count is None else min(_PIPE_SIZE, count - total))
            if not data:
                break
            with memoryview(data) as view:
                sent = 0
                try:
                    while sent < len(view):
                        sent += self.send(view[sent:])
                except BaseException:
                    seek: Any = file.seek
                    with contextlib.suppress(OSError, TypeError):  # where that can't be done
                        seek(sent - len(view), os.SEEK_CUR)
                    raise
            total += sent
            self._ready().settle(read_ahead=True)  # as in ``sendfile``
        return total

    def recvfile(self, file: IO[bytes], count: int | None = None) -> int:
        """Receive ``count`` bytes (None: all until the end) into ``file`` at its position; return how many came before the end.

        Uses ``splice``: what the kernel decrypts goes into the file without passing through this process. Otherwise, copies.
        Raises as ``recv_into``, and ``OSError`` from the file; bytes that were on their way into it are lost then, so close the connection.
        """
        driver = self._ready()
        file.flush()
        spliceable = driver.rx_layer == "kernel" and not driver.pending()
        if spliceable and regular_file(file) is not None:
            mover: FileMover = FileSplicer(driver, self._get_pipe(), file)
        else:
            mover = FileCopier(driver, file, self._read_flags)
        total = 0
        try:
            while count is None or total < count:
                want = _PIPE_SIZE if count is None else min(_PIPE_SIZE, count - total)
                moved = self.perform(functools.partial(mover.move, want), for_read)
                if not moved:
                    break
                total += moved
        except TruncatedError:
            self._refuse_closed()
            if not self._suppress_ragged_eofs:
                raise
        except BaseException:
            self._drop_pipe()  # what is in it was meant for this file
            raise
        finally:
            mover.finish()
        return total

    def _get_pipe(self) -> Pipe:
        if self._pipe is None:
            self._pipe = Pipe()
        return self._pipe

    def _drop_pipe(self) -> None:
        self._pipe = None
