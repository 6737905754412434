"""A peer that follows no rules: tlslite-ng shakes hands, then a script says what is sent, record by record.

tlslite-ng shares no code with OpenSSL or with us, so its handshake proves our secrets. Afterwards its secrets are taken, and the records are made
with ``RecordProtection``, which the other peers of these tests prove.
"""

from __future__ import annotations

import socket
import ssl
import warnings
from dataclasses import dataclass
from typing import Any, Final

import ktls
from ktls.protocol.enums import (
    AlertDescription,
    AlertLevel,
    ContentType,
    HandshakeType,
    KeyUpdateRequest,
)
from ktls.protocol.key_schedule import TrafficSecret, tls12_key_block
from ktls.protocol.messages import build_key_update
from ktls.protocol.suites import CipherSuite
from ktls.record.aead import HEADER_LENGTH, RecordProtection

from .parties import HOST, TLS13, Pki, Task
from .peers import Peers, Role
from .programs import PATIENCE

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports asyncore
    from tlslite.api import HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey

#: tlslite's names of the suites, and the code points of ours.
CIPHERS: Final = {
    "AES-128-GCM": "aes128gcm",
    "AES-256-GCM": "aes256gcm",
    "ChaCha20-Poly1305": "chacha20-poly1305",
    "AES-128-CCM": "aes128ccm",
}
UPDATE: Final = build_key_update(KeyUpdateRequest.UPDATE_NOT_REQUESTED)
UPDATE_REQUESTED: Final = build_key_update(KeyUpdateRequest.UPDATE_REQUESTED)
#: lifetime, age_add, a nonce of one byte, a ticket of four, no extensions.
TICKET: Final = bytes.fromhex("04 000012 00001c20 01020304 01 07 0004 74657374 0000")


def handshake_message(message_type: int, body: bytes = b"") -> bytes:
    return bytes((message_type,)) + len(body).to_bytes(3, "big") + body


