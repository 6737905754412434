"""From a TLS connection into a file: by ``splice`` where the kernel decrypts, else by copying."""

from __future__ import annotations

import errno
import os
from typing import IO, Final, Protocol, TypeAlias, final

from ktls.handshake.handoff import RecordDriver

__all__ = ("FileCopier", "FileMover", "FileSplicer", "SendableFile")

_COPY_SIZE: Final = 64 * 1024


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
        """Set the position of the file behind what was written, and leave the pipe empty."""
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
