"""What scripted peers do in the long run: each behaviour with what has to become of the connection at our side.

A behaviour gets a scripted peer that has exchanged data already, and does one thing. ``expected`` is a regular expression for the end of our side; ``clean`` means that every byte
has come through both ways and both have closed in order.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ktls.protocol.enums import AlertDescription, AlertLevel, ContentType
from ktls.record.aead import HEADER_LENGTH

from ..peers.scripted import TICKET, UPDATE, UPDATE_REQUESTED, ScriptedPeer

__all__ = ("BEHAVIOURS", "Behaviour")

DATA: Final = int(ContentType.APPLICATION_DATA)
HANDSHAKE: Final = int(ContentType.HANDSHAKE)
ALERT: Final = int(ContentType.ALERT)
CLEAN: Final = "clean"
#: An alert of ours can be lost with a connection that the peer has reset.
REFUSED: Final = "RemoteProtocolError: "
CUT: Final = "TruncatedError: |ConnectionResetError: |BrokenPipeError: "


@dataclass(frozen=True)
class Behaviour:
    """One thing that a peer does after data. ``bad``: records that the kernel can't open."""

    name: str
    act: Callable[[ScriptedPeer, random.Random], None]
    expected: str = CLEAN
    bad: int = 0
    versions: tuple[str, ...] = ("1.3", "1.2")
    roles: tuple[str, ...] = ("client", "server")  # of the peer


def updates(peer: ScriptedPeer, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 6)):
        peer.send_update(UPDATE)


def update_split(peer: ScriptedPeer, rng: random.Random) -> None:
    at = rng.randrange(1, len(UPDATE))
    peer.send_handshake(UPDATE[:at])
    peer.send_handshake(UPDATE[at:])
    peer.change_tx_key()


def tickets(peer: ScriptedPeer, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 4)):
        peer.send_handshake(TICKET)


def empty_records(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send(DATA, *[b""] * rng.randrange(1, 8))


def padding(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send_raw(peer.seal(DATA, b"", rng.randrange(1, 16000)))


def user_canceled(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send_alert(AlertDescription.USER_CANCELED, AlertLevel.WARNING)


def nothing(peer: ScriptedPeer, rng: random.Random) -> None:
    pass


def bad_tag(peer: ScriptedPeer, rng: random.Random) -> None:
    record = bytearray(peer.seal(DATA, b"never seen"))
    record[rng.randrange(HEADER_LENGTH, len(record))] ^= 1 << rng.randrange(8)
    peer.send_raw(bytes(record))


def replay(peer: ScriptedPeer, rng: random.Random) -> None:
    # An empty record: seen once or not at all, it is no data.
    record = peer.seal(ALERT, bytes((AlertLevel.WARNING, AlertDescription.USER_CANCELED)))
    peer.send_raw(record + record)


def skipped(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.seal(DATA, b"lost on the way")
    peer.send_data(b"never seen")


def old_key(peer: ScriptedPeer, rng: random.Random) -> None:
    """A new key that nobody has announced."""
    peer.change_tx_key()
    peer.send_data(b"never seen")


def plain_text(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def wrong_version(peer: ScriptedPeer, rng: random.Random) -> None:
    record = bytearray(peer.seal(DATA, b"never seen"))
    record[1] = 2
    peer.send_raw(bytes(record))


def too_long(peer: ScriptedPeer, rng: random.Random) -> None:
    # The kernel looks at a header of TLS 1.2 when the explicit nonce is there as well.
    peer.send_raw(b"\x17\x03\x03" + struct.pack("!H8x", rng.randrange(2**14 + 2049, 2**16)))


def fatal_alert(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send_alert(rng.choice((10, 20, 22, 40, 47, 50, 51, 80)))


def unexpected_message(peer: ScriptedPeer, rng: random.Random) -> None:
    # ServerHello, EncryptedExtensions, Finished: nothing that belongs here in any version.
    peer.send_handshake(bytes((rng.choice((2, 8, 20)), 0, 0, 1, 0)))


def update_with_more(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send_handshake(UPDATE + TICKET[:4])


def wrong_request(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send_handshake(UPDATE[:-1] + bytes((rng.randrange(2, 256),)))


def unknown_type(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.send(rng.choice((24, 26, 99, 255)), b"?")


def fin(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.sock.shutdown(socket.SHUT_WR)


def fin_in_record(peer: ScriptedPeer, rng: random.Random) -> None:
    record = peer.seal(DATA, b"never whole")
    peer.send_raw(record[: rng.randrange(1, len(record))])
    peer.sock.shutdown(socket.SHUT_WR)


def reset(peer: ScriptedPeer, rng: random.Random) -> None:
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


#: Ask for a new key of ours; it comes with the next data.
ASKS: Final = Behaviour(
    "asks for a KeyUpdate",
    lambda peer, rng: peer.send_update(UPDATE_REQUESTED),
    versions=("1.3",),
)
_TLS13: Final = ("1.3",)

BEHAVIOURS: Final = (
    Behaviour("only data", nothing),
    ASKS,
    Behaviour("KeyUpdates", updates, versions=_TLS13),
    Behaviour("KeyUpdate in two records", update_split, versions=_TLS13),
    Behaviour("tickets", tickets, versions=_TLS13, roles=("server",)),
    Behaviour("empty records", empty_records),
    Behaviour("padding", padding, versions=_TLS13),
    Behaviour("user_canceled", user_canceled, versions=_TLS13),
    Behaviour("bad tag", bad_tag, REFUSED, bad=1),
    Behaviour("replayed record", replay, REFUSED, bad=1, versions=_TLS13),
    Behaviour("skipped record", skipped, REFUSED, bad=1),
    Behaviour("unannounced key", old_key, REFUSED, bad=1, versions=_TLS13),
    Behaviour("plain text", plain_text, REFUSED),
    Behaviour("wrong version", wrong_version, REFUSED),
    Behaviour("too long", too_long, REFUSED),
    Behaviour("fatal alert", fatal_alert, "AlertReceived: "),
    Behaviour("unexpected message", unexpected_message, REFUSED),
    Behaviour("KeyUpdate with more behind it", update_with_more, REFUSED, versions=_TLS13),
    Behaviour("wrong request", wrong_request, REFUSED, versions=_TLS13),
    Behaviour("unknown type", unknown_type, REFUSED),
    Behaviour("FIN", fin, CUT),
    Behaviour("FIN inside a record", fin_in_record, CUT),
    Behaviour("RST", reset, CUT),
)
