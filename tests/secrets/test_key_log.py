"""The memory file of the key log: whatever OpenSSL writes there, it is erased at once."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

import ktls
from ktls.handshake.keylog import tap_for

from ..sockets.helpers import Case, Net, read_exactly
from ..support import TLS12, TLS13, has_kernel_tls

if TYPE_CHECKING:
    from pathlib import Path

    from ..support import Authority


def written(context: ssl.SSLContext) -> int:
    """How many bytes have ever been written to the context's memory file."""
    file = tap_for(context)._file
    assert file is not None
    return os.fstat(file._fd).st_size


def content(context: ssl.SSLContext) -> bytes:
    """What the context's memory file holds."""
    file = tap_for(context)._file
    assert file is not None
    return os.pread(file._fd, written(context), 0)


def is_erased(context: ssl.SSLContext) -> bool:
    return not content(context).strip(b"\0")


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_erased_after_the_handshake(net: Net, role: Any, version: ssl.TLSVersion) -> None:
    case = Case(role=role, version=version)
    net.link(case)
    context = net.context("ktls", role, version)
    assert written(context) > 100  # there was something to be erased
    assert is_erased(context)


def test_erased_after_every_key_change(net: Net) -> None:
    """A client's engine is kept for tickets, and it logs the secrets of each KeyUpdate that it is fed."""
    case = Case(peer="ktls", offload="userspace")
    link = net.link(case, changing_peer=True)
    net.context("ktls", "server").offload = "userspace"
    context = net.context("ktls", "client")
    before = written(context)
    for _ in range(3):
        link.ours.refresh_traffic_keys(request_peer=True)
        link.ours.sendall(b"ping")
        assert read_exactly(link.theirs, 4) == b"ping"
        link.theirs.sendall(b"pong")
        assert read_exactly(link.ours, 4) == b"pong"
        assert is_erased(context)
    assert link.ours.key_usage.tx.generation == 3
    assert written(context) > before  # the engine did log


def test_erased_after_a_handshake_that_failed(net: Net, tmp_path: Path) -> None:
    """The peer hangs up amid the handshake: some of its secrets were logged already."""
    context = net.context("ktls", "server")
    sock, peer = net.tcp()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = net.context("stdlib", "client").wrap_bio(
        incoming, outgoing, server_hostname="localhost"
    )
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    sock.sendall(outgoing.read())
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError, match="EOF"):
        context.wrap_socket(peer, server_side=True)
    assert written(context) > 100
    assert is_erased(context)


def test_erased_from_the_users_point_of_view_only_where_he_asked(
    net: Net, tmp_path: Path, ktls_client: ktls.SSLContext
) -> None:
    """The user's own key log has everything, with the labels of RFC 9850; the memory file has nothing."""
    log = tmp_path / "keys"
    ktls_client.keylog_filename = str(log)
    link = net.link(Case(peer="ktls", offload="userspace"), context=ktls_client, changing_peer=True)
    link.ours.refresh_traffic_keys()
    link.ours.sendall(b"ping")
    assert read_exactly(link.theirs, 4) == b"ping"
    assert is_erased(ktls_client)
    labels = [line.split()[0] for line in log.read_text().splitlines() if line[:1] != "#"]
    assert sorted(labels) == sorted(set(labels))
    assert {"CLIENT_TRAFFIC_SECRET_0", "CLIENT_TRAFFIC_SECRET_1"} <= set(labels)
    assert not any(label.endswith("_N") for label in labels)


#: Shakes hands with itself, in a process that others of the same user can't look into.
_UNDUMPABLE: Final = """
import ctypes, sys
ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
from ktls.testing import loopback_pair
import ssl, threading, ktls
server = ktls.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain(sys.argv[1])
client = ktls.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
client.load_verify_locations(sys.argv[2])
with loopback_pair() as (mine, theirs):
    thread = threading.Thread(target=lambda: server.wrap_socket(theirs, server_side=True).recv())
    thread.start()
    with client.wrap_socket(mine, server_hostname="localhost") as tls:
        print(tls.offload.tx)
    thread.join()
"""


def test_goes_on_in_a_process_that_can_not_be_dumped(authority: Authority) -> None:
    """docs/security.md advises it; without the key log the engine would have to go on."""
    program = [sys.executable, "-c", _UNDUMPABLE]
    found = subprocess.run(
        [*program, str(authority.server_chain), str(authority.ca_file)],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert found.stdout == ("kernel\n" if has_kernel_tls() else "userspace\n")
