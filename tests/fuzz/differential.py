"""The same bytes and the same calls over the kernel's record layer and over ours: the same has to come of it, but for what ``differences`` lists.

    python tests/fuzz/differential.py --seconds 600 [--seed N]          # inside the lab: see lab/fuzz
    python tests/fuzz/differential.py --reproduce HEX

Each input is a connection (``scenario``): records of all kinds, whole and damaged, in all suites and both versions, cut anywhere, with a FIN or a reset at the end, and calls of our
application in between. Three layers run it: kernel, user space, and user space that moves into the kernel. On a kernel without rekey nobody changes keys.
A finding is made as short as it stays one, printed with what each layer made of it, and as hexadecimal; the exit status is then 1. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.fuzz.differences import check, compare  # noqa: E402  # run as a program, this file has only its own directory on the path
from tests.fuzz.observing import LAYERS, Layer, Observation, observe  # noqa: E402  # likewise
from tests.fuzz.scenario import Scenario  # noqa: E402  # likewise
from tests.support import describe_kernel, kernel_kind  # noqa: E402  # likewise

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("CORPUS", "Judge", "inputs")

CORPUS: Final = Path(__file__).with_name("corpus") / "differential"
_SIZES: Final = (10, 20, 40, 80, 160)
_MOST_SHOWN: Final = 5


class Judge:
    """Runs inputs over all layers that this machine has."""

    def __init__(self) -> None:
        kind = kernel_kind()
        self.layers: tuple[Layer, ...] = LAYERS if kind in ("rekey", "norekey") else ("userspace",)
        self._key_updates = kind != "norekey"
        self.executions = 0
        #: What each layer made of the last input.
        self.account = ""
        #: How often each known difference was met, "" for none.
        self.known: collections.Counter[str] = collections.Counter()
        self.ends: collections.Counter[str] = collections.Counter()

    def scenario(self, data: bytes) -> Scenario:
        """Return what ``data`` means on this machine."""
        return Scenario.from_bytes(data, key_updates=self._key_updates)

    def findings(self, data: bytes) -> list[str]:
        """Run one input; return what is wrong."""
        scenario = self.scenario(data)
        try:
            seen = {layer: observe(scenario, layer) for layer in self.layers}
        except Exception as error:
            self.account = f"{scenario}\n{traceback.format_exc()}"
            return [f"{type(error).__name__}: {error}"]
        self.account = "\n".join(
            [str(scenario), *(f"{layer}: {observation}" for layer, observation in seen.items())]
        )
        self.executions += len(seen)
        return [*self._judge(scenario, seen)]

    def _judge(self, scenario: Scenario, seen: dict[Layer, Observation]) -> Iterator[str]:
        self.ends[seen["userspace"].end] += 1
        for layer, observation in seen.items():
            for wrong in check(scenario, observation):
                yield f"{layer}: {wrong}"
            if layer != "userspace":
                name, wrong = compare(scenario, observation, seen["userspace"])
                self.known[name] += 1
                if wrong:
                    yield f"{layer}: {wrong}"

    def minimise(self, data: bytes) -> bytes:
        """Leave out bytes, and make others zero, as long as anything is found at all."""
        size = len(data) // 2
        while size:
            start = 0
            while start < len(data):
                shorter = data[:start] + data[start + size :]
                if self.findings(shorter):
                    data = shorter
                else:
                    start += size
            size //= 2
        for place in range(len(data)):
            plainer = data[:place] + b"\0" + data[place + 1 :]
            if plainer != data and self.findings(plainer):
                data = plainer
        return data


def inputs(seed: int) -> Iterator[bytes]:
    """Give inputs for ever: made anew, and made out of those in the corpus."""
    rng = random.Random(seed)
    corpus = [path.read_bytes() for path in sorted(CORPUS.glob("*"))]
    while True:
        if corpus and rng.random() < 0.2:
            mutable = bytearray(rng.choice(corpus))
            for _ in range(rng.choice((1, 1, 2, 4))):
                place = rng.randrange(len(mutable) + 1)
                mutable[place : place + rng.choice((0, 1, 1))] = rng.randbytes(
                    rng.choice((0, 1, 1, 8))
                )
            yield bytes(mutable)
        else:
            yield rng.randbytes(rng.choice(_SIZES))


def fuzz(seconds: float, seed: int) -> int:
    """Run for so long; return the exit status."""
    judge, found = Judge(), 0
    print(f"{describe_kernel()}; layers {', '.join(judge.layers)}; seed {seed}", flush=True)
    start = time.monotonic()
    count, step = 0, 60.0
    for count, data in enumerate(inputs(seed)):  # also wanted behind the loop
        elapsed = time.monotonic() - start
        if elapsed >= seconds or found >= _MOST_SHOWN:
            break
        if elapsed >= step:
            step += 60
            print(f"{elapsed:6.0f} s  {count} scenarios, {judge.executions} runs", flush=True)
        if wrong := judge.findings(data):
            found += 1
            print(f"FOUND {wrong}\n{data.hex()}\n{judge.account}")
            shortest = judge.minimise(data)
            again = judge.findings(shortest) or "nothing this time"
            print(
                f"The shortest input found: {again}\n{shortest.hex()}\n{judge.account}\n",
                flush=True,
            )
    elapsed = time.monotonic() - start
    print(f"ends: {dict(judge.ends.most_common())}")
    print(
        f"known differences: { {name or 'none': many for name, many in judge.known.most_common()} }"
    )
    print(
        f"{'FAILED' if found else 'OK'}: {count} scenarios, {judge.executions} runs in {elapsed:.0f} s, seed {seed}, {found} findings"
    )
    return 1 if found else 0


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Compare the record layers.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--reproduce", metavar="HEX", help="run one input, and say what comes of it"
    )
    arguments = parser.parse_args()
    if arguments.reproduce is None:
        return fuzz(arguments.seconds, arguments.seed)
    judge, data = Judge(), bytes.fromhex(arguments.reproduce)
    findings = judge.findings(data)
    print(judge.account)
    print("\n".join(findings) or "OK: this input does not fail")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
