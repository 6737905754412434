"""A connection that stays with its handshake engine, for the sweeps: the handshake is done in memory, and the peer goes on record by record with its keys."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, Final

from ktls.handshake.openssl import OpenSSLHandshake
from ktls.protocol.enums import ProtocolVersion
from ktls.protocol.key_schedule import TrafficSecret
from ktls.record.aead import RecordProtection
from ktls.record.engine import EngineDriver

from ..support import HOST, TLS12, TLS13
from .layers import Layers, Options

if TYPE_CHECKING:
    import socket

    from ktls.handshake.result import HandshakeSecrets
    from ktls.testing import RecordPeer

    from ..support import Authority

__all__ = ("Engines",)

_VERSIONS: Final = {ProtocolVersion.TLSv1_2: TLS12, ProtocolVersion.TLSv1_3: TLS13}


class Engines:
    """Begins connections with the contexts of ``authority``. ``outgoing`` may be wrapped on its way to the driver."""

    def __init__(self, authority: Authority) -> None:
        self._contexts: dict[ssl.TLSVersion, tuple[ssl.SSLContext, ssl.SSLContext]] = {}
        for version in _VERSIONS.values():
            client, server = authority.client(version), authority.server(version)
            client.options |= ssl.OP_NO_RENEGOTIATION
            server.num_tickets = 0
            self._contexts[version] = client, server
            OpenSSLHandshake(server, server_side=True).close()  # the key log's file is open now
        self.layers = Layers(
            "engine", "userspace", "userspace", policy="userspace", begin=self.begin
        )

    def wrap_outgoing(self, bio: ssl.MemoryBIO) -> Any:
        """What the driver is given for ``bio``."""
        return bio

    def begin(self, sock: socket.socket, peer: RecordPeer, options: Options) -> EngineDriver:
        """Shake hands in memory; ``peer`` gets the server's keys."""
        client, server = self._contexts[_VERSIONS[options.suite.version]]
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        engine = client.wrap_bio(incoming, outgoing, server_hostname=HOST)
        theirs = OpenSSLHandshake(server, server_side=True)
        done = False
        while not done:
            try:
                engine.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            if outgoing.pending:
                theirs.feed(outgoing.read())
                theirs.step()
                incoming.write(theirs.data_to_send())
        secrets = theirs.result().secrets
        assert secrets is not None
        _instruct(peer, secrets)
        return EngineDriver(sock, engine, incoming, self.wrap_outgoing(outgoing))


def _instruct(peer: RecordPeer, secrets: HandshakeSecrets) -> None:
    """Let ``peer`` go on where the handshake has ended."""
    suite = peer.suite = secrets.suite
    peer.tx = RecordProtection(suite, secrets.tx_keys, secrets.tx_sequence_number)
    peer.rx = RecordProtection(suite, secrets.rx_keys, secrets.rx_sequence_number)
    tx, rx = secrets.tx_secret, secrets.rx_secret
    if tx is None or rx is None:
        return
    following = {"tx": tx, "rx": rx}

    def next_key(direction: str) -> RecordProtection:
        secret: TrafficSecret = following[direction].next()
        following[direction] = secret
        return RecordProtection(suite, secret.keys())

    def next_tx_key() -> None:
        peer.tx = next_key("tx")

    def next_rx_key() -> None:
        peer.rx = next_key("rx")

    peer.__dict__.update(next_tx_key=next_tx_key, next_rx_key=next_rx_key)
