"""The user's own key log goes on, whatever the tap does with the context."""

from __future__ import annotations

import gc
import logging
import os
import ssl
import stat
from typing import TYPE_CHECKING

import pytest

from ktls.handshake.keylog import KeyLogTap, tap_for

from .helpers import (
    LABELS_13,
    ONE,
    TLS13,
    TWO,
    Pki,
    context,
    labels_in,
    line,
    memory_of,
    ours_client,
    run,
    secrets_of,
    their_client,
    their_server,
    write,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_the_key_log_of_the_user_goes_on(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(path))
    mine = pki.client(TLS13)
    assert tap_for(mine).user_keylog == str(path)
    client = ours_client(mine)
    run(client, their_server(pki.server()))
    check = client.result()
    assert check.client_random is not None
    logged = labels_in(path)[check.client_random.hex()]
    assert logged == LABELS_13 | {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
    }
    assert path.read_text().count("#") <= 1
    assert check.key_log is not None
    check.key_log("CLIENT_TRAFFIC_SECRET_1", b"\x01\x02")
    last = path.read_text().splitlines()[-1]
    assert last == f"CLIENT_TRAFFIC_SECRET_1 {check.client_random.hex()} 0102"


def test_without_a_key_log_of_the_user_nothing_is_written(pki: Pki, tmp_path: Path) -> None:
    mine = pki.client()
    assert tap_for(mine).user_keylog is None
    tap_for(mine).log("CLIENT_TRAFFIC_SECRET_1", ONE, b"secret")
    assert memory_of(mine).startswith(b"#")


def test_failed_handshakes_are_in_the_key_log_of_the_user(pki: Pki, tmp_path: Path) -> None:
    mine = ssl.create_default_context()
    tap_for(mine).user_keylog = str(tmp_path / "keys")
    client, peer = ours_client(mine), their_server(pki.server(TLS13))
    with pytest.raises(ssl.SSLCertVerificationError):
        run(client, peer)
    (logged,) = labels_in(tmp_path / "keys").values()
    assert "SERVER_HANDSHAKE_TRAFFIC_SECRET" in logged


def test_what_others_did_with_the_context_is_passed_on_at_its_end(pki: Pki, tmp_path: Path) -> None:
    mine = pki.client(TLS13)
    tap_for(mine).user_keylog = str(tmp_path / "keys")
    run(their_client(mine), their_server(pki.server()))
    del mine
    gc.collect()
    assert len(labels_in(tmp_path / "keys")) == 1


def test_setting_the_key_log_of_the_user(tmp_path: Path) -> None:
    mine = context()
    tap = tap_for(mine)
    one, two = tmp_path / "one", tmp_path / "two"
    tap.user_keylog = one
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    write(mine, line("EXPORTER_SECRET", ONE, b"1"))
    tap.user_keylog = str(two)
    write(mine, line("EXPORTER_SECRET", TWO, b"2"))
    tap.forget(tap.expect(TWO))
    assert one.read_text() == line("EXPORTER_SECRET", ONE, b"1")
    assert two.read_text() == line("EXPORTER_SECRET", TWO, b"2")
    with pytest.raises(FileNotFoundError):
        tap.user_keylog = tmp_path / "missing" / "three"
    assert tap.user_keylog == str(two)
    tap.user_keylog = None
    tap.log("EXPORTER_SECRET", ONE, b"")
    assert two.read_text() == line("EXPORTER_SECRET", TWO, b"2")


def test_the_tap_never_writes_into_a_tap(pki: Pki) -> None:
    one, two = context(), context()
    tap_for(one)
    two.keylog_filename = one.keylog_filename
    tap = tap_for(two)
    assert tap.user_keylog is None
    size = len(memory_of(one))
    tap.user_keylog = two.keylog_filename
    tap.log("EXPORTER_SECRET", ONE, b"1")
    tap.user_keylog = one.keylog_filename
    tap.log("EXPORTER_SECRET", ONE, b"1")
    assert len(memory_of(one)) == size


def test_a_key_log_that_fails_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    tap = tap_for(mine := context())
    tap.user_keylog = folder / "keys"
    (folder / "keys").unlink()
    folder.rmdir()
    with caplog.at_level(logging.WARNING, "ktls"):
        for _ in range(3):
            tap.log("EXPORTER_SECRET", ONE, b"\xaa\xbb")
    assert len(caplog.records) == 1
    assert "aabb" not in caplog.text
    del mine


def test_a_fifo_that_nobody_reads_stops_nobody(pki: Pki, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    mine = pki.client()
    tap = tap_for(mine)
    tap._user_keylog = str(fifo)
    client = ours_client(mine)
    run(client, their_server(pki.server()))
    secrets_of(client.result())


def test_ktls_contexts_may_override_the_attribute(pki: Pki, tmp_path: Path) -> None:
    class Overriding(ssl.SSLContext):
        @property
        def keylog_filename(self) -> str:
            return tap_for(self).user_keylog or ""

        @keylog_filename.setter
        def keylog_filename(self, path: str) -> None:
            tap_for(self).user_keylog = path

    mine = Overriding(ssl.PROTOCOL_TLS_CLIENT)
    pki.ca.configure_trust(mine)
    client = ours_client(mine)
    mine.keylog_filename = str(tmp_path / "keys")
    run(client, their_server(pki.server()))
    secrets_of(client.result())
    assert len(labels_in(tmp_path / "keys")) == 1
    assert isinstance(tap_for(mine), KeyLogTap)
