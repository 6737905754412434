"""``ktls get URL``: download a file; where the kernel opens the records, the bytes go from the socket to the file without passing through this process."""

from __future__ import annotations

import errno
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final
from urllib.parse import quote, unquote, urljoin, urlsplit

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

import ktls

from .failure import Failure, reason
from .http_reply import Reader, Reply, read_reply
from .partial import PartialFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.handshake.handoff import OffloadPolicy

__all__ = ("Location", "command")

_MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
#: Bytes per call of ``recvfile``: how often the progress bar moves.
_STEP: Final = 1024 * 1024
#: Characters that a path or query may hold as they are (RFC 3986 §3.3, §3.4), and %, since the URL is escaped already.
_PATH_SAFE: Final = "/%:@!$&'()*+,;=~?"
#: These can only come from the file, whatever call reports them.
_FILE_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@click.command()
@click.argument("url")
@click.option(
    "-o", "--output", metavar="FILE", help="Where to; default: the URL's last part, here."
)
@click.option("--cacert", metavar="FILE", help="Trust these CAs (PEM), and no others.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=60.0,
    show_default=True,
    help="Seconds without a byte.",
)
@click.option(
    "--offload",
    type=click.Choice(["auto", "kernel", "userspace"]),
    default="auto",
    show_default=True,
    help="Who protects the records.",
)
def command(
    *, url: str, output: str | None, cacert: str | None, timeout: float, offload: OffloadPolicy
) -> int:
    """Download URL into a file.

    The file appears when it is complete; until then it is FILE.part, which the next call with the same URL continues.
    """
    location = Location.parse(url)
    target = _target(location, output)
    context = _context(cacert, offload)
    started = time.monotonic()
    with PartialFile(target, url) as part:
        try:
            summary = _Download(context, timeout, part).run(location)
        except OSError as error:
            if error.errno not in _FILE_ERRORS and error.filename is None:
                raise Failure(f"{location.host}: {reason(error)}{_kept(part)}") from error
            raise Failure(f"cannot write {part.path}: {reason(error)}{_kept(part)}") from error
    elapsed = max(time.monotonic() - started, 1e-6)
    speed = f"{decimal(int(summary.received / elapsed))}/s"
    click.echo(
        f"{target}: {decimal(summary.size)} in {elapsed:.1f} s ({speed}); {summary.means}", err=True
    )
    return 0


