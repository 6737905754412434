"""The long run: one process with kernel TLS under hundreds of peers of all kinds that do all kinds of things, at a limit of 200 records a key.

    python tests/soak/long_run.py --seconds 1800 --connections 200 [--seed N]

Peers are the ``ssl`` module, ``ktls`` in user space, openssl, gnutls, curl, and scripted ones that break the rules (``misdeeds``), as clients and as servers. Checked at the
end, exit status 1 if it does not hold:

- every connection has come to what its peer's behaviour has to lead to, and nothing else;
- bytes in are bytes out, by SHA-256: all of them where both sides closed in order, those before the misdeed where not;
- ``TlsDecryptError`` is exactly the number of records that were made to be refused; no rekey has failed; keys were changed at their limit;
- memory, threads and descriptors have not grown, no task and no connection is left, nobody complained.

Plans follow from the seed; how they meet does not.
"""

from __future__ import annotations

import argparse
import hashlib
import queue
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.peers.parties import payload  # noqa: E402  # run as a program, this file has only its own directory on the path
from tests.soak.attackers import text_of  # noqa: E402  # likewise
from tests.soak.misdeeds import CLEAN, REFUSED  # noqa: E402  # likewise
from tests.soak.soak_asyncio import COUNTERS, MOST_SHOWN, Party  # noqa: E402  # likewise
from tests.soak.victim import NAME  # noqa: E402  # likewise
from tests.support import Authority, TlsStat, describe_kernel, has_kernel_tls  # noqa: E402  # likewise

FILE_SIZE: Final = 3_000_000


class Judge:
    """Brings together what both sides say of a connection, and keeps what does not fit."""

    def __init__(self, file: bytes) -> None:
        self.faults: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.bytes = self.bad = 0
        self.generations = 0
        self._file_size = len(file)
        self._plans: dict[str, dict[str, Any]] = {}
        self._accounts: dict[str, dict[str, Any]] = {}

    def hear_plan(self, plan: dict[str, Any]) -> None:
        self._plans[plan["name"]] = plan
        self._bring_together(plan["name"])

    def hear_account(self, account: dict[str, Any]) -> None:
        name = account["name"]
        if len(name) < NAME:
            self.faults.append(f"a connection without a name: {account}")
        self._accounts[name] = account
        self._bring_together(name)

    def _bring_together(self, name: str) -> None:
        if name in self._plans and name in self._accounts:
            plan, account = self._plans.pop(name), self._accounts.pop(name)
            if (fault := self._judge(plan, account)) is not None:
                self.faults.append(f"{fault}: {plan} {account}")

    def finish(self) -> None:
        """Whatever has no other side."""
        self.faults += [f"only the peer knows it: {plan}" for plan in self._plans.values()]
        self.faults += [f"only we know it: {account}" for account in self._accounts.values()]

    def _judge(self, plan: dict[str, Any], account: dict[str, Any]) -> str | None:
        self.kinds[plan["kind"]] += 1
        self.bytes += account["received"] + account["sent"]
        self.bad += plan["bad"]
        self.generations += sum(account["generations"])
        if plan["error"]:
            return "the peer is not content"
        if not re.match(plan["expected"], account["end"]):
            return f"not the end that was expected ({plan['expected']})"
        if account["role"] == "files":
            return None if account["sent"] == self._file_size else "the file was not sent"
        text = text_of(plan["name"], plan["length"], plan["seed"])
        received = text[: account["received"]]
        if hashlib.sha256(received).hexdigest() != account["digest"]:
            return "wrong bytes"
        if plan["expected"] in (CLEAN, REFUSED) and account["received"] != plan["size"]:
            return "bytes lost"
        if plan["expected"] == CLEAN and account["sent"] != plan["received"]:
            return "bytes lost on the way back"
        return None


class Ear(threading.Thread):
    """Reads what a process says."""

    def __init__(self, party: Party) -> None:
        super().__init__(daemon=True)
        self.facts: queue.Queue[dict[str, Any]] = queue.Queue()
        self._party = party
        self.start()

    def run(self) -> None:
        while True:
            try:
                self.facts.put(self._party.hear())
            except (SystemExit, OSError, ValueError):
                self.facts.put({"gone": True})
                return


