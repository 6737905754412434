"""Records that the kernel refuses, and who is told of it.

Theory of operation
-------------------
The kernel looks at the header of the next record before anybody reads, and puts what is wrong with it where any call on the socket finds it, once: a send of either layer may be the first. Asking
clears it, and a reader who waits already would wait for ever. So whoever is told ends the reading direction, which wakes the reader, and says it as an error of receiving.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Final

from ktls.protocol.enums import AlertDescription
from ktls.protocol.errors import RemoteProtocolError

__all__ = ("refused", "refused_for_a_sender")

#: What an errno of reading means (the table of errors in ``kernel``), and the alert that answers it.
_MEANINGS: Final = {
    errno.EBADMSG: (
        "a record can't be opened with the current key",
        AlertDescription.BAD_RECORD_MAC,
    ),
    errno.EMSGSIZE: ("a record is too long", AlertDescription.RECORD_OVERFLOW),
    errno.EINVAL: ("what came is not a TLS record", AlertDescription.PROTOCOL_VERSION),
    errno.EKEYEXPIRED: (
        "the kernel waits for a key: another holder of this socket read a KeyUpdate",
        AlertDescription.INTERNAL_ERROR,
    ),
}


def refused(number: int | None) -> RemoteProtocolError | None:
    """Return what the errno ``number`` of a read says about the peer's records, if it is about them."""
    meaning = _MEANINGS.get(number or 0)
    return None if meaning is None else RemoteProtocolError(*meaning)


def refused_for_a_sender(sock: socket.socket, number: int | None) -> RemoteProtocolError | None:
    """Return what a send was told with the errno ``number``, if it is about received records: nobody reads the socket any more, then."""
    error = refused(number)
    if error is not None:
        with contextlib.suppress(OSError):  # the report must not get lost
            sock.shutdown(socket.SHUT_RD)
    return error