@final
@dataclass(frozen=True, slots=True)
class Location:
    """An https URL, taken apart."""

    host: str
    port: int
    path: str
    url: str

    @classmethod
    def parse(cls, url: str) -> Location:
        """``Failure`` for what is not an https URL."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Failure(f"not a URL: {error}") from error
        if parts.scheme != "https":
            raise Failure(
                f"only https URLs can be fetched, not {parts.scheme or 'one without scheme'}"
            )
        if not host:
            raise Failure("the URL has no host")
        if "@" in parts.netloc:
            raise Failure("a user name in a URL is not supported")
        path = quote(parts.path or "/", safe=_PATH_SAFE)
        if parts.query:
            path += "?" + quote(parts.query, safe=_PATH_SAFE)
        return cls(host, 443 if port is None else port, path, url)

    @property
    def host_field(self) -> str:
        """The value of the Host header field."""
        try:
            name = f"[{self.host}]" if ":" in self.host else self.host.encode("idna").decode()
        except UnicodeError as error:
            raise Failure(f"unknown host {self.host}: no such name is possible") from error
        return name if self.port == 443 else f"{name}:{self.port}"

    @property
    def file_name(self) -> str:
        """The last part of the path, as a file name that stays in its directory."""
        name = unquote(urlsplit(self.url).path).rpartition("/")[2]
        return name if name not in ("", ".", "..") and "\0" not in name else "index.html"


@final
@dataclass(frozen=True, slots=True)
class _Summary:
    size: int
    received: int
    means: str


@final
class _Download:
    """Fetches into a part file: request, redirects, the body, the checks."""

    def __init__(self, context: ktls.SSLContext, timeout: float, part: PartialFile) -> None:
        self._context = context
        self._timeout = timeout
        self._part = part

    def run(self, location: Location) -> _Summary:
        redirects = 0
        while True:
            with _connect(location, self._context, self._timeout) as tls:
                reader = Reader(tls.recv)
                reply = self._ask(tls, reader, location)
                if reply.status in _REDIRECTS and "Location" in reply.headers:
                    redirects += 1
                    if redirects > _MAX_REDIRECTS:
                        raise Failure(f"{location.host} redirects more than {_MAX_REDIRECTS} times")
                    location = Location.parse(urljoin(location.url, reply.headers["Location"]))
                elif reply.status == 416 and self._part.resume_at():
                    self._part.discard()
                elif reply.status in (200, 206):
                    return self._receive(tls, reader, reply)
                else:
                    raise Failure(f"{location.host} answers {reply.status} {reply.phrase}")

    def _ask(self, tls: ktls.KTLSSocket, reader: Reader, location: Location) -> Reply:
        fields = {
            "Host": location.host_field,
            "User-Agent": "ktls",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        offset = self._part.resume_at()
        if offset:
            fields["Range"] = f"bytes={offset}-"
            fields["If-Range"] = self._part.validator or ""
        lines = [f"GET {location.path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
        try:
            tls.sendall("\r\n".join(lines).encode("latin-1"))
            return read_reply(reader)
        except (EOFError, ktls.TruncatedError) as error:
            raise Failure(f"{location.host} closed the connection without an answer") from error

    def _receive(self, tls: ktls.KTLSSocket, reader: Reader, reply: Reply) -> _Summary:
        """Receive the body, check it, give it its name."""
        length = reply.length
        offset, size = self._place(reply, length)
        self._part.start(offset, reply.validator, size)
        with _ProgressBar(offset, size) as advance:
            try:
                self._copy(tls, reader, reply, length, advance)
            except (EOFError, ktls.TruncatedError) as error:
                raise self._cut(size) from error
        have = self._part.length
        if size is not None and have != size:
            raise self._cut(size)
        if reply.sha256 is not None and self._part.sha256() != reply.sha256:
            self._part.delete()
            raise Failure("the file is not what the server says it is: its SHA-256 differs")
        means = _means(tls, reply)
        self._part.commit()
        return _Summary(have, have - offset, means)

    def _place(self, reply: Reply, length: int | None) -> tuple[int, int | None]:
        """Return where the body begins in the file, and the size of the whole, if known."""
        if reply.status == 200:
            return 0, length
        begin = self._part.resume_at()
        span = reply.content_range
        if not begin or span is None or (span[0], span[1] + 1) != (begin, span[2]):
            raise Failure("the server's answer is not HTTP: it sends a part that was not asked for")
        return begin, span[2]

    def _copy(
        self,
        tls: ktls.KTLSSocket,
        reader: Reader,
        reply: Reply,
        length: int | None,
        advance: Callable[[int], object],
    ) -> None:
        file = self._part.file
        if reply.chunked:
            for chunk in reader.chunks():
                file.write(chunk)
                advance(len(chunk))
            return
        ahead = reader.take(_STEP if length is None else length)
        file.write(ahead)
        advance(len(ahead))
        left = None if length is None else length - len(ahead)
        while left is None or left:
            received = tls.recvfile(file, _STEP if left is None else min(left, _STEP))
            if not received:
                break  # too early if there is something left: seen by the size
            advance(received)
            if left is not None:
                left -= received

    def _cut(self, size: int | None) -> Failure:
        of = "" if size is None else f" of {size}"
        return Failure(
            f"the transfer was cut after {self._part.length}{of} bytes{_kept(self._part)}"
        )


def _kept(part: PartialFile) -> str:
    if part.validator is None:
        return ""
    return f"; {part.path} is kept, and the same command continues it"


def _target(location: Location, output: str | None) -> Path:
    if output is None:
        return Path(location.file_name)
    if output == "-":
        raise Failure("a download goes into a file: it is checked before it gets its name")
    path = Path(output)
    return path / location.file_name if output.endswith("/") or path.is_dir() else path


def _context(cacert: str | None, offload: OffloadPolicy) -> ktls.SSLContext:
    try:
        return ktls.create_default_context(cafile=cacert, offload=offload)
    except ssl.SSLError as error:
        raise Failure(f"{cacert} holds no certificates in PEM format") from error
    except OSError as error:
        raise Failure(f"cannot read {cacert}: {reason(error)}") from error


def _connect(location: Location, context: ktls.SSLContext, timeout: float) -> ktls.KTLSSocket:
    host = location.host
    try:
        sock = socket.create_connection((host, location.port), timeout)
    except socket.gaierror as error:
        raise Failure(f"unknown host {host}: {reason(error)}") from error
    except UnicodeError as error:
        raise Failure(f"unknown host {host}: no such name is possible") from error
    except OSError as error:
        raise Failure(f"cannot connect to {host} port {location.port}: {reason(error)}") from error
    try:
        return context.wrap_socket(sock, server_hostname=host, suppress_ragged_eofs=False)
    except ssl.SSLCertVerificationError as error:
        why = error.verify_message
        raise Failure(f"{host} is not trusted: {why} (--cacert names a CA to trust)") from error
    except ktls.OffloadError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(f"no TLS connection with {host}: {reason(error)}") from error
    finally:
        sock.close()  # the socket has been taken over, or is not wanted


def _means(tls: ktls.KTLSSocket, reply: Reply) -> str:
    """Say how the bytes were moved."""
    offload, usage = tls.offload, tls.key_usage.rx
    if offload.rx == "kernel":
        how = "opened by the kernel, " + ("copied" if reply.chunked else "spliced")
    else:
        how = f"opened in user space ({offload.reason or 'as asked'})"
    return f"{how}; {usage.records} records, key generation {usage.generation}"


@final
class _ProgressBar:
    """A progress bar on stderr, if that is a terminal; gives a function that advances it."""

    def __init__(self, offset: int, size: int | None) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True
        )
        self._task = self._bar.add_task("", total=size, completed=offset)

    def __enter__(self) -> Callable[[int], object]:
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
