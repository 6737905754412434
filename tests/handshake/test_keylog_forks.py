"""The key log tap among forks: each process has a memory file of its own."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ktls.handshake.gate import Gate, gate
from ktls.handshake.keylog import tap_for

from .helpers import (
    LABELS_13,
    Pki,
    check_takeover,
    labels_in,
    memory_of,
    ours_client,
    ours_server,
    run,
    secrets_of,
    their_server,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

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
