"""Where the process meets the kernel, as Python sees it: every call on a watched descriptor is written down, and one of them is made to fail.

The methods of ``socket.socket`` and the few functions of ``os``, ``fcntl`` and Python that ``ktls`` uses are wrapped for as long as a seam is open. What lies above it (layers,
driver, front ends) and below it (the kernel) is the real thing. Descriptors that are not watched, a peer's, pass untouched.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias

import ktls
from ktls.record.linux import SOL_TLS, TCP_ULP

__all__ = ("Call", "Error", "Fault", "Seam", "Short", "Stale")

#: Makes the real call; with a number, for that many bytes at most.
Perform: TypeAlias = Callable[..., Any]

_ROOT: Final = str(Path(ktls.__file__).parent) + os.sep
_OPTIONS: Final = {
    (SOL_TLS, 1): "TLS_TX",
    (SOL_TLS, 2): "TLS_RX",
    (SOL_TLS, 5): "TLS_TX_MAX_PAYLOAD_LEN",
    (socket.IPPROTO_TCP, TCP_ULP): "TCP_ULP",
    (socket.IPPROTO_TCP, socket.TCP_INFO): "TCP_INFO",
    (socket.IPPROTO_TCP, socket.TCP_CORK): "TCP_CORK",
    (socket.IPPROTO_TCP, socket.TCP_NODELAY): "TCP_NODELAY",
    (socket.SOL_SOCKET, socket.SO_ERROR): "SO_ERROR",
    (socket.SOL_SOCKET, socket.SO_SNDTIMEO): "SO_SNDTIMEO",
    (socket.SOL_SOCKET, socket.SO_TYPE): "SO_TYPE",
}


@dataclass(frozen=True)
class Call:
    """One call: its name, with the option or what else tells it from its like, and the function of ``ktls`` that made it."""

    name: str
    site: str
    line: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.name} at {self.site} ({self.line})"


@dataclass(frozen=True)
class Error:
    """The call fails and has done nothing."""

    number: int

    def __str__(self) -> str:
        return errno.errorcode[self.number]

    def __call__(self, perform: Perform) -> Any:
        raise OSError(self.number, os.strerror(self.number))


@dataclass(frozen=True)
class Short:
    """The call does a part of its work."""

    size: int

    def __str__(self) -> str:
        return f"short({self.size})"

    def __call__(self, perform: Perform) -> Any:
        return perform(self.size)


@dataclass(frozen=True)
class Stale:
    """``fstat`` tells of a file that is cut off right afterwards."""

    extra: int

    def __str__(self) -> str:
        return f"stale(+{self.extra})"

    def __call__(self, perform: Perform) -> Any:
        values = list(perform())
        values[6] += self.extra  # st_size
        return os.stat_result(values)


Fault: TypeAlias = Error | Short | Stale


class Seam:
    """Writes down calls, and spoils them by plan."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        #: By position in ``calls``.
        self.plan: dict[int, Fault] = {}
        #: What was spoilt.
        self.hits: list[tuple[Call, Fault]] = []
        #: Only while this is set.
        self.armed = False
        #: Every call of ktls counts, on whatever descriptor, and those that make one: for what makes its own.
        self.everywhere = False
        #: If not empty: no other calls count.
        self.only: tuple[str, ...] = ()
        self._watched: set[int] = set()

    def watch(self, fd: int) -> None:
        """Take an interest in calls on ``fd``."""
        self._watched.add(fd)

    def forget(self) -> None:
        """Take no interest in any descriptor: the numbers will be somebody else's."""
        self._watched.clear()

    def pass_through(self, name: str, perform: Perform, *fds: int) -> Any:
        """Make a call, or spoil it."""
        if not self.armed or not (self.everywhere or self._watched.intersection(fds)):
            return perform()
        site = _site()
        if self.only and name not in self.only:
            return perform()
        if site is None:  # not ktls's: the event loop's, a test's
            return perform()
        call = Call(name, *site)
        fault = self.plan.get(len(self.calls))
        self.calls.append(call)
        if fault is None:
            return perform()
        self.hits.append((call, fault))
        return fault(perform)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Seam]:
        """Wrap the calls; at the end everything is as it was."""
        with contextlib.ExitStack() as stack:
            for name, wrap in _SOCKET_METHODS.items():
                method = _socket_method(self, name, wrap)
                if name in vars(socket.socket):
                    _replace(stack, socket.socket, name, method)
                else:
                    setattr(socket.socket, name, method)
                    stack.callback(delattr, socket.socket, name)
            for name in ("sendfile", "splice", "pread", "fstat"):
                _replace(stack, os, name, _os_function(self, name))
            if self.everywhere:
                _replace(stack, os, "dup", _os_function(self, "dup"))
                _replace(stack, builtins, "open", _open(self))
            for module in _users_of_ioctl():
                _replace(stack, module, "ioctl", _ioctl(self, module))
            self.armed = True
            stack.callback(setattr, self, "armed", False)
            yield self


