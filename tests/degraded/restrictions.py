"""What can be taken away from a process, or from a freshly started kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final, NamedTuple

_libc: Final = ctypes.CDLL(None, use_errno=True)

# linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h, asm/unistd_64.h
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_RET_ALLOW: Final = 0x7FFF0000
_RET_ERRNO: Final = 0x00050000
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_NUMBER_AT: Final = 0
_ARGUMENTS_AT: Final = 16
_X86_64: Final = {"setsockopt": 54, "getsockopt": 55, "ioctl": 16, "memfd_create": 319}
_CLONE_NEWNS: Final = 0x20000
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000

_SOL_TCP: Final = 6
_TCP_INFO: Final = 11
_TCP_ULP: Final = 31
_SOL_TLS: Final = 282
_TLS_TX: Final = 1
_TLS_RX: Final = 2
_SIOCOUTQ: Final = 0x5411


class Rule(NamedTuple):
    """A system call with these arguments (by position) fails with ``errno``."""

    call: str
    arguments: dict[int, int]
    errno: int


#: What policies of sandboxes forbid, each by the errno that they use for it.
POLICIES: Final = {
    "TCP_ULP, EPERM": Rule("setsockopt", {1: _SOL_TCP, 2: _TCP_ULP}, errno.EPERM),
    "TCP_ULP, EACCES": Rule("setsockopt", {1: _SOL_TCP, 2: _TCP_ULP}, errno.EACCES),
    "TCP_ULP, ENOSYS": Rule("setsockopt", {1: _SOL_TCP, 2: _TCP_ULP}, errno.ENOSYS),
    "SOL_TLS, EPERM": Rule("setsockopt", {1: _SOL_TLS}, errno.EPERM),
    "SOL_TLS, ENOSYS": Rule("setsockopt", {1: _SOL_TLS}, errno.ENOSYS),
    "TLS_TX, EPERM": Rule("setsockopt", {1: _SOL_TLS, 2: _TLS_TX}, errno.EPERM),
    "TLS_RX, EPERM": Rule("setsockopt", {1: _SOL_TLS, 2: _TLS_RX}, errno.EPERM),
    "getsockopt SOL_TLS, EPERM": Rule("getsockopt", {1: _SOL_TLS}, errno.EPERM),
    "getsockopt TCP_INFO, EPERM": Rule("getsockopt", {1: _SOL_TCP, 2: _TCP_INFO}, errno.EPERM),
    "ioctl SIOCOUTQ, EPERM": Rule("ioctl", {1: _SIOCOUTQ}, errno.EPERM),
    "memfd_create, ENOSYS": Rule("memfd_create", {}, errno.ENOSYS),
}


def forbid(rule: Rule) -> None:
    """Install a seccomp filter (x86-64) in this process: for good, for all threads to come, for all children."""
    checks = [(_NUMBER_AT, _X86_64[rule.call])]
    checks += [(_ARGUMENTS_AT + 8 * n, value) for n, value in sorted(rule.arguments.items())]
    program = b""
    for index, (offset, value) in enumerate(checks):
        to_the_end = 2 * (len(checks) - index - 1) + 1
        program += _instruction(_LOAD, 0, 0, offset)
        program += _instruction(_JUMP_IF_EQUAL, 0, to_the_end, value)
    program += _instruction(_RETURN, 0, 0, _RET_ERRNO | rule.errno)
    program += _instruction(_RETURN, 0, 0, _RET_ALLOW)
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(filter_), 0, 0))


def _instruction(code: int, if_true: int, if_false: int, operand: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def hide_proc() -> None:
    """Be without /proc, as in a bare chroot. Needs root; the rest of the machine keeps it. (In the lab there is something below it: an empty directory hides both.)"""
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(None, b"/", None, _MS_REC_PRIVATE, None))
    _check(_libc.mount(b"none", b"/proc", b"tmpfs", 0, None))


def become_nobody() -> None:
    """Give up root."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
