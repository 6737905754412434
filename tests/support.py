"""What several rooms of tests share: a certificate authority with contexts, an echo server, the kernel's own counters."""

from __future__ import annotations

import platform
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeVar

import trustme

import ktls
from ktls.record.probe import kernel_tls_unavailable, rekey_supported

if TYPE_CHECKING:
    from collections.abc import Mapping

HOST: Final = "localhost"
TLS12: Final = ssl.TLSVersion.TLSv1_2
TLS13: Final = ssl.TLSVersion.TLSv1_3
_TLS_STAT: Final = Path("/proc/net/tls_stat")

_Context = TypeVar("_Context", bound=ssl.SSLContext)


def has_kernel_tls() -> bool:
    """Whether this kernel has kTLS."""
    return kernel_tls_unavailable() is None


def has_rekey() -> bool:
    """Whether this kernel has kTLS and can change keys."""
    return has_kernel_tls() and rekey_supported()


def kernel_kind() -> str:
    """What ``KTLS_REQUIRE_KERNEL`` would have to be here: ``rekey``, ``norekey`` or ``none``."""
    if not has_kernel_tls():
        return "none"
    return "rekey" if has_rekey() else "norekey"


def describe_kernel() -> str:
    """The kernel, and which record layer the front ends use on it."""
    layers = {
        "none": "no kernel TLS, every record is protected in user space",
        "norekey": "kernel TLS without rekey, TLS 1.3 is received in user space",
        "rekey": "kernel TLS with rekey",
    }
    return f"{platform.system()} {platform.release()}: {layers[kernel_kind()]}"


class TlsStat:
    """The kernel's counters of kernel TLS, as differences from when the object was made. All zero where there are none."""

    def __init__(self) -> None:
        self._start = self._read()

    def __getitem__(self, name: str) -> int:
        return self._read().get(name, 0) - self._start.get(name, 0)

    @staticmethod
    def _read() -> Mapping[str, int]:
        try:
            lines = _TLS_STAT.read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {name: int(value) for name, value in (line.split() for line in lines)}


class Authority:
    """One certificate authority and its certificates; contexts of both implementations."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.server_cert = self.ca.issue_cert(HOST, "127.0.0.1")
        self.client_cert = self.ca.issue_cert("client@example.org")
        self.ca_file = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))
        self.server_chain = self._chain(self.server_cert, directory / "server.pem")
        self.client_chain = self._chain(self.client_cert, directory / "client.pem")
        rsa = self.ca.issue_cert(HOST, key_type=trustme.KeyType.RSA)
        self.rsa_chain = self._chain(rsa, directory / "rsa.pem")

    @staticmethod
    def _chain(certificate: trustme.LeafCert, path: Path) -> Path:
        certificate.private_key_and_cert_chain_pem.write_to_path(str(path))
        return path

    def server(
        self, version: ssl.TLSVersion | None = None, *, chain: Path | None = None
    ) -> ssl.SSLContext:
        """Make a server's context of the ``ssl`` module."""
        return self._as_server(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), version, chain)

    def client(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """Make a client's context of the ``ssl`` module."""
        return self._as_client(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), version)

    def ktls_server(
        self, version: ssl.TLSVersion | None = None, *, chain: Path | None = None
    ) -> ktls.SSLContext:
        """Make a server's context of ``ktls``."""
        return self._as_server(ktls.SSLContext(ssl.PROTOCOL_TLS_SERVER), version, chain)

    def ktls_client(self, version: ssl.TLSVersion | None = None) -> ktls.SSLContext:
        """Make a client's context of ``ktls``."""
        return self._as_client(ktls.SSLContext(ssl.PROTOCOL_TLS_CLIENT), version)

    def _as_server(
        self, context: _Context, version: ssl.TLSVersion | None, chain: Path | None
    ) -> _Context:
        context.load_cert_chain(chain or self.server_chain)
        return _pinned(context, version)

    def _as_client(self, context: _Context, version: ssl.TLSVersion | None) -> _Context:
        context.load_verify_locations(self.ca_file)
        return _pinned(context, version)


def _pinned(context: _Context, version: ssl.TLSVersion | None) -> _Context:
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


class ThreadServer:
    """A thread that accepts connections and serves them one after the other. What went wrong with one is in ``errors``."""

    def __init__(self) -> None:
        self.errors: list[OSError] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; a connection that is being served is served to its end first."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() would not wake the accept
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            sock.settimeout(30)
            try:
                with sock:
                    self._serve(sock)
            except OSError as error:
                self.errors.append(error)

    def _serve(self, sock: socket.socket) -> None:
        raise NotImplementedError


class EchoServer(ThreadServer):
    """Echoes each TLS connection until its end, with whatever context it is given."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def _serve(self, sock: socket.socket) -> None:
        with self._context.wrap_socket(sock, server_side=True) as tls:
            while data := tls.recv(65536):
                tls.sendall(data)
