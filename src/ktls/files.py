"""Files: ``sendfile`` into a TLS connection, ``recvfile`` out of one, without a copy where the kernel protects the records."""

from __future__ import annotations

import errno
import functools
import io
import os
import socket
import stat
from fcntl import F_SETPIPE_SZ, fcntl
from typing import IO, Final, Protocol, TypeAlias, final

from ktls.handshake.handoff import RecordDriver
from ktls.protocol.errors import TruncatedError
from ktls.record.meter import MAX_PIECE

from .waiting import WaitingSocket, for_read, for_write

__all__ = ("FileCopier", "FileMover", "FileSocket", "FileSplicer", "SendableFile")

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


@final
class FileSplicer:
    """Moves decrypted records through a pipe into a file: two system calls a record, no copy in this process."""

    __slots__ = ("_driver", "_file", "_offset", "_pipe", "_reads")

    def __init__(self, driver: RecordDriver, pipe: tuple[int, int], file: IO[bytes]) -> None:
        self._driver = driver
        self._reads, self._pipe = pipe
        self._file = file
        self._offset = file.tell()

    def move(self, count: int) -> int:
        """Move up to ``count`` bytes; 0 at the end. ``BlockingIOError`` if nothing has come."""
        moved = self._driver.splice(self._pipe, count)
        left = moved
        while left:
            written = self._write(left)
            self._offset += written
            left -= written
        return moved

    def _write(self, count: int) -> int:
        fd = self._file.fileno()
        try:
            return os.splice(self._reads, fd, count, offset_dst=self._offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # Some files can't be spliced into (O_APPEND, a few file systems).
        return os.pwrite(fd, os.read(self._reads, count), self._offset)

    def finish(self) -> None:
        """Set the position of the file behind what was written."""
        self._file.seek(self._offset)


@final
class FileCopier:
    """Reads decrypted bytes and writes them."""

    __slots__ = ("_buffer", "_driver", "_file")

    def __init__(self, driver: RecordDriver, file: IO[bytes]) -> None:
        self._driver = driver
        self._file = file
        self._buffer = bytearray(_COPY_SIZE)

    def move(self, count: int) -> int:
        """Move up to ``count`` bytes; 0 at the end. ``BlockingIOError`` if nothing has come."""
        moved = self._driver.recv_into(self._buffer, min(count, len(self._buffer)))
        if moved:
            with memoryview(self._buffer) as view:
                self._file.write(view[:moved])
        return moved

    def finish(self) -> None:
        """Nothing is held back."""


#: Either of them.
FileMover: TypeAlias = FileSplicer | FileCopier


class FileSocket(WaitingSocket):
    """A TLS socket that can send and receive files. ``_ready`` and ``sendall`` are its subclass's."""

    __slots__ = ("_pipe", "_suppress_ragged_eofs")

    def __init__(self, sock: socket.socket, *, suppress_ragged_eofs: bool) -> None:
        super().__init__(sock)
        self._suppress_ragged_eofs = suppress_ragged_eofs
        self._pipe: tuple[int, int] | None = None

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
        try:
            fd = getattr(file, "fileno")()  # noqa: B009  # BytesIO has one that raises, other readers have none
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
        except (AttributeError, io.UnsupportedOperation):
            regular = False
        if not regular:
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
            self.sendall(data)
            total += len(data)
        return total

    def recvfile(self, file: IO[bytes], count: int | None = None) -> int:
        """Receive ``count`` bytes (None: all until the end) into ``file`` at its position; return how many came before the end.

        Uses ``splice``: what the kernel decrypts goes into the file without passing through this process. Otherwise, copies.
        Raises as ``recv_into``, and ``OSError`` from the file; bytes that were on their way into it are lost then, so close the connection.
        """
        driver = self._ready()
        file.flush()
        if driver.rx_layer == "kernel" and not driver.pending():
            mover: FileMover = FileSplicer(driver, self._get_pipe(), file)
        else:
            mover = FileCopier(driver, file)
        total = 0
        try:
            while count is None or total < count:
                want = _PIPE_SIZE if count is None else min(_PIPE_SIZE, count - total)
                moved = self.perform(functools.partial(mover.move, want), for_read)
                if not moved:
                    break
                total += moved
        except TruncatedError:
            if not self._suppress_ragged_eofs:
                raise
        except OSError:
            self._drop_pipe()  # what is in it was meant for this file
            raise
        finally:
            mover.finish()
        return total

    def _get_pipe(self) -> tuple[int, int]:
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_CLOEXEC)
            fcntl(self._pipe[1], F_SETPIPE_SZ, _PIPE_SIZE)
        return self._pipe

    def _drop_pipe(self) -> None:
        if self._pipe is not None:
            for fd in self._pipe:
                os.close(fd)
            self._pipe = None
