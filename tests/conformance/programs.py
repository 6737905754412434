"""What the rows with other people's programs share: names of suites, and what each program is to do."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest

from ktls import KeyLimitError

from ..peers.parties import IS_LAB, TLS12, payload, read_exactly, same
from ..peers.peers import Link, Peers
from .matrix import Cell, Mark, Version, behaviour
from .scene import NO_TX_REKEY, OurEnd

#: Bytes of a transfer: several records.
SIZE: Final = 20_000 if IS_LAB else 50_000

#: Names of our suites for OpenSSL, with the certificate that both ends have.
OPENSSL_SUITES: Final[Mapping[Version, Mapping[str, str]]] = {
    "1.3": {
        "AES-128-GCM": "TLS_AES_128_GCM_SHA256",
        "AES-256-GCM": "TLS_AES_256_GCM_SHA384",
        "ChaCha20-Poly1305": "TLS_CHACHA20_POLY1305_SHA256",
        "AES-128-CCM": "TLS_AES_128_CCM_SHA256",
    },
    "1.2": {
        "AES-128-GCM": "ECDHE-ECDSA-AES128-GCM-SHA256",
        "AES-256-GCM": "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ChaCha20-Poly1305": "ECDHE-ECDSA-CHACHA20-POLY1305",
        "AES-128-CCM": "ECDHE-ECDSA-AES128-CCM",
        "AES-128-CBC": "ECDHE-ECDSA-AES128-SHA256",
    },
}

NO_SESSION: Final = "A client's connection whose records stay with the engine offers no `session`: the next one makes a full handshake."
DATA: Final = "sends and receives"
FOLLOWED: Final = "every byte, in both directions"
UPDATES: Final = "updates its key, twice"
ASKS: Final = "asks for our key"
OURS: Final = "gets our updates, the second with a request"
ENDS: Final = "closes"
WE_END: Final = "reads until we close"
RESUMES: Final = "resumes a session"


def row(peer: str, name: str, expected: str, **options: Any) -> Mark:
    """A row of the table of ``peer``."""
    return behaviour("Data, updates, ends, resumption", name, expected, peer=peer, **options)


def openssl_suite(cell: Cell) -> str:
    return OPENSSL_SUITES[cell.version][cell.suite]


def restrict(cell: Cell, peers: Peers) -> None:
    """Let our contexts take the suite of ``cell`` only. In TLS 1.3 it is the peer that says which."""
    if cell.tls_version == TLS12:
        for context in (peers.pki.server(TLS12), peers.pki.client(TLS12)):
            context.set_ciphers(openssl_suite(cell))


def check_suite(cell: Cell, our_end: OurEnd) -> None:
    """The connection has the suite of its cell."""
    cipher = our_end.tls.cipher()
    assert cipher is not None
    assert cipher[0] == openssl_suite(cell)


def gets_no_answer(our_end: OurEnd, link: Link) -> None:
    """The program asked for our key, which this kernel can't change: a clean end of our side, in the program's eyes as well."""
    our_end.differs(NO_TX_REKEY)
    link.program.type(payload(10))
    assert same(read_exactly(link.tls, 10), payload(10))
    with pytest.raises(KeyLimitError):
        link.tls.send(b"!")


def no_session(cell: Cell, session: ssl.SSLSession | None, differs: Callable[[str], None]) -> bool:
    """Whether our client has no session to resume, as is so with the engine's own records."""
    if cell.layer != "engine" or cell.role != "client":
        return False
    differs(NO_SESSION)
    assert session is None
    return True
