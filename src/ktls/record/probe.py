"""What this kernel can do, found out by doing it on a loopback TCP pair.

Never by the kernel's version: distributions port features back, and module, crypto algorithms or privileges may be missing
on any version. Two depths:

- ``kernel_tls_unavailable``, ``counters_unreadable``, ``rekey_supported``, ``max_payload_supported``: the questions of the connection path. One pair and a
  few system calls, once per process.
- ``probe``: everything, and records sent through it; what ``ktls doctor`` shows.

Only what the kernel said about TLS is remembered. Where no pair could be made (no descriptors left, no IPv4 loopback) or it broke, or memory ran out, nothing was
found out: the answer is "not available", with that reason, and the next call tries again. Only who was kept waiting is not kept waiting twice.

What this module does not do: it reads no documentation of the running kernel (``/proc`` is asked only which privileges we have, for a
better reason), and says nothing about network cards: TLS in hardware can't be seen on loopback.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeAlias, TypeVar, final

from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.suites import AEAD, MAX_FRAGMENT, CipherSuite

from .kernel import attach
from .linux import (
    ALL_AEADS,
    SOL_TLS,
    TLS_RX,
    TLS_RX_EXPECT_NO_PAD,
    TLS_TX,
    TLS_TX_MAX_PAYLOAD_LEN,
    TLS_TX_ZEROCOPY_RO,
    pack_crypto_info,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = (
    "FORBIDDEN",
    "Capabilities",
    "Finding",
    "cache_clear",
    "counters_unreadable",
    "kernel_tls_unavailable",
    "max_payload_supported",
    "probe",
    "rekey_supported",
    "rekey_unsupported",
)

#: What sandboxes (seccomp, security modules) answer; the kernel itself has other words.
FORBIDDEN: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})

#: Seconds. Loopback answers at once; or it is down, or a packet filter eats the packets.
_TIMEOUT: Final = 2.0
#: These say something about this moment, or about the connection that it was tried on, not about the kernel.
_TRANSIENT: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR}
    | {errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE}
)
_CAP_NET_ADMIN: Final = 12  # linux/capability.h
_ON: Final = struct.pack("=i", 1)
_FULL_FRAGMENT: Final = struct.pack("=H", MAX_FRAGMENT)  # a u16: an int is refused
_RECORD: Final = b"probe"

_Cipher: TypeAlias = tuple[ProtocolVersion, AEAD]
_CIPHERS: Final = tuple(
    (version, aead)
    for version in (ProtocolVersion.TLSv1_3, ProtocolVersion.TLSv1_2)
    for aead in ALL_AEADS
)

_POLICY: Final = "a security policy forbids it"
_ULP_REFUSALS: Final = {
    errno.ENOPROTOOPT: "this kernel does not know TCP_ULP",
    **dict.fromkeys(FORBIDDEN, _POLICY),
}
_NO_REKEY: Final = "this kernel can't change keys"
_KEY_REFUSALS: Final = {
    errno.ENOENT: "the kernel has no such crypto algorithm",
    errno.EINVAL: "the kernel does not know this version or cipher",
    errno.EBUSY: _NO_REKEY,
    errno.ENOPROTOOPT: "this kernel does not know this direction",
    **dict.fromkeys(FORBIDDEN, _POLICY),
}
_OPTION_REFUSALS: Final = {
    errno.ENOPROTOOPT: "this kernel does not know the option",
    errno.EINVAL: "the kernel refuses the value",
    **dict.fromkeys(FORBIDDEN, _POLICY),
}
_COUNTER_REFUSALS: Final = dict.fromkeys(
    FORBIDDEN, "a security policy forbids reading the record counters (getsockopt)"
)


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """Whether one thing works. True if it does; else ``reason`` says why not."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


_WORKS: Final = Finding()
_NO_TLS13: Final = Finding("the kernel takes no TLS 1.3 cipher")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What this kernel can do for this process. If ``kernel_tls`` is false, everything else is, for the same reason."""

    kernel_tls: Finding
    #: Each version and cipher, sending and receiving.
    tx: Mapping[_Cipher, Finding]
    rx: Mapping[_Cipher, Finding]
    #: Setting a key a second time, as a TLS 1.3 KeyUpdate needs it.
    rekey_tx: Finding
    rekey_rx: Finding
    #: ``TLS_TX_ZEROCOPY_RO`` (without TLS in the network card it is accepted, and changes nothing).
    zerocopy_sendfile: Finding
    #: ``TLS_RX_EXPECT_NO_PAD``
    expect_no_pad: Finding
    #: ``TLS_TX_MAX_PAYLOAD_LEN``: records shorter than 16 KiB, as the peer's record_size_limit may ask.
    max_payload: Finding
    #: Nothing was found out about the kernel, only that it can't be asked now. Not cached.
    transient: bool = False


def probe() -> Capabilities:
    """Return everything about this kernel; cached per process. As root this loads the ``tls`` module."""
    return _everything()


def kernel_tls_unavailable() -> str | None:
    """Return why kernel TLS can't be used here, or None if it can; cached per process."""
    return _essentials().kernel_tls.reason


