"""What all peers share: certificates, our contexts, data, and what the kernel at hand is expected to do."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, TypeVar

import trustme

import ktls
from ktls.record.probe import kernel_tls_unavailable, max_payload_supported, rekey_supported

from .programs import PATIENCE

HOST: Final = "localhost"
TLS12: Final = ssl.TLSVersion.TLSv1_2
TLS13: Final = ssl.TLSVersion.TLSv1_3
#: Which kernel of the lab this is, or "" on the machine itself.
LAB: Final = os.environ.get("KTLS_LAB", "")
IS_LAB: Final = bool(LAB)

#: Payload is made of these: no peer's messages have them, and to no peer they are a command.
ALPHABET: Final = b"!$%&;?@|~{}"
_TO_ALPHABET: Final = bytes(ALPHABET[value % len(ALPHABET)] for value in range(256))

_T = TypeVar("_T")


def payload(size: int, seed: int = 0) -> bytes:
    """Return ``size`` bytes that no two seeds share."""
    return random.Random(seed).randbytes(size).translate(_TO_ALPHABET)


def digest(data: bytes) -> tuple[int, str]:
    """Length and SHA-256: what is compared in place of the data, so that a failure can be read."""
    return len(data), hashlib.sha256(data).hexdigest()


def same(received: bytes, sent: bytes) -> bool:
    """Whether every byte arrived; says how many and where not."""
    if digest(received) == digest(sent):
        return True
    pairs = zip(received, sent, strict=False)
    equal = next((at for at, (one, other) in enumerate(pairs) if one != other), len(received))
    raise AssertionError(f"{len(received)} bytes for {len(sent)}, equal up to {equal}")


class Pki:
    """One authority and a certificate of each kind, as files."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self.ecdsa = directory / "ecdsa.pem"
        self.rsa = directory / "rsa.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        for path, kind in (
            (self.ecdsa, trustme.KeyType.ECDSA),
            (self.rsa, trustme.KeyType.RSA),
        ):
            issued = authority.issue_cert(HOST, "127.0.0.1", key_type=kind)
            issued.private_key_and_cert_chain_pem.write_to_path(str(path))

    def server(
        self, version: ssl.TLSVersion | None = None, ciphers: str | None = None
    ) -> ktls.SSLContext:
        """Our server's context; RSA is there for the suites that need it."""
        context = ktls.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ecdsa)
        context.load_cert_chain(self.rsa)
        return _restrict(context, version, ciphers)

    def client(
        self, version: ssl.TLSVersion | None = None, ciphers: str | None = None
    ) -> ktls.SSLContext:
        """Our client's context. It resumes only what a test tells it to."""
        context = ktls.create_default_context(cafile=str(self.ca))
        context.session_cache = None
        return _restrict(context, version, ciphers)


def _restrict(
    context: ktls.SSLContext, version: ssl.TLSVersion | None, ciphers: str | None
) -> ktls.SSLContext:
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if ciphers is not None:
        context.set_ciphers(ciphers)
    context.shutdown_timeout = PATIENCE
    return context


def can_rekey() -> bool:
    """Whether our sending key can change: in user space always. In the lab the kernel's name says it, not our own probe."""
    if LAB:
        return LAB == "rekey"
    return kernel_tls_unavailable() is not None or rekey_supported()


def expected_layers(version: str | None, *, small_records: bool = False) -> tuple[str, str]:
    """Where sending and receiving must be on the kernel at hand. ``small_records``: the peer takes no others."""
    has_kernel = IS_LAB or kernel_tls_unavailable() is None
    if not has_kernel:
        return "userspace", "userspace"
    can_limit_size = LAB == "rekey" if IS_LAB else max_payload_supported()
    tx = "kernel" if can_limit_size or not small_records else "userspace"
    rx = "kernel" if can_rekey() or version != "TLSv1.3" else "userspace"
    return tx, rx


class KernelCounters:
    """``/proc/net/tls_stat`` from one moment on, and what it has to show for the connections of a test."""

    def __init__(self) -> None:
        #: For tests whose peer sends records that can't be opened.
        self.may_fail_to_decrypt = False
        self._tx = self._rx = 0
        self._start = self._read()

    @staticmethod
    def _read() -> dict[str, int]:
        try:
            lines = Path("/proc/net/tls_stat").read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {name: int(value) for name, value in (line.split() for line in lines)}

    def grown(self, name: str) -> int:
        """How much the counter ``name`` has grown."""
        return self._read().get(name, 0) - self._start.get(name, 0)

    def established(self, tls: ktls.KTLSSocket, *, small_records: bool = False) -> None:
        """The records of ``tls`` are where the kernel at hand can have them, and a reason is given if and only if one is needed."""
        offload = tls.offload
        expected = expected_layers(tls.version(), small_records=small_records)
        assert (offload.tx, offload.rx) == expected, offload
        assert (offload.reason is None) == (offload.tx == offload.rx == "kernel")
        self._tx += offload.tx == "kernel"
        self._rx += offload.rx == "kernel"

    def check(self) -> None:
        """The kernel says that it had those connections, and that it could open every record."""
        if not IS_LAB:
            return
        assert self.grown("TlsTxSw") >= self._tx
        assert self.grown("TlsRxSw") >= self._rx
        if not self.may_fail_to_decrypt:
            assert self.grown("TlsDecryptError") == 0


def listen() -> socket.socket:
    """A listening socket on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(PATIENCE)
    return listener


def read_exactly(tls: ktls.KTLSSocket, count: int) -> bytes:
    """Receive ``count`` bytes, or less if the end comes first."""
    data = bytearray()
    while len(data) < count and (chunk := tls.recv(min(65536, count - len(data)))):
        data += chunk
    return bytes(data)


def read_all(tls: ktls.KTLSSocket) -> bytes:
    """Receive everything up to the peer's close_notify."""
    data = bytearray()
    while chunk := tls.recv(65536):
        data += chunk
    return bytes(data)


class Task(Generic[_T]):
    """A function at work in a thread; ``result`` waits for it. As a context manager it never leaks."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._result: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:
            self._error = error

    def result(self) -> _T:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a thread of the test does not end"
        if self._error is not None:
            raise self._error
        return self._result[0]

    def __enter__(self) -> Task[_T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.join(PATIENCE)
