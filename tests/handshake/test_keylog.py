"""The key log tap: whose the secrets are, the memory file that they pass through, and where there is none."""

from __future__ import annotations

import gc
import os
import ssl
from typing import TYPE_CHECKING

import pytest

from ktls.handshake import keylog
from ktls.handshake.keylog import SecretsUnavailableError, tap_for

from .helpers import (
    ONE,
    TLS12,
    TLS13,
    TWO,
    Pki,
    context,
    line,
    memory_of,
    ours_client,
    run,
    secrets_of,
    their_server,
    write,
)

if TYPE_CHECKING:
    from pathlib import Path


# --- attribution -----------------------------------------------------------------------------------------------------


def test_lines_go_to_whom_they_belong() -> None:
    mine = context()
    tap = tap_for(mine)
    assert tap_for(mine) is tap
    assert tap.unavailable is None
    first, second = tap.expect(ONE), tap.expect(TWO)
    write(
        mine,
        "# comment\n",
        "garbage\n",
        "EXPORTER_SECRET xyz 00\n",
        "EXPORTER_SECRET 00\n",
        line("CLIENT_HANDSHAKE_TRAFFIC_SECRET", ONE, b"not kept"),
        line("CLIENT_TRAFFIC_SECRET_0", TWO, b"two"),
        line("CLIENT_TRAFFIC_SECRET_0", ONE, b"one"),
        line("EXPORTER_SECRET", bytes(32), b"somebody else"),
        line("EXPORTER_SECRET", ONE, b"exporter")[:-1],
    )
    assert tap.collect(second) == {"CLIENT_TRAFFIC_SECRET_0": b"two"}
    write(mine, "\n")  # a line counts when it is whole
    assert tap.collect(first) == {"CLIENT_TRAFFIC_SECRET_0": b"one", "EXPORTER_SECRET": b"exporter"}


def test_what_came_before_it_was_expected_is_not_kept() -> None:
    mine = context()
    tap = tap_for(mine)
    write(mine, line("CLIENT_RANDOM", ONE, b"old"))
    tap.forget(tap.expect(TWO))
    expected = tap.expect(ONE)
    assert tap.collect(expected) == {}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_handshakes_with_one_client_random_get_nothing(order: tuple[int, int]) -> None:
    """Or else somebody who repeats a victim's ClientHello might have the victim protected with his own keys."""
    mine = context()
    tap = tap_for(mine)
    expected = [tap.expect(ONE), tap.expect(ONE)]
    write(mine, line("SERVER_TRAFFIC_SECRET_0", ONE, b"whose?"))
    for index in order:
        with pytest.raises(SecretsUnavailableError, match="same client random"):
            tap.collect(expected[index])
    fresh = tap.expect(ONE)
    write(mine, line("SERVER_TRAFFIC_SECRET_0", ONE, b"mine"))
    assert tap.collect(fresh) == {"SERVER_TRAFFIC_SECRET_0": b"mine"}


def test_a_label_with_two_values_gives_nothing() -> None:
    """The other handshake may be one that we know nothing of: the context is not ours alone."""
    mine = context()
    tap = tap_for(mine)
    expected = tap.expect(ONE)
    write(mine, line("SERVER_TRAFFIC_SECRET_0", ONE, b"a"))
    write(mine, line("SERVER_TRAFFIC_SECRET_0", ONE, b"b"))
    write(mine, line("CLIENT_TRAFFIC_SECRET_0", ONE, b"c"))
    with pytest.raises(SecretsUnavailableError, match="same client random"):
        tap.collect(expected)


def test_handshakes_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keylog, "_MAX_EXPECTED", 2)
    mine = context()
    tap = tap_for(mine)
    oldest = tap.expect(ONE)
    tap.expect(TWO)
    tap.expect(bytes(32))
    again = tap.expect(ONE)  # somebody else with the same random must not become the oldest's
    write(mine, line("EXPORTER_SECRET", ONE, b"secret"))
    with pytest.raises(SecretsUnavailableError, match="too many"):
        tap.collect(oldest)
    assert tap.collect(again) == {"EXPORTER_SECRET": b"secret"}
    assert "0 handshakes" not in repr(tap)


