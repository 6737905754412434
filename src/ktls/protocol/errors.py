"""Every exception of the package, sorted by whose fault it is, and nothing else.

All are ``ssl.SSLError`` (so ``OSError``): handlers written for the ``ssl`` module go on working.
Errors of the network itself (``ConnectionResetError``, ``TimeoutError``, ...) pass through as they are.
"""

from __future__ import annotations

import ssl
from typing import Any

from .enums import AlertDescription

__all__ = (
    "AlertReceived",
    "KTLSError",
    "KeyLimitError",
    "LocalProtocolError",
    "OffloadError",
    "RemoteProtocolError",
    "TruncatedError",
)


class KTLSError(ssl.SSLError):
    """Base of all errors of this package; not raised itself.

    ``recoverable`` says whether the connection can go on after it.
    """

    recoverable: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # What OSError does, calling the class with ``args``, fails for classes with arguments of their own.
        return _rebuild, (type(self), self.message), self.__dict__

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[KTLSError], message: str) -> KTLSError:
    error = cls.__new__(cls)
    KTLSError.__init__(error, message)
    return error


class LocalProtocolError(KTLSError):
    """The caller asked for something that is illegal now.

    Nothing was sent and nothing changed: the connection is as it was before the call.
    """

    recoverable = True


class RemoteProtocolError(KTLSError):
    """The peer broke the rules of TLS, or a record of its could not be verified.

    The connection has failed in both directions; ``alert`` was or will be sent to the peer. Close the socket.
    """

    def __init__(self, message: str, alert: AlertDescription) -> None:
        super().__init__(message)
        self.alert = alert


class AlertReceived(KTLSError):
    """The peer ended the connection with a fatal alert.

    ``description`` is the code (an ``AlertDescription``, or a plain ``int`` if it is not a known one).
    The connection has failed in both directions. Close the socket.
    """

    def __init__(self, description: AlertDescription | int) -> None:
        name = (
            description.name.lower()
            if isinstance(description, AlertDescription)
            else f"unknown({description})"
        )
        super().__init__(f"the peer sent the alert {name}")
        self.description = description


class TruncatedError(KTLSError, ssl.SSLEOFError):
    """TCP ended without close_notify: what was received may not be all that was sent (RFC 9846 §6.1).

    Nothing more can be read; what was read before is authentic. Sending may still work.
    """


class OffloadError(KTLSError):
    """The kernel can't do what was demanded of it with ``offload="kernel"``.

    ``reason`` says what is missing. Raised before any application data is moved; close the socket.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"kernel TLS was demanded but can't be used: {reason}")
        self.reason = reason


class KeyLimitError(KTLSError):
    """A key may not be used further, and it can't be changed.

    The sending side was closed cleanly (close_notify) first; what the peer still sends can be read where its
    key is still good.
    """
