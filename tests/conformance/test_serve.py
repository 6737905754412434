"""``ktls serve``, a process of its own on the asyncio front end, with scripted clients and programs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any, Final

from ktls.protocol.enums import AlertDescription, ContentType
from ktls.protocol.limits import FloodBudget

from ..peers.parties import HOST, TLS13
from ..peers.peers import openssl_words
from ..peers.scripted import TICKET, UPDATE, UPDATE_REQUESTED
from ..peers.test_gnutls import priority
from .matrix import KERNEL, SCRIPTED, Cell, Mark, Row, Version, behaviours
from .programs import openssl_suite
from .scene import NO_REKEY, NO_TX_REKEY
from .serving import LARGE, SMALL, SUITES12, Target, request, serve_processes, target

__all__ = ("serve_processes", "target")

_GROUP: Final = "`ktls serve`"
_CLOSE: Final = b"\x01\x00"
_NO_REKEY_SERVE: Final = NO_REKEY.replace("reading ends with", "the server ends the connection:")
_VERSIONS: Final[tuple[Version, ...]] = ("1.3", "1.2")


def _row(
    name: str,
    expected: str,
    *,
    peer: str = SCRIPTED,
    versions: tuple[Version, ...] = _VERSIONS,
    **options: Any,
) -> Mark:
    """A row for the server; in TLS 1.2 it has fewer suites by default."""
    suites: dict[Version, tuple[str, ...] | None] = {"1.3": None, "1.2": SUITES12}
    return behaviours(
        *(
            Row(_GROUP, name, expected, peer, (one,), ("server",), suites[one], **options)
            for one in versions
        )
    )


# --- scripted ------------------------------------------------------------------------------------------------------


@_row("asks for two files", "sends them; then the end, in order")
def test_two_files(target: Target) -> None:
    with target.one_connection():
        client = target.client()
        client.get("small")
        client.get("large")
        client.peer.close_notify()
        assert client.ends() == [(ContentType.ALERT, _CLOSE)]


@_row("asks for a file byte by byte, each in a record", "sends it")
def test_byte_by_byte(target: Target) -> None:
    with target.one_connection():
        client, text = target.client(), request("large")
        client.peer.send_data(*(text[at : at + 1] for at in range(len(text))))
        client.gets(LARGE)


@_row("asks, and says close_notify at once", "the end, in order; aiohttp leaves the answer out")
def test_ask_and_close(target: Target) -> None:
    with target.one_connection():
        client = target.client()
        client.peer.send_data(request())
        client.peer.close_notify()
        assert client.ends()[-1] == (ContentType.ALERT, _CLOSE)


@_row("updates its key between two requests", "sends both files", versions=("1.3",))
def test_update(target: Target, differs: Callable[[str], None]) -> None:
    with target.one_connection():
        client = target.client()
        client.get("large")
        for _ in range(3):
            client.peer.send_update()
            if KERNEL == "norekey" and target.cell.layer == "kernel":
                differs(_NO_REKEY_SERVE)
                target.may_fail_to_decrypt()
                client.peer.send_data(request())
                assert all(kind == ContentType.ALERT for kind, _ in client.ends())
                return
            client.get("small")


@_row("asks for the server's key between two requests", "answers with its own update", versions=("1.3",))  # fmt: skip
def test_update_requested(target: Target, differs: Callable[[str], None]) -> None:
    with target.one_connection():
        client = target.client()
        client.get("large")
        client.peer.send_update(UPDATE_REQUESTED)
        client.peer.send_data(request())
        if KERNEL == "norekey" and target.cell.layer != "userspace":
            differs(NO_TX_REKEY if target.cell.layer == "mixed" else _NO_REKEY_SERVE)
            target.may_fail_to_decrypt()
            assert all(kind == ContentType.ALERT for kind, _ in client.ends())
            return
        client.peer.expect_update()
        client.gets(SMALL)
        client.get("large")


@_row("an update and a request, amid the download", "sends all of both files", versions=("1.3",))
def test_update_amid_download(target: Target, differs: Callable[[str], None]) -> None:
    with target.one_connection():
        client = target.client()
        client.peer.send_data(request("large"))
        client.peer.send_handshake(UPDATE[:2], UPDATE[2:])
        client.peer.change_tx_key()
        client.peer.send_data(request("small"))
        if KERNEL == "norekey" and target.cell.layer == "kernel":
            differs(_NO_REKEY_SERVE)
            target.may_fail_to_decrypt()
            client.ends()
            return
        client.gets(LARGE)
        client.gets(SMALL)


_UNEXPECTED: Final = AlertDescription.UNEXPECTED_MESSAGE
_MAC: Final = AlertDescription.BAD_RECORD_MAC
_VERSION: Final = AlertDescription.PROTOCOL_VERSION


def _refuses(target: Target, data: Callable[[Any], bytes], alert: AlertDescription) -> None:
    """The server sends that alert and ends; the file that it sent before was good."""
    with target.one_connection():
        client = target.client()
        client.get("small")
        client.peer.send_raw(data(client.peer))
        assert client.ends() == [(ContentType.ALERT, bytes((2, alert)))]


@_row("a record with a wrong tag", "`bad_record_mac`; serves others on")
def test_bad_tag(target: Target) -> None:
    def wrong(peer: Any) -> bytes:
        record = bytearray(peer.seal(ContentType.APPLICATION_DATA, request()))
        record[-1] ^= 1
        return bytes(record)

    target.may_fail_to_decrypt()
    _refuses(target, wrong, _MAC)


@_row("a request in plain text", "`unexpected_message`; serves others on")
def test_plain_text(target: Target, differs: Callable[[str], None]) -> None:
    alert = _UNEXPECTED
    if target.cell.layer == "kernel":
        differs("The kernel says only that the record has no header it knows: `protocol_version`.")
        alert = _VERSION
    _refuses(target, lambda _: request(), alert)


@_row("a ticket", "`unexpected_message`; serves others on", versions=("1.3",))
def test_ticket(target: Target) -> None:
    _refuses(target, lambda peer: peer.seal(ContentType.HANDSHAKE, TICKET), _UNEXPECTED)


@_row("a flood of alerts", "`unexpected_message`; serves others on")
def test_flood(target: Target) -> None:
    """user_canceled, as a warning: one by one they are harmless."""
    with target.one_connection():
        client = target.client()
        client.get("small")
        alerts = [b"\x01\x5a"] * (int(FloodBudget.CAPACITY) + 600)
        # What was not read makes TCP reset, which may take the alert with it, and may come before all is sent.
        with contextlib.suppress(ConnectionError):
            client.peer.send(ContentType.ALERT, *alerts)
        records = client.ends()
        assert records in ([], [(ContentType.ALERT, bytes((2, _UNEXPECTED)))])


@_row("FIN without close_notify, amid the download", "ends; serves others on")
def test_fin(target: Target) -> None:
    with target.one_connection():
        client = target.client()
        client.peer.send_data(request("large"))
        client.peer.sock.shutdown(socket.SHUT_WR)
        client.ends()


@_row("a fatal alert, amid the download", "ends, answers nothing; serves others on")
def test_fatal_alert(target: Target) -> None:
    with target.one_connection():
        client = target.client()
        client.get("small")
        client.peer.send_alert(AlertDescription.INTERNAL_ERROR)
        assert client.ends() == []


# --- programs ------------------------------------------------------------------------------------------------------


@_row("downloads a file", "sends it", peer="curl", engine=True)
def test_curl(cell: Cell, target: Target) -> None:
    resolve = f"{HOST}:{target.port}:127.0.0.1"
    words = ["--tlsv1.3", "--tls13-ciphers"] if cell.tls_version == TLS13 else ["--tls-max", "1.2", "--ciphers"]  # fmt: skip
    with target.one_connection():
        program = target.peers.start(
            [
                *("curl", "--silent", "--show-error", "--fail", "--http1.1", "--noproxy", "*"),
                *("--cacert", target.peers.pki.ca, "--resolve", resolve),
                *(*words, openssl_suite(cell), target.url + "large", target.url + "small"),
            ]
        )
        assert program.wait() == 0
        assert program.out.all() == LARGE + SMALL
        assert program.err.all() == b""


@_row("downloads a file", "sends it", peer="openssl", engine=True)
def test_openssl(cell: Cell, target: Target) -> None:
    with target.one_connection():
        program = target.peers.start(
            [
                *("openssl", "s_client", "-verify_return_error", "-quiet", "-CAfile"),
                *(target.peers.pki.ca, "-connect", f"127.0.0.1:{target.port}"),
                *("-servername", HOST, *openssl_words(cell.tls_version, openssl_suite(cell))),
            ]
        )
        program.type(request("large", "Connection: close"))
        assert program.out.all().endswith(b"\r\n\r\n" + LARGE)


@_row("updates its key, asks for ours, downloads a file", "sends it", peer="openssl", versions=("1.3",))  # fmt: skip
def test_openssl_updates(cell: Cell, target: Target, differs: Callable[[str], None]) -> None:
    with target.one_connection():
        program = target.peers.start(
            [
                *("openssl", "s_client", "-verify_return_error", "-brief", "-CAfile"),
                *(target.peers.pki.ca, "-connect", f"127.0.0.1:{target.port}"),
                *("-servername", HOST, *openssl_words(cell.tls_version, openssl_suite(cell))),
            ]
        )
        program.err.expect(b"Verification: OK")
        program.type(b"k\n")
        program.err.expect(b"KEYUPDATE")
        if KERNEL == "norekey" and cell.layer == "kernel":
            differs(_NO_REKEY_SERVE)
            target.may_fail_to_decrypt()
            program.type(request())
            program.wait()
            return
        program.type(b"K\n")
        program.err.expect(b"KEYUPDATE")
        program.type(request("large", "Connection: close"))
        if KERNEL == "norekey" and cell.layer == "mixed":
            differs(NO_TX_REKEY)
            assert program.wait() == 0  # it was told of the end
            return
        assert program.out.all().endswith(b"\r\n\r\n" + LARGE)


@_row("downloads a file", "sends it", peer="gnutls", engine=True)
def test_gnutls(cell: Cell, target: Target) -> None:
    extra = ":+SHA256" if cell.suite == "AES-128-CBC" else ""
    with target.one_connection():
        program = target.peers.start(
            [
                *("gnutls-cli", "127.0.0.1", "--port", target.port, "--verify-hostname", HOST),
                *("--sni-hostname", HOST, "--x509cafile", target.peers.pki.ca),
                priority(cell.tls_version, cell.suite.upper(), extra),
            ]
        )
        program.out.expect(b"Handshake was completed")
        program.type(request("small", "Connection: close"))
        program.out.expect(b"Peer has closed the GnuTLS connection")
        assert SMALL in bytes(program.out)
