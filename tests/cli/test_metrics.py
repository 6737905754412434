from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ktls.cli.metrics import KernelCounters, Metrics

from ..support import kernel_kind
from .helpers import client_context, parse_metrics, running_server, serve_command, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from ktls.cli.local_ca import Identity

    from .helpers import RunningServer

DATA = bytes(range(256)) * 400
LAYERS = {
    "none": ("userspace", "userspace"),
    "norekey": ("kernel", "userspace"),
    "rekey": ("kernel", "kernel"),
}


def series(metrics: Metrics) -> dict[str, float]:
    return parse_metrics(metrics.exposition("")[0].decode())


def fetch(
    server: RunningServer,
    context: ssl.SSLContext,
    *,
    session: ssl.SSLSession | None = None,
    method: str = "GET",
) -> ssl.SSLSession | None:
    with (
        socket.create_connection(("127.0.0.1", server.port), 30) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1", session=session) as tls,
    ):
        tls.sendall(f"{method} /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        while tls.recv(65536):
            pass
        return tls.session


def test_what_is_counted(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    metrics = Metrics()
    tx, rx = LAYERS[kernel_kind()]
    with running_server(identity, tmp_path, metrics=metrics) as server:
        context = client_context(server.ca)
        context.set_ciphers("ECDHE+AESGCM")
        session = fetch(server, context)
        fetch(server, context, session=session)
        fetch(server, context, session=session, method="DELETE")
        with (
            socket.create_connection(("127.0.0.1", server.port), 30) as sock,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            ssl.create_default_context().wrap_socket(sock, server_hostname="127.0.0.1")
        key = f'ktls_open_connections{{rx="{rx}",tx="{tx}"}}'
        wait_until(lambda: series(metrics)[key] == 0 and failures(metrics) == 1)
        seen = series(metrics)
    assert seen['ktls_handshakes_total{outcome="full"}'] == 1
    assert seen['ktls_handshakes_total{outcome="resumed"}'] == 2
    cipher = f'cipher="TLS_AES_256_GCM_SHA384",rx="{rx}",tx="{tx}",version="TLSv1.3"'
    assert seen[f"ktls_connections_total{{{cipher}}}"] == 3
    assert seen['ktls_http_requests_total{code="200",method="GET"}'] == 2
    assert seen['ktls_http_requests_total{code="405",method="other"}'] == 1
    assert seen[f'ktls_http_body_bytes_total{{tx="{tx}"}}'] == 2 * len(DATA)
    errors = {name: value for name, value in seen.items() if name.startswith("ktls_errors_total")}
    assert sum(errors.values()) == 1
    assert 'phase="handshake"' in next(iter(errors))


def failures(metrics: Metrics) -> float:
    return series(metrics)['ktls_handshakes_total{outcome="failed"}']


def test_exposition_is_well_formed() -> None:
    metrics = Metrics()
    text, media_type = metrics.exposition("")
    assert media_type.startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(text.decode())}
    assert {"ktls_handshakes", "ktls_key_changes", "ktls_errors"} <= names
    _, media_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")


def test_kernel_counters() -> None:
    families = list(KernelCounters(lambda: {"TlsCurrTxSw": 3, "TlsTxSw": 7, "TlsNew": 1}).collect())
    found = {
        (sample.name, sample.labels["counter"]): sample.value
        for family in families
        for sample in family.samples
    }
    assert found == {
        ("ktls_kernel_connections", "TlsCurrTxSw"): 3,
        ("ktls_kernel_events_total", "TlsTxSw"): 7,
        ("ktls_kernel_events_total", "TlsNew"): 1,
    }
    assert list(KernelCounters(dict).collect()) == []


@pytest.mark.slow
def test_command(tmp_path: Path, data_home: Path) -> None:
    with serve_command(tmp_path, data_home, "--metrics", "127.0.0.1:0") as command:
        assert command.metrics['ktls_handshakes_total{outcome="full"}'] == 0
        with command.connection() as connection:
            connection.request("GET", "/")
            connection.getresponse().read()
        assert command.metrics['ktls_handshakes_total{outcome="full"}'] == 1
        assert command.end() == ""


@pytest.mark.kernel
@pytest.mark.slow
def test_command_on_a_kernel(tmp_path: Path, data_home: Path) -> None:
    with serve_command(tmp_path, data_home, "--metrics", "0", "--workers", "2") as command:
        before = command.metrics
        with command.connection() as connection:
            connection.request("GET", "/")
            connection.getresponse().read()
            during = command.metrics
        sent = 'ktls_kernel_events_total{counter="TlsTxSw"}'
        assert during[sent] > before[sent]
        assert during['ktls_kernel_connections{counter="TlsCurrTxSw"}'] >= 1
        assert command.end() == ""


@pytest.mark.kernel
@pytest.mark.rekey
def test_key_changes(identity: Identity, tmp_path: Path) -> None:
    import ktls

    (tmp_path / "file").write_bytes(DATA)
    metrics = Metrics()
    with running_server(identity, tmp_path, metrics=metrics) as server:
        context = ktls.create_default_context(cafile=str(server.ca))
        sock = socket.create_connection(("127.0.0.1", server.port), 30)
        with context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
            tls.refresh_traffic_keys(request_peer=True)
            tls.sendall(b"GET /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while tls.recv(65536):
                pass
        seen = series(metrics)
    assert seen['ktls_key_changes_total{cause="peer",direction="rx"}'] == 1
    assert seen['ktls_key_changes_total{cause="peer_request",direction="tx"}'] == 1
