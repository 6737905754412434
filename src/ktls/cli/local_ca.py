"""A certificate authority of this user's own, and a certificate for this machine's names.

For ``ktls serve`` without ``--cert``: a certificate that can be trusted for once, instead of a warning to click away. Both live in the XDG data directory and are
made again when they are about to expire, or do not fit the names any more. Keys are files that only the user can read; nothing here prints one.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
import socket
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Identity", "data_directory", "local_identity")

_CA_LIFE: Final = datetime.timedelta(days=3650)
#: What browsers still accept.
_CERTIFICATE_LIFE: Final = datetime.timedelta(days=397)
_RENEW_BEFORE: Final = datetime.timedelta(days=14)
#: Clocks of the machines that connect may be behind.
_CLOCK_SKEW: Final = datetime.timedelta(hours=1)


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """Files of a certificate, its key, and the CA to trust."""

    certificate: Path
    key: Path
    ca: Path


@final
@dataclass(frozen=True, slots=True)
class _Issued:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def data_directory() -> Path:
    """Return where ``ktls`` keeps what it makes (XDG Base Directory Specification: only absolute paths count)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local/share") / "ktls"


def local_identity(host: str, directory: Path | None = None) -> Identity:
    """Return a certificate for this machine's names and ``host``; make it, and the CA, if needed. Raises ``OSError``."""
    directory = directory or data_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = _names(host)
    now = _now()
    identity = Identity(directory / "cert.pem", directory / "key.pem", directory / "ca.pem")
    with _locked(directory):
        ca = _load(identity.ca, directory / "ca-key.pem")
        if ca is None or _expires(ca.certificate, now):
            ca = _make_ca(now)
            _store(ca, identity.ca, directory / "ca-key.pem")
        issued = _load(identity.certificate, identity.key)
        if issued is None or not _fits(issued.certificate, ca.certificate, names, now):
            _store(_issue(ca, names, now), identity.certificate, identity.key)
    return identity


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _names(host: str) -> frozenset[x509.GeneralName]:
    """Every name under which a server on this machine is reached."""
    found: set[x509.GeneralName] = {x509.DNSName("localhost")}
    for name in ("127.0.0.1", "::1", socket.gethostname(), host):
        try:
            address = ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            try:
                found.add(x509.DNSName(name.encode("idna").decode("ascii")))
            except (UnicodeError, ValueError):  # a name that no client could ask for
                continue
        else:
            if not address.is_unspecified:
                found.add(x509.IPAddress(address))
    return frozenset(found)


def _make_ca(now: datetime.datetime) -> _Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"ktls local CA of {socket.gethostname()}"[:64])]
    )
    builder = (
        _builder(name, name, key.public_key(), now, _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return _Issued(builder.sign(key, hashes.SHA256()), key)


def _issue(ca: _Issued, names: frozenset[x509.GeneralName], now: datetime.datetime) -> _Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ktls serve")])
    ca_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    ordered = sorted(names, key=lambda name: str(name.value))
    builder = (
        _builder(subject, ca.certificate.subject, key.public_key(), now, _CERTIFICATE_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(ca_identifier, critical=False)
        .add_extension(x509.SubjectAlternativeName(ordered), critical=False)
    )
    return _Issued(builder.sign(ca.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    life: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _fits(
    certificate: x509.Certificate,
    ca: x509.Certificate,
    names: frozenset[x509.GeneralName],
    now: datetime.datetime,
) -> bool:
    """Whether ``certificate`` is of ``ca``, for all of ``names``, and will last."""
    try:
        certificate.verify_directly_issued_by(ca)
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except Exception:  # foreign, damaged: whatever it is, it is replaced
        return False
    return names <= set(extension.value) and not _expires(certificate, now)


def _expires(certificate: x509.Certificate, now: datetime.datetime) -> bool:
    return certificate.not_valid_after_utc - now < _RENEW_BEFORE


def _load(certificate: Path, key: Path) -> _Issued | None:
    """Return the pair if it is there and belongs together."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        return None
    return _Issued(loaded, private) if loaded.public_key() == private.public_key() else None


def _store(issued: _Issued, certificate: Path, key: Path) -> None:
    pem = serialization.Encoding.PEM
    private = issued.key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _replace(key, private, 0o600)
    _replace(certificate, issued.certificate.public_bytes(pem), 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write ``path`` as a whole or not at all. The content never is in a file that others can read before ``mode`` says so."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Two servers that start together must not make two CAs."""
    with open(directory / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
