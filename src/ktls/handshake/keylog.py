"""The key log tap: how the secrets of a handshake get out of the ``ssl`` module.

Theory of operation
-------------------
The one documented way is ``SSLContext.keylog_filename`` (format: RFC 9850). We point it to an anonymous memory file, once per context, and read
back what was appended. Everything else here is about what can go wrong with that:

* Setting ``keylog_filename`` again while another thread is inside a handshake of that context kills the interpreter. So a context is armed once and
  never touched again, except in the child of a fork, where there are no other threads. (A context that had a key log before
  and is in use by *other* code at the moment when we arm it is exposed to the same race: ``ktls.SSLContext`` arms itself when made.)
* The file is shared by all connections of the context. Lines are attributed by client_random, and only those of expected connections are
  kept. On a server the client chooses that value, and whoever saw the ClientHello of a victim can repeat it: if two handshakes
  in flight have the same one, or a label comes twice with two values, nobody gets any secret. Otherwise the attacker's
  secrets might be taken for the victim's.
* Secrets must not stay in the file. What was read is overwritten at once, and its pages are given back now and then; the offset only ever
  grows, so the writers (``O_APPEND``) are never in the way. An engine that is kept for tickets logs on, with every KeyUpdate that it is fed: that is swept up at once.
* The user's own key log goes on working: the lines are copied there.
* fork: the child would write into the parent's file, and a fork taken while another thread is inside the ``ssl`` module's key log lock leaves the
  child with a lock that nobody will open. So forks wait for every ``do_handshake`` of ours (``gate``), and the child's taps get files of their own. Handshakes in flight have no secrets in the child.
* The descriptor may be closed behind our back (daemons close everything): its identity is checked before every use.

Where it can't work (no /proc, foreign ``keylog_filename``), ``unavailable`` says why, and nothing else happens.
"""

from __future__ import annotations

import binascii
import contextlib
import inspect
import logging
import mmap
import os
import re
import ssl
import threading
import weakref
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final, final

from .gate import gate

if TYPE_CHECKING:
    import types

__all__ = ("Expected", "KeyLogTap", "SecretsUnavailableError", "tap_for")

_log = logging.getLogger("ktls.keylog")

