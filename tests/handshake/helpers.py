"""What the handshake tests share: a certificate authority, and peers that are the ``ssl`` module and nothing else."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
import trustme

from ktls.handshake.openssl import OpenSSLHandshake
from ktls.protocol.enums import ContentType
from ktls.record.aead import HEADER_LENGTH, RecordProtection

if TYPE_CHECKING:
    from ktls.handshake.result import HandshakeResult, HandshakeSecrets

HOST = "localhost"
TLS12 = ssl.TLSVersion.TLSv1_2
TLS13 = ssl.TLSVersion.TLSv1_3
VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])


@dataclass
class Pki:
    """One authority, one certificate of each kind."""

    ca: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.rsa = self.ca.issue_cert(HOST, key_type=trustme.KeyType.RSA)
        self.ecdsa = self.ca.issue_cert(HOST, "other.example", key_type=trustme.KeyType.ECDSA)

    def server(self, version: ssl.TLSVersion | None = None, *, rsa: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (self.rsa if rsa else self.ecdsa).configure_cert(context)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context

    def client(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context


class Party(Protocol):
    """What ``run`` drives: ours or theirs."""

    def feed(self, data: bytes, /) -> None: ...
    def step(self) -> bool: ...
    def data_to_send(self) -> bytes: ...


class StdlibPeer:
    """``ssl.SSLObject`` over memory, as a whole TLS endpoint."""

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        #: What was sent when the other party had completed: no longer for its handshake.
        self.late = b""
        self.sslobject = context.wrap_bio(
            self.incoming, self.outgoing, server_side, server_hostname, session
        )

    def feed(self, data: bytes) -> None:
        self.incoming.write(data)

    def step(self) -> bool:
        try:
            self.sslobject.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def data_to_send(self) -> bytes:
        return self.outgoing.read()

    def read(self) -> bytes:
        """Return the application data that has come, all of it."""
        data = b""
        try:
            while chunk := self.sslobject.read(65536):
                data += chunk
        except ssl.SSLWantReadError:
            pass
        return data

    def write(self, data: bytes) -> bytes:
        """Return ``data`` as records."""
        self.sslobject.write(data)
        return self.data_to_send()


def ours_client(context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> OpenSSLHandshake:
    return OpenSSLHandshake(context, server_side=False, server_hostname=HOST, session=session)


def ours_server(context: ssl.SSLContext) -> OpenSSLHandshake:
    return OpenSSLHandshake(context, server_side=True)


def their_client(context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> StdlibPeer:
    return StdlibPeer(context, server_side=False, server_hostname=HOST, session=session)


def their_server(context: ssl.SSLContext) -> StdlibPeer:
    return StdlibPeer(context, server_side=True)


def run(client: Party, server: Party, chunk: int | None = None) -> None:
    """Drive both to the end of the handshake, ``chunk`` bytes at a time, everything delivered."""
    parties = (client, server)
    done = [False, False]
    for _ in range(100):
        for index, party in enumerate(parties):
            done[index] = done[index] or party.step()
            data, other = party.data_to_send(), parties[1 - index]
            size = chunk or len(data) or 1
            for start in range(0, len(data), size):
                if not done[1 - index]:
                    other.feed(data[start : start + size])
                    done[1 - index] = other.step()
                elif isinstance(other, StdlibPeer):
                    other.feed(data[start : start + size])
                elif isinstance(party, StdlibPeer):
                    party.late += data[start : start + size]
        if all(done):
            return
    raise AssertionError(f"the handshake does not end: {done}")


def secrets_of(result: HandshakeResult) -> HandshakeSecrets:
    assert result.no_secrets_reason is None
    assert result.secrets is not None
    assert result.engine_object is None
    return result.secrets


def sender(result: HandshakeResult) -> RecordProtection:
    secrets = secrets_of(result)
    return RecordProtection(secrets.suite, secrets.tx_keys, secrets.tx_sequence_number)


def receiver(result: HandshakeResult) -> RecordProtection:
    secrets = secrets_of(result)
    return RecordProtection(secrets.suite, secrets.rx_keys, secrets.rx_sequence_number)


def records_of(data: bytes) -> list[bytes]:
    """Cut a stream of whole records; not with the code under test."""
    records = []
    while data:
        end = HEADER_LENGTH + int.from_bytes(data[3:5], "big")
        assert len(data) >= end
        records.append(data[:end])
        data = data[end:]
    return records


def open_all(protection: RecordProtection, data: bytes) -> list[tuple[int, bytes]]:
    """Open all records of ``data``: (content type, fragment)."""
    opened = []
    for record in records_of(data):
        message = protection.open(record[:HEADER_LENGTH], record[HEADER_LENGTH:])
        opened.append((int(message.content_type), message.fragment))
    return opened


def check_takeover(result: HandshakeResult, peer: StdlibPeer, *, sent: bytes = b"") -> None:
    """Show that a record layer can take over: a whole exchange with the peer, both ways. ``sent`` is what the peer sent beyond."""
    tx, rx = sender(result), receiver(result)
    for number in range(3):
        peer.feed(tx.seal(ContentType.APPLICATION_DATA, b"to peer %d" % number))
        assert peer.read() == b"to peer %d" % number
    stream = result.leftover + peer.late + sent + peer.data_to_send() + peer.write(b"from peer")
    data = b"".join(text for kind, text in open_all(rx, stream) if kind == 23)
    assert data == b"from peer"


# --- key logs -----------------------------------------------------------------------------------------------------

#: Client randoms.
ONE, TWO = bytes(range(32)), bytes(range(32, 64))
#: What a whole handshake of TLS 1.3 logs, as we name it.
LABELS_13 = {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0", "EXPORTER_SECRET"}


def context() -> ssl.SSLContext:
    """A context of its own for a tap."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def write(tap_context: ssl.SSLContext, *lines: str) -> None:
    """Write lines as the engine does."""
    with open(tap_context.keylog_filename, "a") as file:
        file.write("".join(lines))


def line(label: str, client_random: bytes, secret: bytes) -> str:
    """One line of a key log."""
    return f"{label} {client_random.hex()} {secret.hex()}\n"


def memory_of(tap_context: ssl.SSLContext) -> bytes:
    """What the tap's memory file holds now."""
    return Path(tap_context.keylog_filename).read_bytes()


def labels_in(path: Path) -> dict[str, set[str]]:
    """The labels in a key log, by client random in hexadecimal."""
    found: dict[str, set[str]] = {}
    for entry in path.read_text().splitlines():
        if not entry.startswith("#"):
            label, client_random, _ = entry.split(" ")
            found.setdefault(client_random, set()).add(label)
    return found