def test_abandoned_handshakes_are_forgotten(pki: Pki) -> None:
    mine = pki.client()
    for _ in range(3):
        client = ours_client(mine)
        client.step()
        assert "1 handshakes" in repr(tap_for(mine))
        del client
        assert "0 handshakes" in repr(tap_for(mine))
    failed = ours_client(mine)
    failed.step()
    failed.feed(b"nonsense")
    with pytest.raises(ssl.SSLError):
        failed.step()
    assert "0 handshakes" in repr(tap_for(mine))


def test_forgetting_never_waits() -> None:
    tap = tap_for(mine := context())
    expected = tap.expect(ONE)
    with tap._lock:  # as a finaliser inside one of the tap's own methods
        tap.forget(expected)
    tap.expect(TWO)
    assert "1 handshakes" in repr(tap)
    del mine


# --- the memory file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_no_secret_stays_in_the_file(pki: Pki, version: ssl.TLSVersion) -> None:
    mine = pki.client(version)
    for _ in range(3):
        client = ours_client(mine)
        run(client, their_server(pki.server(version)))
        secrets_of(client.result())
        memory = memory_of(mine)
        assert len(memory) > 100
        assert set(memory) == {0}


def test_pages_are_given_back() -> None:
    mine = context()
    tap = tap_for(mine)
    for _ in range(4):
        expected = tap.expect(ONE)
        write(mine, line("EXPORTER_SECRET", ONE, b"s") * 1000)
        assert tap.collect(expected) == {"EXPORTER_SECRET": b"s"}
    status = os.stat(mine.keylog_filename)
    assert status.st_size > 200_000
    assert status.st_blocks * 512 <= 131_072
    assert set(memory_of(mine)) == {0}


def test_the_file_goes_with_the_context() -> None:
    mine = context()
    tap_for(mine)
    path = mine.keylog_filename
    assert os.path.exists(path)
    del mine
    gc.collect()
    assert not os.path.exists(path)


def test_it_is_not_inherited_by_programs() -> None:
    mine = context()
    tap_for(mine)
    assert not os.get_inheritable(int(mine.keylog_filename.rpartition("/")[2]))


def test_kernels_without_noexec_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    create = os.memfd_create

    def old_kernel(name: str, flags: int) -> int:
        if flags != os.MFD_CLOEXEC:
            raise OSError(22, "Invalid argument")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", old_kernel)
    assert tap_for(context()).unavailable is None


# --- unavailable -----------------------------------------------------------------------------------------------------


def test_no_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    tap = tap_for(context())
    assert tap.unavailable == "no memory file for the key log: Function not implemented"
    with pytest.raises(SecretsUnavailableError, match="Function not implemented"):
        tap.collect(tap.expect(ONE))


def test_no_proc_leaks_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keylog, "_FD_PATH", "/nowhere/{}")
    before = os.listdir("/proc/self/fd")
    mine = context()
    assert "can't be opened" in (tap_for(mine).unavailable or "")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert mine.keylog_filename is None


def test_the_user_sets_another_key_log(pki: Pki, tmp_path: Path) -> None:
    mine = pki.client()
    tap = tap_for(mine)
    mine.keylog_filename = str(tmp_path / "keys")
    assert "set again" in (tap.unavailable or "")
    client, peer = ours_client(mine), their_server(pki.server())
    run(client, peer)
    assert client.result().secrets is None
    assert "set again" in (client.result().no_secrets_reason or "")
    assert "EXPORTER_SECRET" in (tmp_path / "keys").read_text()


def test_a_descriptor_closed_by_others_is_never_touched(tmp_path: Path) -> None:
    mine = context()
    tap = tap_for(mine)
    fd = int(mine.keylog_filename.rpartition("/")[2])
    victim = os.open(tmp_path / "victim", os.O_RDWR | os.O_CREAT)
    text = line("EXPORTER_SECRET", ONE, b"not ours").encode()
    os.write(victim, text)
    os.dup2(victim, fd)  # as a daemon that closes everything, and opens files of its own
    try:
        with pytest.raises(SecretsUnavailableError, match="was closed"):
            tap.collect(tap.expect(ONE))
        tap.forget(tap.expect(TWO))
        del mine, tap
        gc.collect()
        assert (tmp_path / "victim").read_bytes() == text
        os.fstat(fd)  # not closed either
    finally:
        os.close(fd)
        os.close(victim)
