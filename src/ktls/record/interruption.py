"""Exceptions of signal handlers (Ctrl-C): how a step is made that they can't come into.

Theory of operation
-------------------
CPython runs signal handlers when a function of Python is entered, when a loop goes back, and *after a call of a C function has returned*. If the handler raises
then, what the function returned is lost, though what it did is done: the record is sent, the lock is taken. Three things are done about it:

- Functions of C that call each other are one step. ``done += map(sock.send, (data,), (flags,))`` sends and notes how much before any handler can run; a ``finally``
  takes it from there. A handler that raises while the system call waits has prevented it (PEP 475): then ``done`` stays empty.
- Attributes that belong together are stored by one statement that calls nothing in between: ``self._out, self._number = out, number``.
- A record that must go out once and only once (KeyUpdate) is compared with the sequence number: it moves exactly if the record is out (``SendingHalf._send_once``).

A handler may raise an ``OSError``, too: ``TimeoutError()`` of an alarm. Where errors of system calls are dealt with, ``of_a_handler`` tells them apart: these have an errno. (One that is given
an errno is taken for the network's.)

What can't be done in one step is marked when it begins and when it has ended. Whoever comes next and finds it begun only knows that it was torn, and the
connection has failed: ``torn``.
"""

from __future__ import annotations

import errno
import ssl

from .interface import Lock

__all__ = ("acquire_and_note", "of_a_handler", "torn")


def acquire_and_note(held: list[bool], lock: Lock, timeout: float = -1) -> bool:
    """Acquire ``lock``, waiting ``timeout`` seconds at most (-1: for ever; 0: not at all); return whether that was done, and note it in ``held`` in one step.

    For use in a ``try`` whose ``finally`` releases the lock if ``held`` says so.
    """
    if timeout:
        held += map(lock.acquire, (True,), (timeout,))
    else:
        held += map(lock.acquire, (False,))
    return held[-1]


def of_a_handler(error: OSError) -> bool:
    """Whether ``error`` is neither a system call's nor the protocol's, so that it has to get through to the application."""
    return error.errno is None and not isinstance(error, ssl.SSLError)


def torn(what: str) -> ConnectionAbortedError:
    """Return the error of a connection that can't go on because ``what`` was torn."""
    return ConnectionAbortedError(
        errno.ECONNABORTED, f"the exception of a signal handler came amid {what}"
    )
