"""Run by ``test_openssl`` with a configuration of OpenSSL that allows one more suite: both roles, with updates, and say the suite."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from .parties import TLS13, KernelCounters, Pki, can_rekey
from .peers import Peers, Role

ROLES: tuple[Role, ...] = ("client", "server")


def main(suite: str, size: int) -> None:
    counters = KernelCounters()
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        peers = Peers(Pki(Path(directory)), counters, stack)
        for role in ROLES:
            link = peers.openssl(role, TLS13, suite)
            link.exchange(size)
            if can_rekey():
                link.tls.refresh_traffic_keys(request_peer=True)
                link.take_turns(size)
                link.exchange(size)
                usage = link.tls.key_usage
                assert (usage.tx.generation, usage.rx.generation) == (1, 1)
            cipher = link.tls.cipher()
            print(cipher[0] if cipher is not None else None)
    counters.check()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
