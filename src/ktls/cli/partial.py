"""A download on its way: ``FILE.part``, beside it what is needed to go on later, and only at the end ``FILE``.

``FILE.part.json`` says of which version of which URL the bytes are. Without it (or with another URL) they are worthless, and the download starts anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self, final

from .failure import Failure, reason

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from _typeshed import ReadableBuffer

__all__ = ("PartialFile",)

_TRIES: Final = 8


@final
class _File(io.FileIO):
    """Unbuffered, since ``splice`` writes beside it; but writes all or raises."""

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += super().write(view[written:])
        return written


@final
class PartialFile:
    """The part file of ``target``, locked: ``file`` is positioned where the next byte goes. Closing it without ``commit`` keeps it for the next time."""

    def __init__(self, target: Path, url: str) -> None:
        """Open or create it. ``Failure`` if the target can't be a download's, or another process is at it."""
        _check_target(target)
        self.path = target.with_name(target.name + ".part")
        self.file: Final = _open_locked(self.path)
        self._target = target
        self._notes = self.path.with_name(self.path.name + ".json")
        self._url = url
        self._committed = False
        self.validator, self._size = self._read_notes()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._committed and self.length == 0:
            self.delete()
        self.file.close()

    @property
    def length(self) -> int:
        """How many bytes there are."""
        return os.fstat(self.file.fileno()).st_size

    def resume_at(self) -> int:
        """Return from which byte on to ask, 0 for all. Never the end: a server has no answer to a range that is empty."""
        if self.validator is None:
            return 0
        return self.length if self._size is None else max(0, min(self.length, self._size - 1))

    def start(self, offset: int, validator: str | None, size: int | None) -> None:
        """Keep ``offset`` bytes, and remember what the ones to come belong to."""
        self.file.truncate(offset)
        self.file.seek(offset)
        self.validator, self._size = validator, size
        self._forget()
        if validator is not None:
            notes = {"url": self._url, "validator": validator, "size": size}
            # A new file each time: never written through somebody's link.
            with open(self._notes, "x", encoding="utf-8") as file:
                json.dump(notes, file)

    def discard(self) -> None:
        """Start over: what there is does not help."""
        self.start(0, None, None)

    def delete(self) -> None:
        """Remove it: what there is is wrong."""
        self._forget()
        self.path.unlink(missing_ok=True)

    def sha256(self) -> bytes:
        """Return the digest of all there is."""
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256").digest()

    def commit(self) -> None:
        """Make it the target. It is on the disk before it gets the name."""
        os.fsync(self.file.fileno())
        os.replace(self.path, self._target)
        self._committed = True
        self._forget()

    def _forget(self) -> None:
        self._notes.unlink(missing_ok=True)

    def _read_notes(self) -> tuple[str | None, int | None]:
        with suppress(OSError, ValueError, AttributeError):
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
            validator, size = notes.get("validator"), notes.get("size")
            if (
                notes.get("url") == self._url
                and isinstance(validator, str)
                and validator.isprintable()
            ):
                return validator, size if isinstance(size, int) else None
        return None, None


def _check_target(target: Path) -> None:
    """Refuse what ``os.replace`` would destroy rather than fill: devices, pipes, directories."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise Failure(f"cannot write {target}: {reason(error)}") from error
    if not stat.S_ISREG(mode):
        raise Failure(f"cannot write {target}: it is not a regular file")


def _open_locked(path: Path) -> _File:
    for _ in range(_TRIES):
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = _File(os.open(path, flags, 0o666), "r+b")
        except OSError as error:
            raise Failure(f"cannot write {path}: {reason(error)}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise Failure(f"cannot write {path}: another process is writing it") from error
        # Whoever had the lock before may have finished, and our file now is the target.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()
    raise Failure(f"cannot write {path}: it keeps changing")