class Run:
    """Both processes, and what they say."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        authority = Authority(directory)
        file = directory / "file"
        content = payload(FILE_SIZE, 1)
        file.write_bytes(content)
        common = {"chain": str(authority.server_chain), "authority": str(authority.ca_file)}
        self.judge = Judge(content)
        self.options = options
        self.stat = TlsStat()
        self.faults: list[str] = []
        self.victim = Party("tests.soak.victim", file=str(file), patience=300, **common)
        ports = self.victim.hear()["ports"]
        self._victim_says = Ear(self.victim)
        self.attackers = Party(
            "tests.soak.attackers",
            **common,
            file=str(file),
            ports=ports,
            seconds=options.seconds,
            connections=options.connections,
            seed=options.seed,
        )
        self._attackers_say = Ear(self.attackers)

    def stop(self) -> None:
        self.victim.kill()
        self.attackers.kill()

    def go(self) -> list[str]:
        """Return all faults."""
        began = last = time.monotonic()
        while not self._listen():
            time.sleep(0.2)
            if time.monotonic() - last >= 1:
                last = time.monotonic()
                self.victim.look()
            if time.monotonic() - began > self.options.seconds + 400:
                self.faults.append("the peers come to no end")
                break
        self.victim.tell("end")
        self._last_words()
        self.judge.finish()
        self._check_memory()
        self._check_kernel()
        return self.faults + self.judge.faults

    def _listen(self) -> bool:
        """Take in what was said; return whether the peers are done."""
        self._take_accounts()
        while True:
            try:
                facts = self._attackers_say.facts.get_nowait()
            except queue.Empty:
                return False
            if "name" in facts:
                self.judge.hear_plan(facts)
            else:
                if "gone" in facts:
                    self.faults.append("the process of the peers has died")
                return True

    def _take_accounts(self) -> None:
        while True:
            try:
                self._take(self._victim_says.facts.get_nowait())
            except queue.Empty:
                return

    def _take(self, facts: dict[str, Any]) -> None:
        if "name" in facts:
            self.judge.hear_account(facts)
        elif "complaint" in facts:
            self.faults.append(f"complaint: {facts['complaint']}")
        elif "gone" in facts:
            self.faults.append("the process with kernel TLS has died")

    def _last_words(self) -> None:
        while True:
            try:
                facts = self._victim_says.facts.get(timeout=120)
            except queue.Empty:
                self.faults.append("the process with kernel TLS comes to no end")
                return
            if "leaks" in facts:
                self.faults += [f"left: {leak}" for leak in facts["leaks"]]
                return
            self._take(facts)
            if "gone" in facts:
                return

    def _check_memory(self) -> None:
        sizes = self.victim.sizes
        quarter = len(sizes) // 4
        if quarter < 10:
            return
        highest = [max(sizes[at * quarter : (at + 1) * quarter]) for at in range(4)]
        print(f"memory of the process with kernel TLS, KiB, highest of each quarter: {highest}")
        if highest[3] > 1.1 * highest[1] + 4_000:
            self.faults.append(f"memory has grown: {highest}")

    def _check_kernel(self) -> None:
        counts = {name: self.stat[name] for name in COUNTERS}
        judge = self.judge
        print(
            f"{sum(judge.kinds.values())} connections, {judge.bytes / 1e6:.0f} MB, {judge.generations} changes of keys"
        )
        for kind, count in sorted(judge.kinds.items()):
            print(f"  {count:6} {kind}")
        print(f"records to be refused: {judge.bad}; {counts}")
        if not has_kernel_tls():
            return
        wanted = {"TlsDecryptError": judge.bad, "TlsTxRekeyError": 0, "TlsRxRekeyError": 0}
        for name, count in wanted.items():
            if counts[name] != count:
                self.faults.append(f"{name} is {counts[name]}, not {count}")
        self.faults += [f"{n} is left" for n in ("TlsCurrTxSw", "TlsCurrRxSw") if self.stat[n]]


def main() -> int:
    parser = argparse.ArgumentParser(description="The long run.")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{describe_kernel()}; {vars(options)}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        run = Run(options, Path(directory))
        try:
            faults = run.go()
        finally:
            run.stop()
    for fault in faults[:MOST_SHOWN]:
        print("FAULT", fault)
    print(f"FAIL: {len(faults)} faults" if faults else "OK")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
