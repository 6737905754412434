"""``ktls serve DIR``: an HTTPS file server."""

from __future__ import annotations

import errno
import os
import signal
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

import ktls

from .failure import Failure, reason
from .http_files import FileServer
from .local_ca import Identity, local_identity

if TYPE_CHECKING:
    from types import FrameType

    from ktls.handshake.handoff import OffloadPolicy

__all__ = ("command",)

_BIND_ERRORS: Final = {
    errno.EADDRINUSE: "it is in use",
    errno.EACCES: "ports below 1024 need privileges",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8443, show_default=True, help="0: any."
)
@click.option("--cert", metavar="FILE", help="Certificate chain, PEM.")
@click.option("--key", metavar="FILE", help="Its private key, PEM, if not in the same file.")
@click.option(
    "--offload",
    type=click.Choice(["auto", "kernel", "userspace"]),
    default="auto",
    show_default=True,
    help="Who protects the records.",
)
def command(
    *,
    directory: str,
    host: str,
    port: int,
    cert: str | None,
    key: str | None,
    offload: OffloadPolicy,
) -> int:
    """Serve the files in DIR over HTTPS.

    Without --cert, a certificate for this machine's names is made, by a local CA that is made as well.
    Every file below DIR can be read by everybody who can connect; symbolic links are followed.
    """
    root = _directory(directory)
    if key is not None and cert is None:
        raise Failure("--key needs --cert")
    identity = _local_identity(host) if cert is None else None
    context = _context(identity, cert, key, offload)
    with _bind(host, port, context, root) as server:
        _announce(server, host, root, identity)
        _run(server)
    return 0


def _directory(directory: str) -> Path:
    root = Path(directory)
    try:
        os.listdir(root)
    except OSError as error:
        raise Failure(f"cannot serve {directory}: {reason(error)}") from error
    return root.absolute()


def _local_identity(host: str) -> Identity:
    try:
        return local_identity(host)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise Failure(f"cannot make a local certificate: {what}{reason(error)}") from error


def _context(
    identity: Identity | None, cert: str | None, key: str | None, offload: OffloadPolicy
) -> ktls.SSLContext:
    certificate = str(identity.certificate) if identity else cert or ""
    key_file = str(identity.key) if identity else key or certificate
    for path in (certificate, key_file):
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise Failure(f"cannot read {path}: {reason(error)}") from error
    context = ktls.create_default_context(ssl.Purpose.CLIENT_AUTH, offload=offload)
    try:
        context.load_cert_chain(certificate, key_file, password=_refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"the key in {key_file} does not belong to the certificate in {certificate}"
        else:
            message = (
                f"{certificate} and {key_file} are not a certificate and its key in PEM format"
            )
        raise Failure(message) from error
    return context


def _refuse_password() -> NoReturn:
    # OpenSSL would ask the terminal otherwise.
    raise Failure("the key is encrypted: decrypt it first (openssl pkey)")


def _bind(host: str, port: int, context: ktls.SSLContext, root: Path) -> FileServer:
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        family, _, _, _, address = found[0]
        return FileServer(address, family, context, root)
    except socket.gaierror as error:
        raise Failure(f"unknown host {host}: {reason(error)}") from error
    except UnicodeError as error:
        raise Failure(f"unknown host {host}: no such name is possible") from error
    except OSError as error:
        why = _BIND_ERRORS.get(error.errno or 0) or reason(error)
        raise Failure(f"cannot listen on {host} port {port}: {why}") from error


def _announce(server: FileServer, host: str, root: Path, identity: Identity | None) -> None:
    name = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    url = f"https://{name}:{server.server_address[1]}/"
    if identity is not None:
        installed = "/usr/local/share/ca-certificates/ktls-local-ca.crt"
        click.echo(
            f"certificate of a local CA; for one command: ktls get --cacert {identity.ca} {url}..."
        )
        click.echo(
            f"to trust it (Debian): sudo cp {identity.ca} {installed} && sudo update-ca-certificates"
        )
    click.echo(f"listening on {url} (files in {root})")


def _run(server: FileServer) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    def serve() -> None:
        try:
            server.serve_forever()
        finally:
            stop.set()

    before: dict[int, Any] = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    thread = threading.Thread(target=serve, name="ktls-serve")
    thread.start()
    try:
        stop.wait()
    finally:
        server.shutdown()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
