"""A soak of the asyncio front end: a server under many connections whose peers do everything that peers do.

    python tests/soak/soak_asyncio.py --seconds 600 --connections 500 [--seed N] [--loop asyncio|uvloop]

Server and peers are two processes. Peers echo, upload and download (by ``sendfile`` too), change keys and ask for changes, read slowly, half close, are cancelled in the handshake and in the middle, reset,
send bad records; handlers of the server are cancelled. Checked at the end, exit status 1 if it does not hold:

- every byte is the right one at its place, and what one side wrote before it ended in order has arrived on the other;
- undisturbed connections go through all their rounds; disturbed ones never look complete to one side and broken to the other;
- with all connections open in all kinds of states and nothing to do, neither process uses the processor;
- afterwards no task, no descriptor, no transport is left, and memory has not grown in the second half;
- nobody complains: no exception out of a handler, no warning; the kernel has met no record that it could not open but those meant so.

Plans follow from the seed; what happens when two processes meet does not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.soak.workload import make_file  # noqa: E402  # run as a program, this file has only its own directory on the path
from tests.support import Authority, TlsStat, describe_kernel  # noqa: E402  # likewise

#: The part of the time that a process may use the processor when there is nothing to do. A loop that spins would use all, or half of it.
IDLE: Final = 0.1
MOST_SHOWN: Final = 30
#: What the server says of the records of vandals, who may already be gone; which record it was, only user space knows.
BAD_RECORD: Final = re.compile(
    "RemoteProtocolError: (a record|record [0-9]+) can't be opened with the current key"
)
COUNTERS: Final = (
    *("TlsTxSw", "TlsRxSw", "TlsTxRekeyOk", "TlsRxRekeyOk", "TlsRxRekeyReceived"),
    *("TlsTxRekeyError", "TlsRxRekeyError", "TlsDecryptError"),
)


class Party:
    """One of the two processes: told by lines, it answers by JSON objects."""

    def __init__(self, module: str, **options: Any) -> None:
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *(sys.executable, "-X", "faulthandler", "-m", module, json.dumps(options)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            bufsize=1,
        )
        self.sizes: list[int] = []

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"FAIL: a process has died, status {self._process.wait()}")
        facts: dict[str, Any] = json.loads(line)
        return facts

    def processor_time(self) -> float:
        """Seconds so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def look(self) -> None:
        """Note how much memory it has, in KiB."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                self.sizes.append(int(line.split()[1]))

    def end(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def judge(client: dict[str, Any], server: dict[str, Any] | None) -> str | None:
    """Compare the accounts of a connection; return what is wrong."""
    if client["error"] and client["error"].startswith("hangs"):
        return "hangs"
    if server is None:
        return None if client["disturbed"] or not client["rounds"] else "the server knows nothing"
    for side in (client, server):
        if (side["error"] or "").startswith("Mismatch"):
            return "wrong bytes"
    for sender, receiver in ((client, server), (server, client)):
        if receiver["end"] == "clean":
            if not sender["goodbye"]:
                return "an end in order that nobody has sent"
            if sender["written"] != receiver["received"]:
                return "bytes lost behind an end in order"
    if not client["disturbed"]:
        if client["error"] or server["error"]:
            return "an error"
        if client["rounds"] != server["rounds"]:
            return "rounds differ"
        if not (client["closed"] and server["closed"]):
            return "not closed in order"
        counted = client["written"], client["received"]
        if counted != (server["received"], server["written"]):
            return "bytes differ"
    elif (
        client["error"] is None
        and server["error"] not in (None, "cancelled")
        and not BAD_RECORD.fullmatch(server["error"])
    ):
        return "complete on one side only"
    return None


def compare(peers: dict[str, Any], server: dict[str, Any]) -> list[str]:
    """Compare what both sides know; return what is wrong."""
    wrong = [f"server: {complaint}" for complaint in server["complaints"]]
    wrong += [f"peers: {complaint}" for complaint in peers["complaints"]]
    wrong += [f"left in the server: {leak}" for leak in server["leaks"]]
    wrong += [f"left in the peers: {leak}" for leak in peers["leaks"]]
    unknown = set(server["accounts"]) - set(peers["accounts"])
    wrong += [f"{key} is known to the server only" for key in unknown]
    for key, account in peers["accounts"].items():
        theirs = server["accounts"].get(key)
        if (verdict := judge(account, theirs)) is not None:
            wrong.append(f"{verdict}: {account} {theirs}")
    return wrong


def check_memory(name: str, sizes: list[int], connections: int) -> list[str]:
    """A bound; and for the server, memory of the fourth quarter beside that of the second. (The peers keep accounts.)"""
    if max(sizes) > 150_000 + 1_000 * connections:
        return [f"{name} had {max(sizes)} KiB"]
    quarter = len(sizes) // 4
    if name != "server" or quarter < 15:
        return []
    early, late = max(sizes[quarter : 2 * quarter]), max(sizes[-quarter:])
    return [f"{name} has grown from {early} to {late} KiB"] if late > 1.25 * early + 16_000 else []


def measure(parties: dict[str, Party], seconds: float) -> dict[str, float]:
    """Return the processor time that each uses."""
    before = {name: party.processor_time() for name, party in parties.items()}
    time.sleep(seconds)
    return {name: party.processor_time() - before[name] for name, party in parties.items()}


def await_rest(parties: dict[str, Party]) -> None:
    """Let what is still under way come to its end: wait for a second in which hardly anything happens. A loop that spins never comes to one."""
    for _ in range(60):
        if max(measure(parties, 1.0).values()) <= IDLE / 2:
            return


def soak(options: argparse.Namespace, directory: Path) -> list[str]:
    """Run it; return what is wrong."""
    authority = Authority(directory)
    file = directory / "pattern"
    make_file(file)
    stat = TlsStat()
    factory = "new_uvloop_event_loop" if options.loop == "uvloop" else "new_event_loop"
    server = Party(
        "tests.soak.server",
        loop=factory,
        chain=str(authority.server_chain),
        file=str(file),
        seed=options.seed,
        patience=options.patience,
    )
    parties = {"server": server}
    try:
        parties["peers"] = Party(
            "tests.soak.peers",
            loop=options.loop,
            authority=str(authority.ca_file),
            file=str(file),
            seed=options.seed,
            ports=server.hear()["ports"],
            seconds=options.seconds,
            connections=options.connections,
            patience=options.patience,
        )
        return run(parties, options, stat)
    finally:
        for party in parties.values():
            party.kill()


def run(parties: dict[str, Party], options: argparse.Namespace, stat: TlsStat) -> list[str]:
    server, peers = parties["server"], parties["peers"]
    began = time.monotonic()
    while time.monotonic() - began < options.seconds:
        time.sleep(min(1.0, options.seconds))
        for party in parties.values():
            party.look()
    parked = peers.hear()
    print(f"{parked['parked']} connections parked after {time.monotonic() - began:.0f} s")
    wrong = []
    await_rest(parties)
    used = measure(parties, options.tail)
    server.tell("count")
    print(f"connections open: {server.hear()['connections']}; processor time, idle: {used}")
    limit = IDLE * options.tail
    wrong += [f"{name} is not idle: {spent} s" for name, spent in used.items() if spent > limit]
    peers.tell("go")
    theirs = peers.hear()
    await_rest({"server": server})
    spent = measure({"server": server}, options.tail)["server"]
    if spent > limit:
        wrong.append(f"server without connections is not idle: {spent} s")
    server.tell("end")
    ours = server.hear()
    for name, party in parties.items():
        if (status := party.end()) != 0:
            wrong.append(f"{name} ended with status {status}")
        wrong += check_memory(name, party.sizes, options.connections)
        third = max(1, len(party.sizes) // 3)
        peaks = [
            max(party.sizes[at : at + third])
            for at in range(0, third * 3, third)
            if party.sizes[at:]
        ]
        print(f"memory of {name}, KiB, highest of each third: {peaks}")
    report(theirs, ours, stat)
    wrong += compare(theirs, ours) + check_kernel(theirs, stat)
    return wrong


def report(peers: dict[str, Any], server: dict[str, Any], stat: TlsStat) -> None:
    accounts = peers["accounts"].values()
    moved = sum(account["written"] + account["received"] for account in accounts)
    print(f"{len(accounts)} connections, at most {server['most']} at once; {moved / 1e6:.0f} MB")
    print(f"slowest round: {peers['slowest']:.1f} s; {peers['counts']}")
    print({name: stat[name] for name in COUNTERS})


def check_kernel(peers: dict[str, Any], stat: TlsStat) -> list[str]:
    """The kernel's counters: no errors but those that we made, nothing left."""
    wrong = []
    # Each is met again when what is unread is dropped at the end.
    bad = 4 * peers["counts"].get("bad records", 0)
    for name, most in (("TlsDecryptError", bad), ("TlsTxRekeyError", 0), ("TlsRxRekeyError", 0)):
        if stat[name] > most:
            wrong.append(f"{name} is {stat[name]}, of which {most} were meant")
    left = [name for name in ("TlsCurrTxSw", "TlsCurrRxSw") if stat[name]]
    return wrong + [f"{name} is {stat[name]} at the end" for name in left]


def main() -> int:
    parser = argparse.ArgumentParser(description="Soak the asyncio front end.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--patience", type=float, default=240, help="seconds that a round may take")
    parser.add_argument("--tail", type=float, default=3, help="seconds of idleness, twice")
    options = parser.parse_args()
    print(f"{describe_kernel()}; {vars(options)}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        wrong = soak(options, Path(directory))
    for fault in wrong[:MOST_SHOWN]:
        print("FAULT", fault)
    print(f"FAIL: {len(wrong)} faults" if wrong else "OK")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
