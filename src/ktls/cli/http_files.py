"""What a file server answers to GET and HEAD: which file, which part of it, or why not (RFC 9110 §13, §14).

Nothing is sent here: ``answer`` opens the file and says what is to be sent, ``file_app`` sends it. All of it is a handful of system calls on names and
i-nodes, done in the event loop: a thread for them costs more than they do (measured: aiohttp's own ``FileResponse``, which uses threads, takes
3.2 times the instructions for 1 KiB).

Precompressed files: ``page.html.gz`` is sent as the gzip coding of ``page.html`` to who accepts that, unless it is older than ``page.html``.

What is not done: uploads, virtual hosts, compressing, several ranges in one answer (the whole file is the answer, as RFC 9110 §14.2 permits).
Symbolic links are followed, also out of the directory.
"""

from __future__ import annotations

import email.utils
import errno
import mimetypes
import os
import re
import stat
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, BinaryIO, Final, final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from .listing import listing

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("Answer", "Body", "accepted_codings", "answer", "parse_range", "resolve")

#: Content codings and the suffixes of their files, the better ones first.
_CODINGS: Final = {"br": ".br", "zstd": ".zst", "gzip": ".gz"}
#: Media types of files that are compressed in themselves, by what ``mimetypes`` calls their encoding.
_COMPRESSED_TYPES: Final = {
    "gzip": "application/gzip",
    "bzip2": "application/x-bzip2",
    "br": "application/x-brotli",
    "compress": "application/x-compress",
    "xz": "application/x-xz",
}
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ONE_RANGE: Final = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})", re.ASCII | re.IGNORECASE)
_ABSOLUTE_FORM: Final = re.compile(r"https?://[^/]*", re.IGNORECASE)
_QUALITY: Final = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)", re.ASCII | re.IGNORECASE)


@final
@dataclass(frozen=True, slots=True)
class Body:
    """``range`` of an open file. Whoever has it closes the file."""

    file: BinaryIO
    part: range


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """Status, header fields, and what follows them: bytes, or a part of a file. ``Content-Length`` is not among the fields."""

    status: HTTPStatus
    fields: dict[str, str]
    body: bytes | Body = b""


class _Refused(Exception):  # control flow of this module
    def __init__(self, status: HTTPStatus) -> None:
        self.status = status


def resolve(target: str) -> tuple[str, bool]:
    """Return the path, below the served directory and without ``..``, that a request's target names, and whether it must be a directory.

    Raises ``ValueError`` for what no path can be.
    """
    path = target.partition("?")[0].partition("#")[0]
    if not path.startswith("/"):
        origin = _ABSOLUTE_FORM.match(path)
        if origin is None:
            raise ValueError(f"not a path: {target}")
        path = path[origin.end() :] or "/"
    names: list[str] = []
    last = ""
    for last in os.fsdecode(unquote_to_bytes(path.encode("utf-8", "surrogateescape"))).split("/"):
        if last == "..":
            del names[-1:]
        elif last not in ("", "."):
            names.append(last)
    if any("\0" in name for name in names):
        raise ValueError(f"not a path: {target}")
    return "/".join(names), last in ("", ".", "..")


def parse_range(header: str, size: int) -> range | None:
    """Return the bytes that a Range header asks for, or None if the whole file is the right answer.

    Raises ``ValueError`` for a range outside of the file (416). Several ranges, and what is not a byte range, may be ignored (RFC 9110 §14.2).
    """
    match = _ONE_RANGE.fullmatch(header.strip())
    if match is None or match[0].endswith("=-"):
        return None
    first, last = match[1], match[2]
    if not first:  # the last N bytes
        wanted = range(max(0, size - int(last)), size)
    elif last and int(last) < int(first):
        return None  # not a range at all
    else:
        wanted = range(int(first), min(size, int(last) + 1) if last else size)
    if not wanted:
        raise ValueError(f"{header} is outside of {size} bytes")
    return wanted


def accepted_codings(header: str) -> list[str]:
    """Return the codings of ours that an Accept-Encoding header prefers to none at all, the most wanted first."""
    quality: dict[str, float] = {}
    for entry in header.lower().split(","):
        coding, _, parameters = entry.partition(";")
        weight = _QUALITY.fullmatch(parameters.strip()) if parameters else None
        quality[coding.strip()] = float(weight[1]) if weight else 1.0
    others = quality.get("*", 0.0)
    plain = quality.get("identity", 0.0)
    wanted = {coding: quality.get(coding, others) for coding in _CODINGS}
    found = [coding for coding, weight in wanted.items() if weight > 0 and weight >= plain]
    return sorted(found, key=lambda coding: -wanted[coding])  # stable: ours is the order of equals


def answer(root: str, method: str, target: str, headers: Mapping[str, str]) -> Answer:
    """Return the answer to a GET or HEAD request for ``target``, from the files below ``root``. Raises nothing: failures are answers."""
    try:
        relative, must_be_directory = resolve(target)
        return _answer(root, relative, must_be_directory, method, target, headers)
    except _Refused as refused:
        status = refused.status
    except PermissionError:
        status = HTTPStatus.FORBIDDEN
    except OSError as error:
        scarce = error.errno in _NO_DESCRIPTORS
        status = HTTPStatus.SERVICE_UNAVAILABLE if scarce else HTTPStatus.NOT_FOUND
    except ValueError:
        status = HTTPStatus.NOT_FOUND
    return Answer(
        status, {"Content-Type": "text/plain"}, f"{status.value} {status.phrase}\n".encode()
    )


