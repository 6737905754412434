"""The key log tap."""

from __future__ import annotations

import gc
import logging
import os
import ssl
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ktls.handshake import keylog
from ktls.handshake.gate import Gate, gate
from ktls.handshake.keylog import KeyLogTap, SecretsUnavailableError, tap_for

from .helpers import (
    TLS12,
    TLS13,
    Pki,
    check_takeover,
    ours_client,
    ours_server,
    run,
    secrets_of,
    their_client,
    their_server,
)

ONE, TWO = bytes(range(32)), bytes(range(32, 64))
LABELS_13 = {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0", "EXPORTER_SECRET"}


def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def write(tap_context: ssl.SSLContext, *lines: str) -> None:
    """Write lines as the engine does."""
    with open(tap_context.keylog_filename, "a") as file:
        file.write("".join(lines))


def line(label: str, client_random: bytes, secret: bytes) -> str:
    return f"{label} {client_random.hex()} {secret.hex()}\n"


def memory_of(tap_context: ssl.SSLContext) -> bytes:
    return Path(tap_context.keylog_filename).read_bytes()


# --- attribution --------------------------------------------------------------------------------------------------


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


# --- the memory file ----------------------------------------------------------------------------------------------


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


# --- unavailable --------------------------------------------------------------------------------------------------


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


# --- the user's own key log ---------------------------------------------------------------------------------------


def labels_in(path: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in path.read_text().splitlines():
        if not entry.startswith("#"):
            label, client_random, _ = entry.split(" ")
            found.setdefault(client_random, set()).add(label)
    return found


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


# --- forks --------------------------------------------------------------------------------------------------------


FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def in_child(work: Callable[[], bytes]) -> bytes:
    """Run ``work`` in a forked child and return what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, work())
            status = 0
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, answer
    return answer


@FORKS
def test_a_child_has_a_file_of_its_own(pki: Pki, tmp_path: Path) -> None:
    client_context, server_context = pki.client(), pki.server()
    tap = tap_for(client_context)
    tap.user_keylog = tmp_path / "keys"
    in_flight = ours_client(client_context)
    in_flight.step()
    parents = memory_of(client_context)
    ours = os.stat(client_context.keylog_filename).st_ino

    def work() -> bytes:
        assert os.stat(client_context.keylog_filename).st_ino != ours
        client, peer = ours_client(client_context), their_server(server_context)
        run(client, peer)
        check_takeover(client.result(), peer)
        assert client.result().client_random is not None
        peer = their_server(server_context)
        run(in_flight, peer)
        reason = in_flight.result().no_secrets_reason
        assert reason is not None
        assert "forked" in reason
        return (client.result().client_random or b"").hex().encode()

    random = in_child(work).decode()
    assert labels_in(tmp_path / "keys")[random] >= LABELS_13
    assert memory_of(client_context) == parents
    peer = their_server(server_context)
    run(in_flight, peer)
    check_takeover(in_flight.result(), peer)


@FORKS
def test_a_child_of_a_context_that_was_taken_away(pki: Pki, tmp_path: Path) -> None:
    mine = pki.client()
    tap = tap_for(mine)
    mine.keylog_filename = str(tmp_path / "keys")

    def work() -> bytes:
        assert mine.keylog_filename == str(tmp_path / "keys")
        return (tap.unavailable or "").encode()

    assert b"taken away" in in_child(work)


def test_a_fork_waits_for_handshake_calls() -> None:
    inside, leave = threading.Event(), threading.Event()

    def handshake() -> None:
        with gate:
            inside.set()
            leave.wait(10)

    order: list[str] = []

    def end_handshake() -> None:
        order.append("left")
        leave.set()

    def begin_handshake() -> None:
        with gate:
            order.append("late")

    thread = threading.Thread(target=handshake)
    timer = threading.Timer(0.05, end_handshake)
    late = threading.Thread(target=begin_handshake)
    thread.start()
    inside.wait(10)
    timer.start()
    gate.before_fork()
    order.append("fork")
    late.start()
    time.sleep(0.05)
    order.append("forked")
    gate.after_fork_in_parent()
    for one in (thread, timer, late):
        one.join()
    assert order == ["left", "fork", "forked", "late"]


def test_a_callback_may_fork_and_handshake() -> None:
    own = Gate()
    with own:
        own.before_fork()
        with own:
            pass
        own.after_fork_in_parent()
    own.before_fork()
    own.after_fork_in_child()
    with own:
        pass


@FORKS
@pytest.mark.slow
def test_forks_among_threads_that_handshake(pki: Pki) -> None:
    """The child must never find the key log's lock closed."""
    client_context, server_context = pki.client(), pki.server()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            run(ours_client(client_context), ours_server(server_context))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert in_child(lambda: one_handshake(client_context, server_context)) == b"ok"
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def one_handshake(client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> bytes:
    client = ours_client(client_context)
    run(client, ours_server(server_context))
    secrets_of(client.result())
    return b"ok"


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