def _site() -> tuple[str, int] | None:
    """The function of ktls that made the call, and the line; None if it was somebody else."""
    frame = sys._getframe(3)
    path = frame.f_code.co_filename
    if not path.startswith(_ROOT) or path.startswith(_ROOT + "testing"):
        return None
    return f"{path[len(_ROOT) :]}:{frame.f_code.co_qualname}", frame.f_lineno


def _replace(stack: contextlib.ExitStack, module: Any, name: str, value: Any) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def _socket_method(seam: Seam, name: str, wrap: Callable[..., tuple[str, Perform]]) -> Any:
    real = getattr(socket.socket, name)

    def method(self: socket.socket, *args: Any, **options: Any) -> Any:
        if not seam.armed or (name in _MAKING and not seam.everywhere):
            return real(self, *args, **options)
        called, perform = wrap(lambda *changed: real(self, *changed, **options), *args)
        return seam.pass_through(called, perform, self.fileno())

    return method


def _send(real: Perform, data: Any, flags: int = 0) -> tuple[str, Perform]:
    return "send", lambda size=None: real(memoryview(data)[:size], flags)


def _sendmsg(real: Perform, buffers: Any, control: Any = (), flags: int = 0) -> tuple[str, Perform]:
    def perform(size: int | None = None) -> Any:
        if size is None or control:  # a record of another type is taken whole
            return real(buffers, control, flags)
        return real([b"".join(buffers)[:size]], control, flags)

    return "sendmsg(record)" if control else "sendmsg", perform


def _recv(real: Perform, size: int, flags: int = 0) -> tuple[str, Perform]:
    name = "recv(peek)" if flags & socket.MSG_PEEK else "recv"
    return name, lambda short=None: real(min(size, short or size), flags)


def _recv_into(real: Perform, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[str, Perform]:
    size = nbytes or len(buffer)
    return "recv_into", lambda short=None: real(buffer, min(size, short or size), flags)


def _plain(name: str) -> Callable[..., tuple[str, Perform]]:
    return lambda real, *args: (name, lambda *_: real(*args))


def _option(verb: str) -> Callable[..., tuple[str, Perform]]:
    def wrap(real: Perform, level: int, option: int, *args: Any) -> tuple[str, Perform]:
        name = _OPTIONS.get((level, option), f"{level}/{option}")
        return f"{verb}({name})", lambda *_: real(level, option, *args)

    return wrap


_SOCKET_METHODS: Final[dict[str, Callable[..., tuple[str, Perform]]]] = {
    "send": _send,
    "sendmsg": _sendmsg,
    "recv": _recv,
    "recv_into": _recv_into,
    "recvmsg": _plain("recvmsg"),
    "setsockopt": _option("setsockopt"),
    "getsockopt": _option("getsockopt"),
    "shutdown": _plain("shutdown"),
    "__init__": _plain("socket"),
    "sendall": _plain("sendall"),
}

#: What makes a connection, and asks for its names: not a matter of what a connection does.
_MAKING: Final = (
    *("__init__", "bind", "listen", "connect", "accept", "getsockname", "getpeername"),
    *("settimeout", "setblocking"),
)
_SOCKET_METHODS.update((name, _plain(name)) for name in _MAKING[1:])


def _os_function(seam: Seam, name: str) -> Any:
    real = getattr(os, name)

    def function(first: int, second: Any = None, *args: Any, **options: Any) -> Any:
        def perform(size: int | None = None) -> Any:
            if name in ("fstat", "dup"):
                return real(first)
            if name == "pread":  # fd, count, offset
                return real(first, min(second, size or second), *args)
            *before, count = args  # sendfile: out, in, offset, count; splice: from, to, count
            return real(first, second, *before, min(count, size or count), **options)

        fds = (first,) if name == "pread" or second is None else (first, second)
        return seam.pass_through(name, perform, *fds)

    return function


def _open(seam: Seam) -> Any:
    real = builtins.open

    def function(*args: Any, **options: Any) -> Any:
        return seam.pass_through("open", lambda *_: real(*args, **options))

    return function


def _users_of_ioctl() -> list[ModuleType]:
    """Who has imported it by its name."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("ktls.") and getattr(module, "ioctl", None) is fcntl.ioctl
    ]


def _ioctl(seam: Seam, module: Any) -> Any:
    real = module.ioctl

    def ioctl(fd: int, request: int, argument: bytes) -> Any:
        return seam.pass_through("ioctl(SIOCOUTQ)", lambda *_: real(fd, request, argument), fd)

    return ioctl
