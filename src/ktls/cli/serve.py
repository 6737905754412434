"""``ktls serve DIR``: an HTTPS file server."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import resource
import signal
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, NoReturn

import click

import ktls

from .failure import Failure, reason
from .local_ca import Identity, local_identity

if TYPE_CHECKING:
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
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Processes that share the port. One that dies is replaced.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0.0, 86400.0),
    default=30.0,
    show_default=True,
    help="Seconds that running downloads have to finish after SIGTERM or ^C; a second signal ends them at once.",
)
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Show metrics for Prometheus at http://HOST:PORT/metrics; HOST is 127.0.0.1 unless given.",
)
def command(
    *,
    directory: str,
    host: str,
    port: int,
    cert: str | None,
    key: str | None,
    offload: OffloadPolicy,
    workers: int,
    grace: float,
    metrics: str | None,
) -> int:
    """Serve the files in DIR over HTTPS.

    Without --cert, a certificate for this machine's names is made, by a local CA that is made as well.
    Every file below DIR can be read by everybody who can connect; symbolic links are followed.
    Beside a file, FILE.br, FILE.zst and FILE.gz are sent in its place to clients that accept that coding, unless they are older.
    """
    _require_extra()
    root = _directory(directory)
    if key is not None and cert is None:
        raise Failure("--key needs --cert")
    _no_core_dumps()
    metrics_address = None if metrics is None else _metrics_address(metrics)
    identity = _local_identity(host) if cert is None else None
    context = _context(identity, cert, key, offload)
    with ExitStack() as stack:
        listeners = [stack.enter_context(sock) for sock in _listen(host, port, workers)]
        metrics_listener = None
        if metrics_address is not None:
            (metrics_listener,) = _listen(*metrics_address)
            stack.enter_context(metrics_listener)
        if metrics_listener is not None:
            click.echo(f"metrics on http://{_shown(metrics_listener)}/metrics")
        # Whoever reads that we listen may signal us before we look out for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        _announce(listeners[0].getsockname()[1], host, root, identity)
        shared = metrics_listener is not None and workers > 1
        counts = stack.enter_context(TemporaryDirectory(prefix="ktls-")) if shared else None
        return _run(
            listeners,
            root=str(root),
            context=context,
            grace=grace,
            metrics_listener=metrics_listener,
            metrics_directory=Path(counts) if counts is not None else None,
        )


def _no_core_dumps() -> None:
    # A crash must not write the private key and the secrets of all connections to the disk. Workers inherit it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _require_extra() -> None:
    for needed in ("aiohttp", "prometheus_client"):
        try:
            found = importlib.util.find_spec(needed)
        except ValueError:  # it is there in name only
            found = None
        if found is None:
            raise Failure(
                f"the command needs {needed}, which is not installed: pip install 'ktls[cli]'"
            )


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


def _listen(host: str, port: int, shared: int = 1) -> list[socket.socket]:
    from .serving import listen

    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        family, _, _, _, address = found[0]
        return listen(family, address, shared=shared)
    except socket.gaierror as error:
        raise Failure(f"unknown host {host}: {reason(error)}") from error
    except UnicodeError as error:
        raise Failure(f"unknown host {host}: no such name is possible") from error
    except OSError as error:
        why = _BIND_ERRORS.get(error.errno or 0) or reason(error)
        raise Failure(f"cannot listen on {host} port {port}: {why}") from error


def _metrics_address(where: str) -> tuple[str, int]:
    host, _, port = where.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
        raise Failure(f"--metrics needs [HOST:]PORT, not {where}")
    return host.strip("[]") or "127.0.0.1", int(port)


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _announce(port: int, host: str, root: Path, identity: Identity | None) -> None:
    name = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    url = f"https://{name}:{port}/"
    if identity is not None:
        installed = "/usr/local/share/ca-certificates/ktls-local-ca.crt"
        click.echo(
            f"certificate of a local CA; for one command: ktls get --cacert {identity.ca} {url}..."
        )
        click.echo(
            f"to trust it (Debian): sudo cp {identity.ca} {installed} && sudo update-ca-certificates"
        )
    click.echo(f"listening on {url} (files in {root})")


def _run(
    listeners: list[socket.socket],
    *,
    root: str,
    context: ktls.SSLContext,
    grace: float,
    metrics_listener: socket.socket | None,
    metrics_directory: Path | None,
) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status."""
    from .metrics import forget_worker
    from .serve_process import Plan, serve
    from .workers import Supervisor

    plan = Plan(
        root=root,
        context=context,
        grace=grace,
        metrics_listener=metrics_listener,
        metrics_directory=metrics_directory,
    )
    if len(listeners) == 1:
        serve(plan, listeners[0])
        return 0

    def on_death(pid: int) -> None:
        if metrics_directory is not None:
            forget_worker(pid, metrics_directory)

    supervisor = Supervisor(
        listeners,
        lambda listener, lifeline: serve(plan, listener, lifeline),
        grace=grace,
        on_death=on_death,
    )
    return 0 if supervisor.run() else 1