class ScriptedPeer:
    """The peer after the handshake. What it does is up to the test."""

    def __init__(self, sock: socket.socket, connection: Any, role: Role) -> None:
        """``role`` is that of the peer."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.suite = CipherSuite(connection.session.cipherSuite)
        layer, session = connection._recordLayer, connection.session
        if connection.version == (3, 4):
            client = TrafficSecret(self.suite, bytes(session.cl_app_secret))
            server = TrafficSecret(self.suite, bytes(session.sr_app_secret))
            self.tx_secret, self.rx_secret = (
                (client, server) if role == "client" else (server, client)
            )
            tx_keys, rx_keys = self.tx_secret.keys(), self.rx_secret.keys()
        else:
            keys = tls12_key_block(
                self.suite,
                bytes(session.masterSecret),
                bytes(connection._clientRandom),
                bytes(connection._serverRandom),
            )
            tx_keys, rx_keys = keys if role == "client" else keys[::-1]
        self._tx = RecordProtection(self.suite, tx_keys, layer._writeState.seqnum)
        self._rx = RecordProtection(self.suite, rx_keys, layer._readState.seqnum)
        self._read_ahead = bytearray(connection.sock._read_buffer)

    # --- sending -----------------------------------------------------------------------------------------------

    def seal(self, content_type: int, fragment: bytes, padding: int = 0) -> bytes:
        return self._tx.seal(content_type, fragment, padding)

    def send_raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send(self, content_type: int, *fragments: bytes) -> None:
        """Send each fragment as one record, all of them at once."""
        self.send_raw(b"".join(self.seal(content_type, fragment) for fragment in fragments))

    def send_data(self, *fragments: bytes) -> None:
        self.send(ContentType.APPLICATION_DATA, *fragments)

    def send_handshake(self, *fragments: bytes) -> None:
        self.send(ContentType.HANDSHAKE, *fragments)

    def send_alert(self, description: int, level: int = AlertLevel.FATAL) -> None:
        self.send(ContentType.ALERT, bytes((level, description)))

    def close_notify(self) -> None:
        self.send_alert(AlertDescription.CLOSE_NOTIFY, AlertLevel.WARNING)

    def change_tx_key(self) -> None:
        """Send with the next key from here on."""
        self.tx_secret = self.tx_secret.next()
        self._tx = RecordProtection(self.suite, self.tx_secret.keys())

    def sealed_update(self, message: bytes = UPDATE) -> bytes:
        """Return a KeyUpdate as a record, and change the sending key."""
        record = self.seal(ContentType.HANDSHAKE, message)
        self.change_tx_key()
        return record

    def send_update(self, message: bytes = UPDATE) -> None:
        self.send_raw(self.sealed_update(message))

    # --- receiving ---------------------------------------------------------------------------------------------

    def change_rx_key(self) -> None:
        """Open with the next key from here on."""
        self.rx_secret = self.rx_secret.next()
        self._rx = RecordProtection(self.suite, self.rx_secret.keys())

    def _take(self, count: int) -> bytes | None:
        while len(self._read_ahead) < count:
            chunk = self.sock.recv(65536)
            if not chunk:
                assert not self._read_ahead, "FIN inside a record"
                return None
            self._read_ahead += chunk
        taken = bytes(self._read_ahead[:count])
        del self._read_ahead[:count]
        return taken

    def read(self) -> tuple[int, bytes] | None:
        """Return type and fragment of the next record that is no session ticket; None at FIN."""
        while True:
            header = self._take(HEADER_LENGTH)
            if header is None:
                return None
            body = self._take(int.from_bytes(header[3:], "big"))
            assert body is not None
            message = self._rx.open(header, body)
            fragment = message.fragment
            if message.content_type != ContentType.HANDSHAKE or fragment[0] != (
                HandshakeType.NEW_SESSION_TICKET
            ):
                return int(message.content_type), fragment

    def expect(self, content_type: int, fragment: bytes) -> None:
        """The next record is this one."""
        assert self.read() == (content_type, fragment)

    def expect_update(self, message: bytes = UPDATE) -> None:
        """The next record is that KeyUpdate; the receiving key changes."""
        self.expect(ContentType.HANDSHAKE, message)
        self.change_rx_key()

    def expect_alert(self, description: AlertDescription) -> None:
        """The next record is that alert, at the level that goes with it."""
        warnings = (
            AlertDescription.CLOSE_NOTIFY,
            AlertDescription.USER_CANCELED,
            AlertDescription.NO_RENEGOTIATION,
        )
        record = self.read()
        assert record is not None, f"FIN instead of {description.name}"
        level = AlertLevel.WARNING if description in warnings else AlertLevel.FATAL
        kind, fragment = record
        got = AlertDescription(fragment[1]).name if kind == ContentType.ALERT else fragment
        assert (kind, got) == (ContentType.ALERT, description.name)
        assert fragment[0] == level

    def expect_data(self, data: bytes) -> None:
        """The next records are data, ``data`` together."""
        got = b""
        while len(got) < len(data):
            record = self.read()
            assert record is not None
            assert record[0] == ContentType.APPLICATION_DATA, record
            got += record[1]
        assert got == data

    def expect_fin(self) -> None:
        assert self.read() is None


@dataclass
class Meeting:
    """Our end and the scripted one."""

    tls: ktls.KTLSSocket
    peer: ScriptedPeer


def _settings(version: ssl.TLSVersion, cipher: str) -> Any:
    settings = HandshakeSettings()
    settings.minVersion = settings.maxVersion = (3, 4) if version == TLS13 else (3, 3)
    settings.cipherNames = [CIPHERS[cipher]]
    settings.eccCurves = ["x25519", "secp256r1"]
    settings.keyShares = ["x25519"]
    settings.ticket_count = 0
    return settings


def _serve(connection: Any, pki: Pki, settings: Any) -> None:
    pem = pki.ecdsa.read_text()
    chain = X509CertChain()
    chain.parsePemList(pem)
    connection.handshakeServer(
        certChain=chain, privateKey=parsePEMKey(pem, private=True), settings=settings
    )


def meet(
    peers: Peers,
    role: Role,
    version: ssl.TLSVersion,
    cipher: str = "AES-128-GCM",
    *,
    ragged: bool = False,
    keylog: str | None = None,
) -> Meeting:
    """Shake hands with a scripted peer; ``role`` is ours. ``ragged``: as ``suppress_ragged_eofs``."""
    context = peers.pki.server(version) if role == "server" else peers.pki.client(version)
    if version != TLS13:
        context.set_ciphers("ALL")
    if keylog is not None:
        context.keylog_filename = keylog
    listener = peers.listener()
    settings = _settings(version, cipher)
    if role == "server":
        sock = peers.stack.enter_context(socket.create_connection(listener.getsockname(), PATIENCE))
        connection = TLSConnection(sock)
        with Task(
            lambda: connection.handshakeClientCert(serverName=HOST, settings=settings)
        ) as handshake:
            tls = peers.accept(listener, context, ragged=ragged)
        handshake.result()
        return Meeting(tls, ScriptedPeer(sock, connection, "client"))

    def serve() -> tuple[socket.socket, Any]:
        sock, _ = listener.accept()
        peers.stack.enter_context(sock)
        sock.settimeout(PATIENCE)
        connection = TLSConnection(sock)
        _serve(connection, peers.pki, settings)
        return sock, connection

    with Task(serve) as handshake_:
        tls = peers.connect(listener.getsockname()[1], context, ragged=ragged)
    sock, connection = handshake_.result()
    return Meeting(tls, ScriptedPeer(sock, connection, "server"))
