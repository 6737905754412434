"""Code written for ``ssl`` works unchanged: servers and clients of the standard library, and urllib3."""

from __future__ import annotations

import ftplib
import http.client
import http.server
import smtplib
import socket
import socketserver
import ssl
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import urllib3

import ktls

from ..support import HOST, Authority, has_kernel_tls
from .helpers import PATIENCE, Case, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = pattern(100_000)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections = 0
    timeout = PATIENCE

    def setup(self) -> None:
        super().setup()
        type(self).connections += 1

    def do_GET(self) -> None:
        body = BODY if self.path == "/" else self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[::-1])

    def log_message(self, *args: Any) -> None:
        pass


class HTTPSServer(http.server.ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True


@pytest.fixture(params=["ktls", "stdlib"])
def web(request: pytest.FixtureRequest, authority: Authority) -> Iterator[int]:
    """A web server with its socket wrapped by either implementation; its port."""
    context = authority.ktls_server() if request.param == "ktls" else authority.server()
    Handler.connections = 0
    with HTTPSServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield httpd.server_port
        httpd.shutdown()
        thread.join()


def test_http_client(web: int, ktls_client: ktls.SSLContext) -> None:
    connection = http.client.HTTPSConnection(HOST, web, context=ktls_client, timeout=PATIENCE)
    for _ in range(3):
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        assert response.read() == BODY
    assert isinstance(connection.sock, ktls.KTLSSocket)
    assert connection.sock.offload.tx == Case().tx_layer
    connection.request("POST", "/", body=BODY)
    assert connection.getresponse().read() == BODY[::-1]
    connection.close()
    assert Handler.connections == 1


def test_urlopen(web: int, ktls_client: ktls.SSLContext) -> None:
    for _ in range(2):
        with urllib.request.urlopen(
            f"https://{HOST}:{web}/", context=ktls_client, timeout=PATIENCE
        ) as response:
            assert response.read() == BODY


def test_urllib3(web: int, ktls_client: ktls.SSLContext) -> None:
    with urllib3.PoolManager(ssl_context=ktls_client, timeout=PATIENCE, retries=False) as pool:
        for number in range(5):
            response = pool.request("GET", f"https://{HOST}:{web}/{number}")
            assert response.data == b"/%d" % number
        response = pool.request("POST", f"https://{HOST}:{web}/", body=BODY)
        assert response.data == BODY[::-1]
        assert Handler.connections == 1  # kept alive


def test_urllib3_in_several_threads(web: int, ktls_client: ktls.SSLContext) -> None:
    errors: list[BaseException] = []
    with urllib3.PoolManager(
        ssl_context=ktls_client, timeout=PATIENCE, retries=False, maxsize=4
    ) as pool:

        def work(thread: int) -> None:
            try:
                for number in range(4):
                    response = pool.request("GET", f"https://{HOST}:{web}/{thread}/{number}")
                    assert response.data == b"/%d/%d" % (thread, number)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_sessions_are_resumed_under_http(web: int, ktls_client: ktls.SSLContext) -> None:
    """Without a word: the context remembers."""
    reused = []
    for _ in range(3):
        connection = http.client.HTTPSConnection(HOST, web, context=ktls_client, timeout=PATIENCE)
        connection.request("GET", "/")
        assert connection.getresponse().read() == BODY
        assert isinstance(connection.sock, ktls.KTLSSocket)
        reused.append(connection.sock.session_reused)
        connection.close()
    assert reused == [False, True, True]


def test_untrusted_server(web: int) -> None:
    with pytest.raises(urllib.error.URLError) as caught:
        urllib.request.urlopen(f"https://{HOST}:{web}/", context=ktls.SSLContext(), timeout=5)
    assert isinstance(caught.value.reason, ssl.SSLCertVerificationError)


class Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class LineServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = False
    context: ssl.SSLContext

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        return self.context.wrap_socket(sock, server_side=True), address


def test_socketserver(authority: Authority, ktls_client: ktls.SSLContext) -> None:
    with LineServer(("127.0.0.1", 0), Lines) as server:
        server.context = authority.ktls_server()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        with (
            socket.create_connection(server.server_address[:2]) as sock,  # type: ignore[arg-type]  # typeshed: it may be a path
            ktls_client.wrap_socket(sock, server_hostname=HOST) as tls,
            tls.makefile("rwb") as file,
        ):
            for line in (b"one\n", b"two\n"):
                file.write(line)
                file.flush()
                assert file.readline() == line.upper()
            tls.shutdown(socket.SHUT_WR)
            assert file.readline() == b""
        server.shutdown()
        thread.join()


# --- STARTTLS --------------------------------------------------------------------------------------------------------


def serve_lines(
    listener: socket.socket, context: ssl.SSLContext, script: dict[bytes, bytes], upgrade: bytes
) -> None:
    """Answer one client by ``script``; after the answer to ``upgrade`` in TLS."""
    conn: Any = listener.accept()[0]
    conn.settimeout(PATIENCE)
    conn.sendall(b"220 ready\r\n")
    buffer = b""
    while True:
        while b"\r\n" not in buffer:
            try:
                data = conn.recv(4096)
            except OSError:
                data = b""
            if not data:
                conn.close()
                return
            buffer += data
        line, _, buffer = buffer.partition(b"\r\n")
        verb = line.split()[0].upper()
        conn.sendall(script.get(verb, b"250 fine\r\n"))
        if verb == upgrade:
            conn = context.wrap_socket(conn, server_side=True)
        elif verb == b"QUIT":
            conn.close()
            return


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.mark.parametrize("server", ["ktls", "stdlib"])
def test_smtplib(
    listener: socket.socket, authority: Authority, ktls_client: ktls.SSLContext, server: str
) -> None:
    context = authority.ktls_server() if server == "ktls" else authority.server()
    script = {
        b"EHLO": b"250-localhost\r\n250 STARTTLS\r\n",
        b"STARTTLS": b"220 go ahead\r\n",
        b"DATA": b"354 send\r\n",
        b".": b"250 taken\r\n",
        b"QUIT": b"221 bye\r\n",
    }
    thread = threading.Thread(target=serve_lines, args=(listener, context, script, b"STARTTLS"))
    thread.start()
    with smtplib.SMTP(HOST, listener.getsockname()[1], timeout=PATIENCE) as client:
        client.starttls(context=ktls_client)
        assert isinstance(client.sock, ktls.KTLSSocket)
        assert client.sock.offload.tx == ("kernel" if has_kernel_tls() else "userspace")
        assert client.noop()[0] == 250
    thread.join()


def test_ftplib(
    listener: socket.socket, authority: Authority, ktls_client: ktls.SSLContext
) -> None:
    script = {b"AUTH": b"234 go ahead\r\n", b"QUIT": b"221 bye\r\n", b"USER": b"230 in\r\n"}
    thread = threading.Thread(
        target=serve_lines, args=(listener, authority.ktls_server(), script, b"AUTH")
    )
    thread.start()
    client = ftplib.FTP_TLS(context=ktls_client, timeout=PATIENCE)
    client.connect(HOST, listener.getsockname()[1])
    client.login("user", "password")
    assert isinstance(client.sock, ktls.KTLSSocket)
    client.prot_p()
    client.quit()
    thread.join()
