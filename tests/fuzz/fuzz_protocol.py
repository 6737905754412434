"""A fuzzer for ``ktls.protocol`` and ``ktls.record.aead``: only documented errors may escape, and the invariants hold.

    python tests/fuzz/fuzz_protocol.py --seconds 600 [--seed N]
    python tests/fuzz/fuzz_protocol.py --reproduce HEX

An input is a list of operations on one connection: records of all types (handshake messages whole, split, joined and mutated; alerts;
data), sealed records that are touched on their way, and the calls of a driver in between. Inputs are made from a grammar and by
mutation of inputs kept; kept are those that reach a new pair of lines (every few executions are traced). On a failure the operations
are made fewer as long as it stays, printed as hexadecimal, and the exit status is 1.

Needs nothing but the package. The same seed and the same number of executions give the same run.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.fuzz.protocol_inputs import Generator, Input, decode, encode  # noqa: E402  # run as a program, this file has only its own directory on the path
from tests.fuzz.protocol_target import execute  # noqa: E402  # likewise
from tests.fuzz.tracing import TRACE_ONE_IN, Coverage  # noqa: E402  # likewise


def fails(operations: Input) -> bool:
    try:
        execute(operations)
    except Exception:
        return True
    return False


def minimise(operations: Input) -> Input:
    """Leave out operations as long as the failure stays."""
    size = len(operations) // 2
    while size:
        start = 1
        while start < len(operations):
            shorter = operations[:start] + operations[start + size :]
            if fails(shorter):
                operations = shorter
            else:
                start += size
        size //= 2
    return operations


def report(operations: Input) -> None:
    print("FAILED; the shortest input found:")
    print(encode(minimise(operations)).hex())
    traceback.print_exc(file=sys.stdout)


def fuzz(seconds: float, seed: int) -> int:
    rng = random.Random(seed)
    generator, coverage = Generator(rng), Coverage()
    corpus: list[Input] = [generator.fresh()]
    executions = operations_run = 0
    start = last = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        if now - last >= 30:
            last = now
            rate = executions / (now - start)
            print(
                f"{now - start:6.0f} s  {executions} executions  {rate:.0f}/s  "
                f"corpus {len(corpus)}  line pairs {len(coverage.seen)}",
                flush=True,
            )
        if rng.random() < 0.4:
            candidate = generator.fresh()
        else:
            candidate = generator.child(rng.choice(corpus), rng.choice(corpus))
        try:
            if executions % TRACE_ONE_IN == 0:
                if coverage.trace(functools.partial(execute, candidate)):
                    corpus.append(candidate)
            else:
                execute(candidate)
        except Exception:
            report(candidate)
            return 1
        executions += 1
        operations_run += len(candidate)
    elapsed = time.monotonic() - start
    print(
        f"OK: {executions} executions ({operations_run} operations) in {elapsed:.0f} s, "
        f"{executions / elapsed:.0f} executions/s, seed {seed}, corpus {len(corpus)}, "
        f"line pairs {len(coverage.seen)}"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz ktls.protocol and ktls.record.aead.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reproduce", metavar="HEX", help="run one input that failed")
    arguments = parser.parse_args()
    if arguments.reproduce is None:
        return fuzz(arguments.seconds, arguments.seed)
    execute(decode(bytes.fromhex(arguments.reproduce)))
    print("OK: this input does not fail")
    return 0


if __name__ == "__main__":
    sys.exit(main())
