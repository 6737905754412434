"""KeyUpdates and metering with ``openssl`` at the other end: asked for on its keyboard, by us, and by our limits (TLS 1.3)."""

from __future__ import annotations

import select
from pathlib import Path

import pytest

from ktls import KeyLimitError, KeyLimits, LocalProtocolError

from .parties import (
    IS_LAB,
    TLS12,
    TLS13,
    Task,
    can_rekey,
    payload,
    read_exactly,
    same,
)
from .peers import Link, Peers, Role
from .programs import PATIENCE

ROLES = pytest.mark.parametrize("role", ["client", "server"])
SUITES = pytest.mark.parametrize(
    "suite", ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]
)
SIZE = 100_000


def command_update(link: Link, request: bool) -> None:
    """Have the program send a KeyUpdate, and wait until it is here, not read yet. Everything before it has to be read."""
    link.program.type(b"K\n" if request else b"k\n")
    poller = select.poll()
    poller.register(link.tls, select.POLLIN)
    assert poller.poll(PATIENCE * 1000), "no KeyUpdate comes"


def generations(link: Link) -> tuple[int, int]:
    """Of our sending and our receiving key."""
    usage = link.tls.key_usage
    return usage.tx.generation, usage.rx.generation


@ROLES
@SUITES
def test_program_updates(peers: Peers, role: Role, suite: str) -> None:
    link = peers.openssl(role, TLS13, suite)
    for number in range(1, 4):
        link.exchange(SIZE)
        command_update(link, request=False)
        link.exchange(SIZE)
        assert generations(link) == (0, number)


@ROLES
@SUITES
def test_program_asks_us_to_update(peers: Peers, role: Role, suite: str) -> None:
    link = peers.openssl(role, TLS13, suite)
    link.exchange(SIZE)
    command_update(link, request=True)
    if can_rekey():
        link.exchange(SIZE)
        assert generations(link) == (1, 1)
        command_update(link, request=True)
        link.exchange(SIZE)
        assert generations(link) == (2, 2)
        return
    link.program.type(payload(10))
    assert same(read_exactly(link.tls, 10), payload(10))
    with pytest.raises(KeyLimitError):
        link.tls.send(b"!")
    # close_notify was sent instead: the program ends in peace.
    assert link.tls.recv(1) == b""
    link.tls.close()
    assert b"error" not in bytes(link.program.err).lower()


@ROLES
@SUITES
def test_we_update(peers: Peers, role: Role, suite: str) -> None:
    link = peers.openssl(role, TLS13, suite)
    link.exchange(SIZE)
    if not can_rekey():
        with pytest.raises(LocalProtocolError):
            link.tls.refresh_traffic_keys()
        link.exchange(SIZE)
        return
    link.tls.refresh_traffic_keys()
    link.exchange(SIZE)
    assert generations(link) == (1, 0)
    link.tls.refresh_traffic_keys(request_peer=True)
    link.take_turns(SIZE)
    link.exchange(SIZE)
    assert generations(link) == (2, 1)


