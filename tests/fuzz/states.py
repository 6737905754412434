"""The state of a connection that never was, as bytes: what ``harnesses.state`` damages. Made anew each time, since the format may change."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Final

from ktls.handshake.result import PeerInfo
from ktls.record.handover import take_driver
from ktls.state import ExportedState, StateSnapshot
from ktls.testing import made_up_keys

from ..record import layers
from ..record.rig import rig

if TYPE_CHECKING:
    from ktls.protocol.suites import CipherSuite

__all__ = ("Parts", "example")

_MAGIC: Final = b"ktls state\0"
_HEADER: Final = struct.Struct(">HI")
_DIGEST: Final = 32


class Parts:
    """An exported state taken apart: its format, its text, and the bytes behind it."""

    def __init__(self, data: bytes) -> None:
        start = len(_MAGIC) + _HEADER.size
        self.version, length = _HEADER.unpack_from(data, len(_MAGIC))
        self.text = data[start : start + length]
        self.rest = data[start + length : -_DIGEST]

    def join(self, text: bytes, rest: bytes) -> bytes:
        """Return other contents in the same frame, without the digest."""
        return b"".join((_MAGIC, _HEADER.pack(self.version, len(text)), text, rest))


@functools.cache
def example(suite: CipherSuite) -> Parts:
    """Return a state in user space, with made-up secrets."""
    with rig(suite=suite, clock=lambda: 0.0) as r:
        keys = made_up_keys(suite, "us")
        r.driver.sender = layers.userspace_sender(r.sock, suite, keys, 0, 2**14)
        r.driver.receiving._early = b"early"
        snapshot = StateSnapshot(
            driver=take_driver(r.driver, clock=lambda: 0.0),
            version="TLSv1.3",
            cipher=(suite.name, "TLSv1.3", 128),
            info=PeerInfo(
                server_name="localhost",
                selected_alpn_protocol="h2",
                certificate=b"\x30\x03abc",
                certificate_dict={"subject": ((("commonName", "x"),),), "version": 3},
            ),
            server_hostname="localhost",
            tls_exporter=None,
            offload="auto",
            offload_reason=None,
            shutdown_timeout=1.0,
            suppress_ragged_eofs=True,
        )
    return Parts(ExportedState(snapshot).to_bytes())
