from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from ktls.cli import local_ca
from ktls.cli.local_ca import data_directory, local_identity

if TYPE_CHECKING:
    from ktls.cli.local_ca import Identity


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(identity: Identity) -> x509.SubjectAlternativeName:
    extensions = load(identity.certificate).extensions
    return extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_names_of_this_machine(identity: Identity) -> None:
    found = names(identity)
    assert {"localhost", socket.gethostname()} <= set(found.get_values_for_type(x509.DNSName))
    assert set(found.get_values_for_type(x509.IPAddress)) == {
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("::1"),
    }


def test_only_the_user_can_read_the_keys(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        directory = tmp_path / "deep" / "ktls"
        local_identity("localhost", directory)
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes["key.pem"] == modes["ca-key.pem"] == 0o600
    assert b"PRIVATE" not in (directory / "ca.pem").read_bytes()
    assert set(modes) == {"key.pem", "ca-key.pem", "cert.pem", "ca.pem", "lock"}


def test_is_used_again(tmp_path: Path) -> None:
    local_identity("localhost", tmp_path)
    first = contents(tmp_path)
    local_identity("127.0.0.1", tmp_path)
    assert contents(tmp_path) == first


def test_other_name_gets_another_certificate_of_the_same_ca(tmp_path: Path) -> None:
    before = contents(local_identity("localhost", tmp_path).ca.parent)
    identity = local_identity("files.example", tmp_path)
    assert "files.example" in names(identity).get_values_for_type(x509.DNSName)
    after = contents(tmp_path)
    assert after["ca.pem"] == before["ca.pem"]
    assert after["cert.pem"] != before["cert.pem"]


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_wildcard_is_no_name(tmp_path: Path, wildcard: str) -> None:
    addresses = names(local_identity(wildcard, tmp_path)).get_values_for_type(x509.IPAddress)
    assert ipaddress.ip_address(wildcard) not in addresses


def test_impossible_host_name_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a" * 70)
    assert names(local_identity("127.0.0.1", tmp_path)).get_values_for_type(x509.DNSName) == [
        "localhost"
    ]


@pytest.mark.parametrize("damaged", ["ca.pem", "ca-key.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize("content", [b"", b"not PEM"])
def test_damage_is_repaired(tmp_path: Path, damaged: str, content: bytes) -> None:
    identity = local_identity("localhost", tmp_path)
    (tmp_path / damaged).write_bytes(content)
    local_identity("localhost", tmp_path)
    load(identity.certificate).verify_directly_issued_by(load(identity.ca))
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
        identity.certificate, identity.key
    )


@pytest.mark.parametrize(("days", "renewed"), [(300, False), (390, True)])
def test_renewed_before_it_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, renewed: bool
) -> None:
    identity = local_identity("localhost", tmp_path)
    before = contents(tmp_path)
    expiry = load(identity.certificate).not_valid_after_utc
    now = expiry - local_ca._CERTIFICATE_LIFE + datetime.timedelta(days=days)
    monkeypatch.setattr(local_ca, "_now", lambda: now)
    local_identity("localhost", tmp_path)
    after = contents(tmp_path)
    assert (after["cert.pem"] != before["cert.pem"]) is renewed
    assert after["ca.pem"] == before["ca.pem"]


def test_two_at_once_make_one_ca(tmp_path: Path) -> None:
    found: list[bytes] = []
    start = threading.Barrier(4)

    def make() -> None:
        start.wait(10)
        found.append(local_identity("localhost", tmp_path).ca.read_bytes())

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_openssl_accepts_it_strictly(identity: Identity) -> None:
    """As Python 3.13 asks by default: key usage, identifiers, all of RFC 5280."""
    context = ssl.create_default_context(cafile=str(identity.ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(identity.certificate, identity.key)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    peer = server.wrap_bio(outgoing, incoming, server_side=True)
    for _ in range(3):
        for end in (client, peer):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    assert client.version() == "TLSv1.3"


def test_ca_may_sign_only_certificates(identity: Identity) -> None:
    extensions = load(identity.ca).extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_default_directory(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """The XDG specification: relative paths are to be ignored."""
    monkeypatch.setenv("HOME", "/home/somebody")
    if value is None:
        monkeypatch.delenv("XDG_DATA_HOME")
    else:
        monkeypatch.setenv("XDG_DATA_HOME", value)
    assert data_directory() == Path("/home/somebody/.local/share/ktls")


def test_no_key_in_any_text(identity: Identity, capfd: pytest.CaptureFixture[str]) -> None:
    assert "PRIVATE" not in repr(identity)
    assert isinstance(identity.key, Path)
    assert capfd.readouterr() == ("", "")