@ROLES
def test_updates_in_the_middle_of_data(peers: Peers, role: Role) -> None:
    """We update while data flows in both directions; other threads read and type."""
    link = peers.openssl(role, TLS13)
    up, pieces = payload(SIZE * 4, seed=1), [payload(SIZE // 4, seed=n) for n in range(20)]
    with (
        Task(lambda: read_exactly(link.tls, len(up))) as received,
        Task(lambda: link.program.type(up)),
    ):
        for number, piece in enumerate(pieces):
            link.send(piece)
            if can_rekey():
                link.tls.refresh_traffic_keys(request_peer=number % 3 == 0)
    assert same(received.result(), up)
    link.check_sent()
    link.take_turns(100)
    tx, rx = generations(link)
    assert tx == (20 if can_rekey() else 0)
    assert (rx > 0) is can_rekey()


@ROLES
def test_updates_cross(peers: Peers, role: Role) -> None:
    """Both ask at once. Each gets exactly one answer."""
    link = peers.openssl(role, TLS13)
    link.exchange(100)
    for number in range(1, 6):
        command_update(link, request=True)  # not read by us yet
        if not can_rekey():
            with pytest.raises(LocalProtocolError):
                link.tls.refresh_traffic_keys(request_peer=True)
            return
        link.tls.refresh_traffic_keys(request_peer=True)
        link.take_turns(1000)
        assert generations(link) == (2 * number, 2 * number)


@ROLES
def test_a_thousand_updates_of_ours(peers: Peers, role: Role) -> None:
    count = 100 if IS_LAB else 1000
    link = peers.openssl(role, TLS13)
    if not can_rekey():
        with pytest.raises(LocalProtocolError):
            link.tls.refresh_traffic_keys()
        return
    for number in range(count):
        link.tls.refresh_traffic_keys()
        if (
            number % 25 == 0
        ):  # some versions of OpenSSL take no more than 32 without anything in between
            link.send(b"!")
    link.exchange(1000)
    assert generations(link) == (count, 0)


@ROLES
def test_updates_in_tls_12_do_not_exist(peers: Peers, role: Role) -> None:
    link = peers.openssl(role, TLS12)
    with pytest.raises(LocalProtocolError):
        link.tls.refresh_traffic_keys()
    link.exchange(1000)


# --- key logs --------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[tuple[str, str, str]]:
    """Lines of a key log: label, client_random, secret."""
    found = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            label, client_random, secret = line.split()
            found.append((label, client_random, secret.lower()))
    return found


def labelled(log: list[tuple[str, str, str]], side: str) -> list[str]:
    """Traffic secrets of one side, oldest first. OpenSSL calls all but the first ``..._N``, we say the number."""
    return [secret for label, _, secret in log if label.startswith(f"{side}_TRAFFIC_SECRET_")]


@ROLES
def test_key_logs_are_equal(peers: Peers, role: Role, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    link = peers.openssl(role, TLS13, None, "-keylogfile", theirs, keylog=ours)
    link.exchange(100)
    for _ in range(3):
        command_update(link, request=can_rekey())
        link.exchange(100)
        if can_rekey():
            link.tls.refresh_traffic_keys(request_peer=True)
            link.take_turns(100)
    our_log, their_log = read_log(ours), read_log(theirs)
    for side in ("CLIENT", "SERVER"):
        secrets = labelled(our_log, side)
        assert labelled(their_log, side) == secrets
        labels = [label for label, _, _ in our_log if label.startswith(f"{side}_TRAFFIC_SECRET_")]
        assert labels == [f"{side}_TRAFFIC_SECRET_{number}" for number in range(len(secrets))]
        if can_rekey():
            assert len(secrets) == 7
    assert {client_random for _, client_random, _ in our_log} == {their_log[0][1]}
    once = {line for line in our_log if "TRAFFIC_SECRET_" not in line[0] or line[0].endswith("_0")}
    assert once == {line for line in their_log if not line[0].endswith("_N")}


@ROLES
def test_key_logs_are_equal_in_tls_12(peers: Peers, role: Role, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    link = peers.openssl(role, TLS12, None, "-keylogfile", theirs, keylog=ours)
    link.exchange(100)
    assert read_log(ours) == read_log(theirs)


# --- metering --------------------------------------------------------------------------------------------------


def send_file(link: Link, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    link.sent(data)
    with path.open("rb") as file:
        assert link.tls.sendfile(file) == len(data)
    link.check_sent()


def test_limit_of_100_records_and_a_file_of_10000(peers: Peers, tmp_path: Path) -> None:
    """Small records, so that it is quick in the lab, too. Where the kernel can't make those, user space sends, which can rekey."""
    records = 10_000
    link = peers.openssl("server", TLS13, None, "-maxfraglen", 512, limits=KeyLimits(records=100))
    send_file(link, tmp_path / "file", payload(512 * records))
    usage = link.tls.key_usage.tx
    assert usage.limit == 100
    assert usage.records <= 100
    # One record of each hundred is the KeyUpdate.
    assert records / 100 - 1 <= usage.generation <= records / 95
    link.exchange(100)


@ROLES
def test_limit_of_100_records_and_full_records(peers: Peers, role: Role, tmp_path: Path) -> None:
    records = 300 if IS_LAB else 1_000
    link = peers.openssl(role, TLS13, None, limits=KeyLimits(records=100))
    if can_rekey():
        send_file(link, tmp_path / "file", payload(2**14 * records))
        usage = link.tls.key_usage.tx
        assert usage.records <= 100
        assert records / 100 - 1 <= usage.generation <= records / 95
        link.exchange(100)
        return
    # A key that can't be changed: what was set as its limit ends the sending side, cleanly, and not before.
    path, data = tmp_path / "file", payload(2**14 * 200)
    path.write_bytes(data)
    with path.open("rb") as file:
        with pytest.raises(KeyLimitError):
            link.tls.sendfile(file)
        sent = file.tell()
    used = 2 if role == "server" else 0  # by session tickets
    assert sent == (100 - used) * 2**14
    link.sent(data[:sent])
    link.check_sent()
    assert link.tls.recv(1) == b""  # the answer to our close_notify


@ROLES
def test_limit_for_receiving_asks_the_peer(peers: Peers, role: Role) -> None:
    """When what we receive nears the limit the program is asked for a new key, and gives it."""
    link = peers.openssl(role, TLS13, None, "-max_send_frag", 512, limits=KeyLimits(records=100))
    for _ in range(5):
        link.type(payload(512 * 100))
        link.take_turns(100)
    usage = link.tls.key_usage
    if can_rekey():
        assert usage.rx.generation >= 1
    else:
        assert usage.rx.generation == 0
