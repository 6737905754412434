"""What has to come of each fault: one table, and why."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final, TypeAlias

from ktls.record.interface import DEAD_ERRNOS

from .seam import Call, Error, Fault

__all__ = ("ERRNOS", "GONE", "NO_KEY", "REFUSED", "WHOLE", "allowed", "asks", "caused_by")

#: Everything was said and heard, as if nothing had happened.
WHOLE: Final = "whole"
#: The network is gone: the error is raised, and by every further call; the peer has a beginning.
GONE: Final = "gone"
#: What came can't be read: ``RemoteProtocolError``, and an alert to the peer.
REFUSED: Final = "refused"
#: A key could not be changed: ``KeyLimitError``, and nothing more is said under the old one.
NO_KEY: Final = "no key"

ERRNOS: Final = (
    errno.EAGAIN,
    errno.EINTR,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.EPIPE,
    errno.ECONNRESET,
    errno.ETIMEDOUT,
    errno.EBADMSG,
    errno.EMSGSIZE,
    errno.EKEYEXPIRED,
    errno.EINVAL,
    errno.ENOENT,
    errno.EBUSY,
    errno.EIO,
    errno.EPERM,
)

_Row: TypeAlias = Mapping[int, tuple[str, ...]]

#: What else may be than WHOLE, and why.
_SENDS: Final[_Row] = {
    # The kernel reports it once, and then pretends. Not EBADMSG: that is a reader's error, left in the socket.
    **dict.fromkeys(DEAD_ERRNOS, (GONE,)),
}
_READS: Final[_Row] = {
    **dict.fromkeys(DEAD_ERRNOS, (GONE,)),
}
#: From kernel TLS only: plain TCP never says so, and then it may pass.
_OPENS: Final[_Row] = {
    **_READS,
    errno.EBADMSG: (f"{REFUSED} BAD_RECORD_MAC",),
    errno.EMSGSIZE: (f"{REFUSED} RECORD_OVERFLOW",),
    errno.EINVAL: (f"{REFUSED} PROTOCOL_VERSION",),
    # Another holder of the socket has taken a KeyUpdate.
    errno.EKEYEXPIRED: (f"{REFUSED} INTERNAL_ERROR",),
}
#: What is sealed in this process goes to TCP, which says none of these by itself: it is what the kernel has to say of received records.
_SENDS_SEALED: Final[_Row] = {**_OPENS, **_SENDS}
_LOOKS: Final[_Row] = {
    **_OPENS,
    # After a splice that could not: if nothing is there, then that was the one report of a framing error.
    errno.EAGAIN: (f"{REFUSED} PROTOCOL_VERSION",),
}
_KEYS: Final[_Row] = {
    **dict.fromkeys(DEAD_ERRNOS, (GONE,)),
    # "No rekey here", and "not this key": the peer waits for the new one, we have the old one only. (In receiving, EINVAL may pass.)
    errno.EBUSY: (NO_KEY, f"{REFUSED} INTERNAL_ERROR"),
    errno.EINVAL: (NO_KEY,),
}
#: Who only asks learns nothing about the network. It is asked on the way to a new key, too, and then it is the key's error.
_ASKS: Final[_Row] = _KEYS

_TABLE: Final[dict[str, _Row]] = {
    "send": _SENDS,
    "sendmsg": _SENDS,
    "sendmsg(record)": _SENDS,
    "sendfile": _SENDS,
    "shutdown": _SENDS,
    "recv": _READS,
    "recv_into": _OPENS,
    "recvmsg": _OPENS,
    "recv(peek)": _LOOKS,
    "splice": _OPENS,
    "setsockopt(TLS_TX)": _KEYS,
    "setsockopt(TLS_RX)": _KEYS,
}


def asks(call: Call) -> bool:
    """Whether ``call`` moves nothing, so that its failure leaves the connection as good as it was."""
    return call.name not in _TABLE


def caused_by(call: Call, fault: Fault) -> set[str]:
    """What else may come of ``fault`` at ``call`` than what comes of the scenario by itself."""
    if not isinstance(fault, Error):
        return set()
    row = _TABLE.get(call.name, _ASKS)
    if call.name == "send" and "UserspaceSender" in call.site:
        row = _SENDS_SEALED
    return set(row.get(fault.number, ()))


def allowed(call: Call, fault: Fault, clean: str) -> set[str]:
    """The outcomes that are right for ``fault`` at ``call``; ``clean`` is what comes of it without any."""
    return {clean} | caused_by(call, fault)