def rekey_supported() -> bool:
    """Whether the kernel can change keys in both directions; cached per process."""
    return bool(_essentials().rekey)


def rekey_unsupported() -> str | None:
    """Return why the kernel can't change a receiving key for us, or None; cached per process."""
    reason = _essentials().rekey.reason
    if reason is None or reason == _NO_REKEY:
        return reason and "this kernel can't change a receiving key"
    return f"a receiving key can't be changed: {reason}"


def counters_unreadable() -> str | None:
    """Return why the kernel's record counters can't be read, without which nobody knows how much a key was used; None if they can; cached per process."""
    return _essentials().counters.reason


def max_payload_supported() -> bool:
    """Whether the kernel can send records shorter than 16 KiB; cached per process."""
    return bool(_essentials().max_payload)


def cache_clear() -> None:
    """Forget what was found: the next call asks the kernel again (after ``modprobe tls``, and in tests)."""
    _everything.clear()
    _essentials.clear()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Essentials:
    """What the connection path asks. ``transient`` as in ``Capabilities``."""

    kernel_tls: Finding
    rekey: Finding
    max_payload: Finding
    #: Works as well where nothing was found out: this is about what forbids it.
    counters: Finding = _WORKS
    transient: bool = False


class _NothingFound(Exception):
    """There is no kernel TLS, or it can't be asked: the reason, and whether that may pass."""

    def __init__(self, reason: str, *, transient: bool) -> None:
        super().__init__(reason)
        self.finding = Finding(reason)
        self.transient = transient


def _find_essentials() -> _Essentials:
    try:
        with ExitStack() as stack:
            sock = _tls_pair(stack)[0]
            suite = _send_with_any_cipher(sock)
            if suite is None:
                return _Essentials(kernel_tls=_WORKS, rekey=_NO_TLS13, max_payload=_NO_TLS13)
            counters = _read_counter(sock)
            rekey = _set_key(sock, TLS_TX, suite)
            rekey = rekey and _set_key(sock, TLS_RX, suite) and _set_key(sock, TLS_RX, suite)
            max_payload = _set_option(sock, TLS_TX_MAX_PAYLOAD_LEN, _FULL_FRAGMENT)
            return _Essentials(
                kernel_tls=counters,
                rekey=rekey,
                max_payload=max_payload,
                counters=counters,
            )
    except _NothingFound as nothing:
        missing = nothing.finding
        return _Essentials(
            kernel_tls=missing, rekey=missing, max_payload=missing, transient=nothing.transient
        )


def _find_everything() -> Capabilities:
    try:
        # Options first: their pair also tells a missing ULP, once and not once per cipher.
        options = _find_options()
        tx: dict[_Cipher, Finding] = {}
        rx: dict[_Cipher, Finding] = {}
        for version, aead in _CIPHERS:
            tx[version, aead], rx[version, aead] = _find_cipher(version, aead)
        return replace(options, tx=MappingProxyType(tx), rx=MappingProxyType(rx))
    except _NothingFound as nothing:
        return _all_the_same(
            nothing.finding, kernel_tls=nothing.finding, transient=nothing.transient
        )


def _find_options() -> Capabilities:
    """Try what belongs to a connection rather than to a cipher, with the first TLS 1.3 cipher that works."""
    with ExitStack() as stack:
        sock = _tls_pair(stack)[0]
        suite = _send_with_any_cipher(sock)
        if suite is None:
            return _all_the_same(_NO_TLS13, kernel_tls=_WORKS)
        counters = _read_counter(sock)
        if counters.reason is not None:
            raise _NothingFound(counters.reason, transient=False)
        received = _set_key(sock, TLS_RX, suite)
        return Capabilities(
            kernel_tls=_WORKS,
            tx={},
            rx={},
            rekey_tx=_set_key(sock, TLS_TX, suite),
            rekey_rx=received and _set_key(sock, TLS_RX, suite),
            zerocopy_sendfile=_set_option(sock, TLS_TX_ZEROCOPY_RO, _ON),
            expect_no_pad=received and _set_option(sock, TLS_RX_EXPECT_NO_PAD, _ON),
            max_payload=_set_option(sock, TLS_TX_MAX_PAYLOAD_LEN, _FULL_FRAGMENT),
        )


def _find_cipher(version: ProtocolVersion, aead: AEAD) -> tuple[Finding, Finding]:
    """Find whether (sending, receiving) works. Where both take the key, a record has to come through as well."""
    suite = next(s for s in CipherSuite if s.version is version and s.aead is aead)
    keys = _random_keys(suite)
    with ExitStack() as stack:
        sender, receiver = _tls_pair(stack)
        tx = _set_key(sender, TLS_TX, suite, keys)
        rx = _set_key(receiver, TLS_RX, suite, keys)
        if tx and rx:
            try:
                sender.sendall(_RECORD)
                through = receiver.recv(len(_RECORD)) == _RECORD
            except OSError as error:
                said = _refusal(error, {}).reason
                tx = rx = Finding(f"a record does not come through: {said}")
            else:
                if not through:
                    tx = rx = Finding("a record does not come through as it was sent")
        return tx, rx