#: The labels that we need (RFC 9850 §2); the secrets of the handshake itself are not among them.
_KEPT_LABELS: Final = frozenset(
    (b"CLIENT_RANDOM", b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0", b"EXPORTER_SECRET")
)
_FD_PATH = "/proc/self/fd/{}"
#: Linux 6.3: says that the file is not to be executed; systems with vm.memfd_noexec=2 insist on it.
_MFD_NOEXEC_SEAL: Final = 8
#: Comments; and what OpenSSL says of KeyUpdates, without a number, and of an engine that is kept for tickets: on the wire they are others, which ``log`` is told of.
_NOT_FOR_USERS: Final = re.compile(rb"#|$|(CLIENT|SERVER)_TRAFFIC_SECRET_N ")
#: label, client_random, secret
_LINE: Final = re.compile(rb"^([A-Z0-9_]+) ([0-9A-Fa-f]+) ([0-9A-Fa-f]+)\n", re.MULTILINE)
#: Give pages back when this many bytes have been read: rarely, because it takes a mapping each time.
_PUNCH_AT: Final = 65536
#: Handshakes in flight on one context, at most; beyond it the oldest go without secrets.
_MAX_EXPECTED: Final = 16384

# By descriptor: a subclass of SSLContext may have overridden the attribute (ours has).
_KEYLOG_FILENAME: Final[types.GetSetDescriptorType] = inspect.getattr_static(
    ssl.SSLContext, "keylog_filename"
)


class SecretsUnavailableError(Exception):
    """There are no secrets; the message says why, in words for a human. Never leaves ``ktls.handshake``."""


@final
class Expected:
    """A handshake in flight: what the log said of it so far. Opaque to everybody but the tap."""

    __slots__ = ("client_random", "lost", "secrets", "users")

    def __init__(self, client_random: bytes) -> None:
        self.client_random = client_random
        self.secrets: dict[bytes, bytes] = {}
        #: How many handshakes share it. More than one at any time means that all have lost.
        self.users = 1
        self.lost: str | None = None

    def __repr__(self) -> str:
        return f"<Expected {self.client_random.hex()[:8]}, {len(self.secrets)} secrets, redacted>"

    def lose(self, reason: str) -> None:
        """Have no secrets from here on."""
        self.lost = reason
        self.secrets.clear()


class _MemoryFile:
    """An anonymous file that others append to, and that we read once, erasing behind us."""

    __slots__ = ("_fd", "_identity", "_offset", "_punched", "path")

    def __init__(self) -> None:
        self._fd = self._create()
        status = os.fstat(self._fd)
        self._identity = (status.st_dev, status.st_ino)
        self._offset = 0
        self._punched = 0
        self.path = _FD_PATH.format(self._fd)

    @staticmethod
    def _create() -> int:
        try:
            return os.memfd_create("ktls-keylog", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
        except OSError:
            return os.memfd_create("ktls-keylog", os.MFD_CLOEXEC)  # before Linux 6.3

    def is_same_file(self, fd: int) -> bool:
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) == self._identity

    def is_ours(self) -> bool:
        """Whether our descriptor still is what it was."""
        try:
            return self.is_same_file(self._fd)
        except OSError:
            return False

    def take(self) -> bytearray:
        """Return what was appended since last time up to the last whole line, and erase it from the file. The caller erases what it is given."""
        data = bytearray(max(0, os.fstat(self._fd).st_size - self._offset))
        count = os.preadv(self._fd, (data,), self._offset) if data else 0
        end = data.rfind(b"\n", 0, count) + 1
        data[end:] = bytes(len(data) - end)  # before it is cut off: what is freed is not erased
        del data[end:]
        if end:
            # Ours is not an O_APPEND descriptor, and nobody else ever writes below the end of the file.
            os.pwrite(self._fd, bytes(end), self._offset)
            self._offset += end
            if self._offset - self._punched >= _PUNCH_AT:
                self._punch()
        return data

    def _punch(self) -> None:
        start = self._punched
        end = self._offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self._punched = end
        try:
            with mmap.mmap(self._fd, end - start, offset=start) as pages:
                pages.madvise(mmap.MADV_REMOVE)
        except (OSError, ValueError):
            pass  # zeroed already; only the memory stays

    def leads_here(self) -> bool:
        """Whether ``path`` is this file. It would not be if what is mounted on /proc were something else."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def close(self) -> None:
        if self.is_ours():
            os.close(self._fd)


@final
class KeyLogTap:
    """The tap of one ``ssl.SSLContext``; get it from ``tap_for``. Thread-safe."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = weakref.ref(context)
        self._lock = threading.Lock()
        self._expected: OrderedDict[bytes, Expected] = OrderedDict()
        self._forgotten: deque[Expected] = deque()
        self._file: _MemoryFile | None = None
        self._failure: str | None = None
        self._user_keylog: str | None = None
        self._warned = False
        prior = _KEYLOG_FILENAME.__get__(context)
        if prior is not None and not _is_tap_path(os.fsdecode(prior)):
            self._user_keylog = os.fsdecode(prior)
        self._arm(context)

    def __repr__(self) -> str:
        state = "armed" if self._failure is None else "unavailable"
        return f"<KeyLogTap {state}, {len(self._expected)} handshakes expected>"

    def _arm(self, context: ssl.SSLContext) -> None:
        try:
            file = _MemoryFile()
        except OSError as error:
            self._failure = f"no memory file for the key log: {error.strerror}"
            return
        if not file.leads_here():
            self._failure = "the key log can't be opened: there is no /proc"
            file.close()
            return
        try:
            _KEYLOG_FILENAME.__set__(context, file.path)
        except OSError as error:
            self._failure = f"the key log can't be opened ({file.path}: {error.strerror})"
            file.close()
            return
        self._file = file

    # --- for the handshake -------------------------------------------------------------------------------------

    @property
    def unavailable(self) -> str | None:
        """Why no secrets come from this context, or None."""
        if self._failure is not None or self._file is None:
            return self._failure
        context = self._context()
        if context is not None and _KEYLOG_FILENAME.__get__(context) != self._file.path:
            return "keylog_filename of the context was set again after ktls had begun to use it"
        if not self._file.is_ours():
            return "the descriptor of the key log was closed"
        return None

    def expect(self, client_random: bytes) -> Expected:
        """Keep the secrets of this handshake from here on. The answer goes to ``collect`` or ``forget``."""
        with self._lock:
            self._drop_forgotten()
            entry = self._expected.get(client_random)
            if entry is not None:
                entry.users += 1
                entry.lose("another handshake had the same client random")
                return entry
            if len(self._expected) >= _MAX_EXPECTED:
                _, oldest = self._expected.popitem(last=False)
                oldest.lose("too many handshakes at a time")
            entry = self._expected[client_random] = Expected(client_random)
            return entry

    def collect(self, expected: Expected) -> dict[str, bytes]:
        """Return what the log said, secrets by label, and forget it. Raises ``SecretsUnavailableError``."""
        with self._lock:
            reason = self.unavailable
            if reason is None:
                self._drain()
            self._drop(expected)
            secrets = {label.decode("ascii"): secret for label, secret in expected.secrets.items()}
            expected.secrets.clear()
        reason = reason or expected.lost
        if reason is not None:
            raise SecretsUnavailableError(reason)
        return secrets

    def sweep(self) -> None:
        """Erase what an engine has logged since: the secrets of KeyUpdates that it was fed. Never raises."""
        with contextlib.suppress(OSError), self._lock:
            if self.unavailable is None:
                self._drain()

    def forget(self, expected: Expected) -> None:
        """Give up on a handshake. Never waits and never raises, so it may be called by a finaliser."""
        self._forgotten.append(expected)
        if not self._lock.acquire(blocking=False):
            return  # whoever comes next will do it
        try:
            self._drop_forgotten()
            if self.unavailable is None:
                self._drain()
        except OSError:
            pass
        finally:
            self._lock.release()

    def _drop_forgotten(self) -> None:
        while self._forgotten:
            self._drop(self._forgotten.popleft())

    def _drop(self, expected: Expected) -> None:
        expected.users -= 1
        if expected.users == 0 and self._expected.get(expected.client_random) is expected:
            del self._expected[expected.client_random]

    def _drain(self) -> None:
        """Read what is new: keep what is expected, pass all of it on to the user's key log, erase it."""
        if self._file is None:
            return
        data = self._file.take()
        try:
            with memoryview(data) as view:
                self._keep_expected(view)
            if self._user_keylog is not None:
                lines = bytes(data).split(b"\n")
                self._append_to_user_keylog(
                    [line for line in lines if _NOT_FOR_USERS.match(line) is None]
                )
        finally:
            data[:] = bytes(len(data))

    def _keep_expected(self, view: memoryview) -> None:
        """Look for the secrets of handshakes in flight. No other is copied: what is freed is not erased."""
        for found in _LINE.finditer(view):
            label = found[1]
            if label not in _KEPT_LABELS:
                continue
            try:
                entry = self._expected.get(_unhex(view, found.span(2)))
                if entry is None or entry.lost is not None:
                    continue
                secret = _unhex(view, found.span(3))
            except ValueError:
                continue
            if entry.secrets.setdefault(label, secret) != secret:
                entry.lose("another handshake had the same client random")

    # --- the user's own key log --------------------------------------------------------------------------------

    @property
    def user_keylog(self) -> str | None:
        """The user's own key log file: what ``keylog_filename`` would be without us."""
        return self._user_keylog

    @user_keylog.setter
    def user_keylog(self, path: str | os.PathLike[str] | None) -> None:
        if path is not None:
            path = os.fspath(path)
            os.close(_open_keylog(path))  # like ssl: what can't be opened is refused now
        with self._lock:
            if self.unavailable is None:
                self._drain()  # what was logged before belongs to the file before
            self._user_keylog = path
            self._warned = False

    def log(self, label: str, client_random: bytes, secret: bytes) -> None:
        """Append a secret that came later (``CLIENT_TRAFFIC_SECRET_1``) to the user's key log, if there is one. Never raises."""
        if self._user_keylog is None:
            return
        line = f"{label} {client_random.hex()} {secret.hex()}".encode()
        with self._lock:
            self._append_to_user_keylog([line])

    def _append_to_user_keylog(self, lines: list[bytes]) -> None:
        if not lines or self._user_keylog is None:
            return
        try:
            fd = _open_keylog(self._user_keylog)
            try:
                if not _is_tap_file(fd):
                    os.write(fd, b"\n".join((*lines, b"")))
            finally:
                os.close(fd)
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("can't write the key log %s: %s", self._user_keylog, error.strerror)

    # --- the end, and forks ------------------------------------------------------------------------------------

    def rearm_in_child(self) -> None:
        """Take a new file after a fork; the one so far is the parent's."""
        self._lock = threading.Lock()  # another thread, which is gone, may hold the old one
        for expected in self._expected.values():
            expected.lose("the process forked during the handshake")
        self._expected.clear()
        self._forgotten.clear()
        context, file = self._context(), self._file
        if file is None or context is None:
            return
        taken_away = self.unavailable is not None
        self._file = None
        if taken_away:
            self._failure = "keylog_filename of the context was taken away before the fork"
        else:
            self._arm(context)
        file.close()

    def finish(self) -> None:
        """The context is gone: pass on what is left, close the file."""
        # If the lock is taken we are a finaliser inside one of our own methods; leaking a descriptor is better than waiting.
        if self._file is None or not self._lock.acquire(blocking=False):
            return
        try:
            if self._file.is_ours():
                self._drain()
            self._file.close()
            self._file = None
            self._failure = "the context is gone"
        except OSError:
            pass
        finally:
            self._lock.release()


_taps: Final[weakref.WeakKeyDictionary[ssl.SSLContext, KeyLogTap]] = weakref.WeakKeyDictionary()
_taps_lock = threading.RLock()  # re-entered by finalisers, perhaps


def _unhex(view: memoryview, span: tuple[int, int]) -> bytes:
    with view[slice(*span)] as digits:
        return binascii.unhexlify(digits)


def _open_keylog(path: str) -> int:
    # O_NONBLOCK: a FIFO that nobody reads must not stop every connection of the context.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(path, flags, 0o600)


def _is_tap_path(path: str) -> bool:
    return any(tap._file is not None and tap._file.path == path for tap in _taps.values())


def _is_tap_file(fd: int) -> bool:
    return any(tap._file is not None and tap._file.is_same_file(fd) for tap in _taps.values())


def tap_for(context: ssl.SSLContext) -> KeyLogTap:
    """Return the tap of ``context``, arming it the first time. Never raises for want of a key log: see ``unavailable``."""
    tap = _taps.get(context)
    if tap is not None:
        return tap
    with _taps_lock:
        tap = _taps.get(context)
        if tap is None:
            tap = KeyLogTap(context)
            _taps[context] = tap
            weakref.finalize(context, tap.finish)
    return tap


def _before_fork() -> None:
    gate.before_fork()
    _taps_lock.acquire()


def _after_fork_in_parent() -> None:
    _taps_lock.release()
    gate.after_fork_in_parent()


def _after_fork_in_child() -> None:
    _taps_lock.release()
    gate.after_fork_in_child()
    for tap in list(_taps.values()):
        tap.rearm_in_child()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
