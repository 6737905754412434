"""Wrong versions: in the headers of records, and in the handshake."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from ktls.protocol.enums import AlertDescription, AlertLevel, ContentType, HandshakeType

from ..peers.parties import Task
from ..peers.peers import Peers, Role
from ..peers.programs import PATIENCE
from ..peers.scripted import handshake_message
from .craft import DATA, inner, seal, tls13
from .matrix import Cell, Row, behaviours
from .outcomes import BAD_MAC, VERSION, Event, GoesOn, Outcome, play, rows
from .scene import Scene

#: Of SSL 3, TLS 1.0, TLS 1.3, and of nothing.
_WRONG: Final = (0x0300, 0x0301, 0x0304, 0x0000, 0xFFFF)
_STRICT: Final = "The kernel reads the legacy version of TLS 1.3, which everybody is to ignore (RFC 9846 §5.1), before it opens the record."


def _authentic(version: int) -> Callable[[Scene], None]:
    """A record that was sealed with that version in its header."""

    def do(scene: Scene) -> None:
        protection = scene.peer._tx
        inside = inner(b"data") if tls13(protection) else b"data"
        scene.peer.send_raw(seal(protection, inside, version=version))

    return do


def _changed(version: int) -> Callable[[Scene], None]:
    """A record whose header was changed on the way."""

    def do(scene: Scene) -> None:
        record = scene.peer.seal(DATA, b"data")
        scene.peer.send_raw(record[:1] + version.to_bytes(2, "big") + record[3:])

    return do


def _events(authentic: Outcome, changed: Outcome, **options: Any) -> Iterator[Event]:
    for version in _WRONG:
        name = f"version {version:#06x}"
        yield Event(f"{name}, authentic", _authentic(version), authentic, **options)
        yield Event(f"{name}, changed on the way", _changed(version), changed, **options)


@behaviours(
    *rows(
        "Version of a record, TLS 1.3",
        *_events(GoesOn(b"data"), BAD_MAC, in_kernel=VERSION, why=_STRICT, versions=("1.3",)),
    ),
    *rows("Version of a record, TLS 1.2", *_events(VERSION, VERSION, versions=("1.2",))),
)
def test_record_versions(scene: Scene) -> None:
    play(scene)


# --- in the handshake ----------------------------------------------------------------------------------------------

_NAMES: Final = {0x0300: "SSL 3", 0x0301: "TLS 1.0", 0x0302: "TLS 1.1"}
_REFUSED: Final = "the handshake fails: protocol_version"
_ALERT: Final = bytes((AlertLevel.FATAL, AlertDescription.PROTOCOL_VERSION))
#: Anything will do: the version is looked at first.
_RANDOM: Final = bytes(range(32))


def _plain(message: bytes) -> bytes:
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


def _client_hello(version: int) -> bytes:
    body = version.to_bytes(2, "big") + _RANDOM + b"\x00" + b"\x00\x02\xc0\x2b" + b"\x01\x00"
    return _plain(handshake_message(HandshakeType.CLIENT_HELLO, body))


def _server_hello(version: int) -> bytes:
    body = version.to_bytes(2, "big") + _RANDOM + b"\x00" + b"\xc0\x2b" + b"\x00"
    return _plain(handshake_message(HandshakeType.SERVER_HELLO, body))


def _hellos(role: Role, what: str, hello: Callable[[int], bytes], *versions: int) -> Iterator[Row]:
    for version in versions:
        name = f"{what} {_NAMES[version]}"
        yield Row("Handshake", name, _REFUSED, roles=(role,), suites=(), case=hello(version))


@behaviours(
    # To an offer of SSL 3 this engine says handshake_failure.
    *_hellos("server", "ClientHello that offers only", _client_hello, 0x0301, 0x0302),
    *_hellos("client", "ServerHello that chooses", _server_hello, 0x0300, 0x0301, 0x0302),
)
def test_hellos(cell: Cell, cell_peers: Peers) -> None:
    """The handshake is the engine's; that its alert gets out is ours."""
    listener = cell_peers.listener()
    hello: bytes = cell.row.case

    def peer() -> bytes:
        if cell.role == "server":
            sock = socket.create_connection(listener.getsockname(), PATIENCE)
        else:
            sock, _ = listener.accept()
            sock.settimeout(PATIENCE)
        with sock:
            if cell.role == "client":
                assert sock.recv(1)[0] == ContentType.HANDSHAKE
            sock.sendall(hello)
            received = b""
            while piece := sock.recv(4096):
                received += piece
            return received

    def ours() -> None:
        if cell.role == "server":
            cell_peers.accept(listener, cell_peers.pki.server(cell.tls_version))
        else:
            port = listener.getsockname()[1]
            cell_peers.connect(port, cell_peers.pki.client(cell.tls_version))

    with Task(peer) as answer, pytest.raises(ssl.SSLError):
        ours()
    received = answer.result()
    assert received[-7] == ContentType.ALERT
    assert received[-2:] == _ALERT