def _all_the_same(
    finding: Finding, *, kernel_tls: Finding, transient: bool = False
) -> Capabilities:
    every = MappingProxyType(dict.fromkeys(_CIPHERS, finding))
    return Capabilities(
        kernel_tls=kernel_tls,
        tx=every,
        rx=every,
        rekey_tx=finding,
        rekey_rx=finding,
        zerocopy_sendfile=finding,
        expect_no_pad=finding,
        max_payload=finding,
        transient=transient,
    )


def _send_with_any_cipher(sock: socket.socket) -> CipherSuite | None:
    """Set TLS_TX with the first TLS 1.3 cipher that the kernel takes; None if it takes none."""
    for suite in CipherSuite:
        if suite.version is ProtocolVersion.TLSv1_3 and _set_key(sock, TLS_TX, suite):
            return suite
    return None


def _set_key(
    sock: socket.socket, direction: int, suite: CipherSuite, keys: TrafficKeys | None = None
) -> Finding:
    crypto_info = pack_crypto_info(suite, keys or _random_keys(suite), 0)
    try:
        sock.setsockopt(SOL_TLS, direction, crypto_info)
    except OSError as error:
        return _refusal(error, _KEY_REFUSALS)
    return _WORKS


def _read_counter(sock: socket.socket) -> Finding:
    try:
        sock.getsockopt(SOL_TLS, TLS_TX, 4)  # version and cipher: no keys
    except OSError as error:
        return _refusal(error, _COUNTER_REFUSALS)
    return _WORKS


def _set_option(sock: socket.socket, option: int, value: bytes) -> Finding:
    try:
        sock.setsockopt(SOL_TLS, option, value)
    except OSError as error:
        return _refusal(error, _OPTION_REFUSALS)
    return _WORKS


def _refusal(error: OSError, known: Mapping[int, str]) -> Finding:
    if error.errno in _TRANSIENT:
        raise _NothingFound(f"it can't be tried now: {_text(error)}", transient=True) from error
    return Finding(known.get(error.errno or 0) or _text(error))


def _random_keys(suite: CipherSuite) -> TrafficKeys:
    tls13 = suite.version is ProtocolVersion.TLSv1_3
    iv_length = 12 if tls13 else suite.aead.fixed_iv_length
    return TrafficKeys(os.urandom(suite.aead.key_length), os.urandom(iv_length))


def _tls_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets with the ULP attached, owned by ``stack``; ``_NothingFound`` if that can't be had."""
    try:
        pair = _tcp_pair(stack)
    except OSError as error:
        reason = f"no TCP connection over 127.0.0.1 to try it on: {_text(error)}"
        # To be kept waiting once is enough, whoever eats the packets.
        raise _NothingFound(reason, transient=not isinstance(error, TimeoutError)) from error
    try:
        for sock in pair:
            attach(sock)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise _NothingFound(_why_no_module(), transient=False) from error
        finding = _refusal(error, _ULP_REFUSALS)
        raise _NothingFound(finding.reason or "", transient=False) from error
    return pair


def _tcp_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Return two TCP sockets connected to each other, with a time limit."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.settimeout(_TIMEOUT)
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        client.settimeout(_TIMEOUT)
        client.connect(listener.getsockname())
        while True:
            server, peer = listener.accept()
            stack.enter_context(server)
            server.settimeout(_TIMEOUT)
            if peer == client.getsockname():  # anybody on this machine may connect
                return client, server


def _why_no_module() -> str:
    """Say why TCP_ULP answers ENOENT. The kernel loads the module by itself, but only for CAP_NET_ADMIN (net/ipv4/tcp_ulp.c)."""
    if _may_load_modules():
        return "the kernel has no tls module, or can't load it from here"
    return "the tls module is not loaded, and only an administrator may load it (modprobe tls)"


def _may_load_modules() -> bool:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    except OSError:  # no /proc
        pass
    return os.geteuid() == 0


def _text(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


class _Passing(Protocol):
    @property
    def transient(self) -> bool: ...


_T = TypeVar("_T", bound=_Passing)


@final
class _Once(Generic[_T]):
    """Calls ``find`` once per process, whatever the number of threads; again only as long as the answer is transient."""

    __slots__ = ("_find", "_found", "_lock")

    def __init__(self, find: Callable[[], _T]) -> None:
        self._find = find
        self.clear()

    def clear(self) -> None:
        # A new lock as well: in the child of a fork, the thread that held the old one does not exist.
        self._lock = threading.Lock()
        self._found: _T | None = None

    def __call__(self) -> _T:
        if self._found is not None:  # no lock on the way of every connection
            return self._found
        with self._lock:
            if self._found is not None:
                return self._found
            found = self._find()
            if not found.transient:
                self._found = found
            return found


_essentials: Final = _Once(_find_essentials)
_everything: Final = _Once(_find_everything)
os.register_at_fork(after_in_child=cache_clear)
