"""What floods cost: for each flood and each record layer, how many messages are taken until the connection ends, and what each of them takes of our CPU and memory.

    lab/run -- .venv/bin/python bench/floods.py                     # on a kernel with kernel TLS that can change keys
    lab/run --kernel norekey -- .venv/bin/python bench/floods.py    # on one that cannot
    .venv/bin/python bench/floods.py                                # on this machine's own

The attacker is a process of its own, which has sealed everything before it begins to send; the victim reads from a blocking socket, by a driver, as the front ends do. CPU time is that of the victim alone, in the
kernel and out of it; what tracemalloc counts is measured by another run. ``--messages`` is how many the attacker sends at most: those that go on for ever end there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.floods.attacks import ATTACKS, Attack, Attacker
from tests.floods.victims import Layers, driver_on, layers_for

from ktls.protocol.errors import KTLSError
from ktls.testing import loopback_pair

if TYPE_CHECKING:
    from ktls.protocol.states import InboundPlainMessage
    from ktls.record.driver import Driver
    from ktls.record.interface import RecordReceiver

#: As many as any front end reads at once.
_BUFFER = 256 * 1024


class Cost(NamedTuple):
    """What one flood did."""

    #: Messages that were taken, counted by the attacker or by the layer.
    messages: int
    #: CPU time of ours for each of them.
    microseconds: float
    #: Longest call that read, in seconds: for that long nothing else of this thread runs.
    longest: float
    #: Most memory of this process at a time, in bytes, without the buffer that was read into.
    peak: int
    #: Empty if the connection went on.
    error: str


def attack_by(name: str) -> Attack:
    return next(attack for attack in ATTACKS if attack.name == name)


def send(name: str, count: int, fd: int) -> None:
    """Be the attacker: seal, say so, wait for the word, send."""
    attack = attack_by(name)
    attacker = Attacker(attack.suite)
    flood = b"".join(itertools.islice(attack.messages(attacker), count))
    end = attacker.close_notify()
    print(flush=True)
    sys.stdin.readline()
    with socket.socket(fileno=fd) as sock:
        try:
            sock.sendall(flood + end)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except OSError:
            pass  # that is what the victim is expected to do


class Counting:
    """A receiver that counts the records that were not data."""

    def __init__(self, driver: Driver) -> None:
        self.count = 0
        receiver: Any = driver.receiver
        self._inner: RecordReceiver = receiver
        driver.receiving._receiver = self  # a whole receiver, by delegation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_record(self, flags: int = 0) -> InboundPlainMessage | None:
        """As the other's."""
        self.count += 1
        return self._inner.read_record(flags)


def suffer(attack: Attack, layers: Layers, messages: int, *, trace: bool) -> Cost:
    """Be the victim."""
    with loopback_pair() as (ours, theirs):
        fd = theirs.fileno()
        command = [sys.executable, __file__, "--attack", attack.name, "--fd", str(fd)]
        with subprocess.Popen(
            [*command, "--messages", str(messages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
        ) as process:
            theirs.close()
            assert process.stdin is not None
            assert process.stdout is not None
            buffer = bytearray(_BUFFER)
            driver = driver_on(ours, attack.suite, layers, attack.victim)
            counter = Counting(driver)
            process.stdout.readline()
            if trace:
                tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0] if trace else 0
            process.stdin.write(b"\n")
            process.stdin.flush()
            start, longest, error = time.process_time(), 0.0, ""
            try:
                while True:
                    called = time.process_time()
                    taken = driver.recv_into(buffer)
                    longest = max(longest, time.process_time() - called)
                    if not taken:
                        break
            except KTLSError as failure:
                longest = max(longest, time.process_time() - called)
                error = str(failure)
            seconds = time.process_time() - start
            peak = tracemalloc.get_traced_memory()[1] - before if trace else 0
            tracemalloc.stop()
            ours.close()
    counted = counter.count // max(1, attack.cost)
    taken = counted if error and counted else messages
    return Cost(taken, seconds / taken * 1e6, longest, peak, error)


def measure(attack: Attack, layers: Layers, messages: int, *, memory: bool) -> Cost:
    """Once for the time, once for the memory."""
    cost = suffer(attack, layers, messages, trace=False)
    return cost._replace(peak=suffer(attack, layers, messages, trace=True).peak) if memory else cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--only", default="", help="floods whose name begins so")
    parser.add_argument("--no-memory", action="store_true", help="measure only the time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack is not None:
        send(options.attack, options.messages, options.fd)
        return
    if not options.json:
        print(f"Linux {platform.release()}, Python {platform.python_version()}")
        print(
            "| flood, record layer | messages | µs each | longest call, ms | peak KiB | the end |"
        )
        print("| --- | ---: | ---: | ---: | ---: | --- |")
    results = {}
    for attack in ATTACKS:
        for layers in layers_for(attack.suite) if attack.name.startswith(options.only) else ():
            cost = measure(attack, layers, options.messages, memory=not options.no_memory)
            results[f"{attack}, {layers}"] = cost._asdict()
            if not options.json:
                print(_row(f"{attack}, {layers}", cost), flush=True)
    if options.json:
        print(json.dumps(results))


def _row(name: str, cost: Cost) -> str:
    figures = f"{cost.messages} | {cost.microseconds:.1f} | {cost.longest * 1e3:.0f} | {cost.peak / 1024:.0f}"
    return f"| {name} | {figures} | {cost.error or 'goes on'} |"


if __name__ == "__main__":
    main()