def _answer(
    root: str,
    relative: str,
    must_be_directory: bool,
    method: str,
    target: str,
    headers: Mapping[str, str],
) -> Answer:
    path = os.path.join(root, relative)
    file = _open_regular(path)
    if file is None:  # a directory
        if not must_be_directory:
            query = target.partition("?")[1:]
            # Begins with one slash: two would name another host.
            location = "/" + quote_from_bytes(os.fsencode(relative)) + "/" + "".join(query)
            return Answer(HTTPStatus.MOVED_PERMANENTLY, {"Location": location})
        path = os.path.join(path, "index.html")
        try:
            file = _open_regular(path)
        except FileNotFoundError:
            file = None
        if file is None:
            fields = {"Content-Type": "text/html; charset=utf-8"}
            return Answer(HTTPStatus.OK, fields, listing(os.path.join(root, relative), relative))
    elif must_be_directory:
        file.close()
        raise _Refused(HTTPStatus.NOT_FOUND)
    try:
        return _file_answer(path, file, method, headers)
    except BaseException:
        file.close()
        raise


def _open_regular(path: str) -> BinaryIO | None:
    """Open ``path`` if it is a regular file; None for a directory. Opening a pipe would wait, a device might do anything."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        # Unbuffered: what is read is read once, and most of it goes by sendfile.
        return os.fdopen(descriptor, "rb", buffering=0)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        return None
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _file_answer(path: str, file: BinaryIO, method: str, headers: Mapping[str, str]) -> Answer:
    """Choose the representation, check the conditions, find the part. ``file`` is closed if it is not the answer's body."""
    status = os.fstat(file.fileno())
    fields = {"Content-Type": _media_type(path)}
    file, status = _precompressed(path, file, status, headers, fields)
    etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"'
    modified = email.utils.formatdate(int(status.st_mtime), usegmt=True)
    fields |= {"ETag": etag, "Last-Modified": modified, "Accept-Ranges": "bytes"}
    failed = _failed_condition(headers, etag, int(status.st_mtime))
    if failed is not None:
        file.close()
        del fields["Content-Type"]
        return Answer(failed, fields)
    try:
        wanted = _wanted_range(headers, method, status.st_size, etag, modified)
    except ValueError:
        file.close()
        refusal = {"Content-Range": f"bytes */{status.st_size}"}
        return Answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, refusal)
    if wanted is None:
        return Answer(HTTPStatus.OK, fields, Body(file, range(status.st_size)))
    fields["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{status.st_size}"
    return Answer(HTTPStatus.PARTIAL_CONTENT, fields, Body(file, wanted))


def _precompressed(
    path: str,
    file: BinaryIO,
    status: os.stat_result,
    headers: Mapping[str, str],
    fields: dict[str, str],
) -> tuple[BinaryIO, os.stat_result]:
    """Exchange ``file`` for its most wanted precompressed form, if there is one; say in ``fields`` that there is a choice."""
    if path.endswith(tuple(_CODINGS.values())):
        return file, status
    there = [name for name, suffix in _CODINGS.items() if _is_current(path + suffix, status)]
    if not there:
        return file, status
    fields["Vary"] = "Accept-Encoding"
    for coding in accepted_codings(headers.get("Accept-Encoding", "")):
        if coding not in there:
            continue
        try:
            compressed = _open_regular(path + _CODINGS[coding])
        except OSError:  # not readable, or gone by now
            continue
        if compressed is not None:
            file.close()
            fields["Content-Encoding"] = coding
            return compressed, os.fstat(compressed.fileno())
    return file, status


def _is_current(path: str, original: os.stat_result) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_mtime_ns >= original.st_mtime_ns


def _media_type(path: str) -> str:
    kind, encoding = mimetypes.guess_type(path)
    if encoding is not None:
        kind = _COMPRESSED_TYPES.get(encoding)
    return kind or "application/octet-stream"


# --- conditions --------------------------------------------------------------------------------------------------------


def _failed_condition(headers: Mapping[str, str], etag: str, modified: int) -> HTTPStatus | None:
    """RFC 9110 §13.2.2, in its order; the answer if a condition says that the file is not to be sent."""
    tags = headers.get("If-Match")
    if tags is not None:
        if not _matches(tags, etag, weak=False):
            return HTTPStatus.PRECONDITION_FAILED
    elif (limit := _seconds(headers.get("If-Unmodified-Since"))) is not None and modified > limit:
        return HTTPStatus.PRECONDITION_FAILED
    tags = headers.get("If-None-Match")
    if tags is not None:
        return HTTPStatus.NOT_MODIFIED if _matches(tags, etag, weak=True) else None
    since = _seconds(headers.get("If-Modified-Since"))
    return HTTPStatus.NOT_MODIFIED if since is not None and modified <= since else None


def _matches(header: str, etag: str, *, weak: bool) -> bool:
    tags = {tag.strip() for tag in header.split(",")}
    return "*" in tags or etag in tags or (weak and "W/" + etag in tags)


def _seconds(date: str | None) -> int | None:
    if date is None:
        return None
    try:
        return int(email.utils.parsedate_to_datetime(date).timestamp())
    except (TypeError, ValueError, OverflowError):
        return None  # RFC 9110: what is no date is to be ignored


def _wanted_range(
    headers: Mapping[str, str], method: str, size: int, etag: str, modified: str
) -> range | None:
    """Return the part asked for, None for all of it; ``ValueError`` if it is outside of the file."""
    header = headers.get("Range")
    if header is None or method != "GET":
        return None
    condition = headers.get("If-Range")
    # Strong comparison (RFC 9110 §13.1.5): for dates that means the very same text.
    if condition is not None and condition.strip() not in (etag, modified):
        return None
    return parse_range(header, size)
