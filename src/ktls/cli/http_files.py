"""The server behind ``ktls serve``: files over HTTPS/1.1, their bodies sent by ``KTLSSocket.sendfile``.

``http.server`` does what HTTP needs; added here: ranges and validators (RFC 9110 §13, §14), so that a download can be resumed, the handshake in the
connection's own thread, so that a slow client keeps nobody waiting, and one line per request that says who protected the records.

What is not done: uploads, virtual hosts, compression. Symbolic links are followed, also out of the directory.
"""

from __future__ import annotations

import email.utils
import io
import os
import re
import socket
import socketserver
import stat
import sys
import threading
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, final

from .failure import reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import ktls

__all__ = ("FileServer", "parse_range")

#: A client that does not finish its handshake loses its thread; so does one that is silent between requests.
_HANDSHAKE_TIMEOUT: Final = 10.0
_IDLE_TIMEOUT: Final = 60.0
#: How long a slow client may hold up the end of the server.
_CLOSING_TIMEOUT: Final = 0.5
_ONE_RANGE: Final = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})", re.ASCII | re.IGNORECASE)


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


@final
class FileServer(ThreadingHTTPServer):
    """Serves ``directory`` over TLS; each connection in a thread of its own."""

    request_queue_size = 128
    daemon_threads = False  # they end when the server is closed

    def __init__(
        self, address: tuple[Any, ...], family: int, context: ktls.SSLContext, directory: Path
    ) -> None:
        self.address_family = family
        self.directory = str(directory)
        self._context = context
        self._lock = threading.Lock()
        self._connections: set[ktls.KTLSSocket] = set()
        self._closing = False
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind; ``HTTPServer`` would ask the DNS for our name here."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # typeshed: it may be a path

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Do one connection, from the handshake to close_notify, in its thread."""
        tls = self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with tls, self._counted(tls):
            tls.settimeout(_HANDSHAKE_TIMEOUT)
            tls.do_handshake()
            _Handler(tls, client_address, self)
            tls.shutdown(socket.SHUT_WR)

    @contextmanager
    def _counted(self, tls: ktls.KTLSSocket) -> Iterator[None]:
        """Keep ``tls`` among the connections until just before it is closed: then its descriptor may be somebody else's."""
        with self._lock:
            if self._closing:
                raise ConnectionAbortedError("the server is closing")
            self._connections.add(tls)
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(tls)

    def server_close(self) -> None:
        """Stop listening, cut every connection, wait for the threads. Clients see that what they have is not all: no close_notify is sent."""
        with self._lock:
            self._closing = True
            self._context.shutdown_timeout = _CLOSING_TIMEOUT
            for tls in self._connections:
                with suppress(OSError):
                    socket.socket.shutdown(tls, socket.SHUT_RDWR)  # of TCP, not of TLS
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line why a connection ended early."""
        if self._closing:
            return
        error = sys.exception()
        what = reason(error) if isinstance(error, OSError) else repr(error)
        print(f"{client_address[0]}: connection ended: {_printable(what)}", file=sys.stderr)


class _FileShrank(ConnectionAbortedError):
    """Fewer bytes than promised: nothing may be sent in their place, so the connection ends here."""


@final
class _Handler(SimpleHTTPRequestHandler):
    server: FileServer
    connection: ktls.KTLSSocket
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_TIMEOUT

    def __init__(self, request: ktls.KTLSSocket, client_address: Any, server: FileServer) -> None:
        self._body = range(0)
        self._status: int | None = None
        self._sent = 0
        super().__init__(request, client_address, server, directory=server.directory)

    def version_string(self) -> str:
        """Return the Server header field: no versions, they help only attackers."""
        return "ktls"

    def handle_one_request(self) -> None:
        """Answer, then log: only now it is known what was sent."""
        self._status, self._sent = None, 0
        try:
            super().handle_one_request()
        finally:
            if self._status is not None:
                self._log_line(self._status)

    def parse_request(self) -> bool:
        """Parse; a body that came along is not read, so nothing after it can be taken for a request."""
        parsed = super().parse_request()
        if parsed and (
            "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        ):
            self.close_connection = True
        return parsed

    def send_head(self) -> Any:
        """Send the head of the answer; return the file whose ``self._body`` follows, or None."""
        path = self.translate_path(self.path)
        if os.path.isdir(path):
            index = os.path.join(path, "index.html")
            if not path.endswith("/") or not os.path.isfile(index):
                return super().send_head()  # redirect or listing
            path = index
        try:
            file = _open_regular(path)
        except PermissionError:
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        except (OSError, ValueError):
            self.send_error(HTTPStatus.NOT_FOUND, "File not found")
            return None
        try:
            goes_on = self._send_file_head(path, os.fstat(file.fileno()))
        except BaseException:
            file.close()
            raise
        if not goes_on:
            file.close()
            return None
        return file

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send the body; listings come from memory."""
        if isinstance(source, io.BytesIO):
            self._sent = self.wfile.write(source.getbuffer())
        else:
            self._sendfile(source)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keep the status; the line is written when the answer is out."""
        self._status = int(code)

    def log_error(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """Say nothing more than the request's line does."""

    def _sendfile(self, file: BinaryIO) -> None:
        if not self._body:
            return
        promised = len(self._body)
        file.seek(self._body.start)
        try:
            self.connection.sendfile(file, self._body.start, promised)
        finally:
            self._sent = file.tell() - self._body.start  # its position is right after errors, too
        if self._sent != promised:
            # Closing in order would send close_notify, and that means "this was all".
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)
            raise _FileShrank(f"the file shrank: {self._sent} of {promised} bytes sent")

    def _send_file_head(self, path: str, status: os.stat_result) -> bool:
        """Send status and header fields for a file; return whether a body follows."""
        etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"'
        modified = self.date_time_string(int(status.st_mtime))
        if self._not_modified(etag, int(status.st_mtime)):
            self._head(HTTPStatus.NOT_MODIFIED, {"ETag": etag, "Last-Modified": modified})
            return False
        size = status.st_size
        fields = {
            "Content-Type": self.guess_type(path),
            "Last-Modified": modified,
            "ETag": etag,
            "Accept-Ranges": "bytes",
        }
        try:
            wanted = self._wanted_range(size, etag, modified)
        except ValueError:
            fields = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
            self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, fields)
            return False
        self._body = range(size) if wanted is None else wanted
        fields["Content-Length"] = str(len(self._body))
        if wanted is not None:
            fields["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
        self._head(HTTPStatus.OK if wanted is None else HTTPStatus.PARTIAL_CONTENT, fields)
        return True

    def _head(self, status: HTTPStatus, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()

    def _not_modified(self, etag: str, modified: int) -> bool:
        """RFC 9110 §13.2.2: If-None-Match, and only without it If-Modified-Since."""
        tags = self.headers.get("If-None-Match")
        if tags is not None:
            found = {tag.strip().removeprefix("W/") for tag in tags.split(",")}
            return etag in found or "*" in found
        since = self.headers.get("If-Modified-Since")
        if since is None:
            return False
        try:
            return modified <= int(email.utils.parsedate_to_datetime(since).timestamp())
        except (TypeError, ValueError, OverflowError):
            return False

    def _wanted_range(self, size: int, etag: str, modified: str) -> range | None:
        """Return the part asked for, None for all of it; ``ValueError`` if it is outside of the file."""
        header = self.headers.get("Range")
        if header is None or self.command != "GET":
            return None
        condition = self.headers.get("If-Range")
        # Strong comparison (RFC 9110 §13.1.5): for dates that means the very same text.
        if condition is not None and condition.strip() not in (etag, modified):
            return None
        return parse_range(header, size)

    def _log_line(self, status: int) -> None:
        offload = self.connection.offload
        request = _printable(self.requestline)
        line = f'{self.client_address[0]} "{request}" {status} {self._sent} tx={offload.tx} rx={offload.rx}\n'
        with suppress(OSError):  # whoever read the log has gone; that is no client's fault
            sys.stdout.write(line)  # as one piece: other threads write too
            sys.stdout.flush()


def _open_regular(path: str) -> IO[bytes]:
    """Open ``path`` if it is a regular file: opening a pipe would wait, a device might do anything."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(path)
    return os.fdopen(descriptor, "rb")


def _printable(text: str) -> str:
    """Escape what could forge log lines or drive a terminal."""
    return "".join(
        char if " " <= char <= "~" and char not in '"\\' else f"\\x{ord(char):02x}" for char in text
    )
