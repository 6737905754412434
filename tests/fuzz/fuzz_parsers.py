"""A fuzzer for everything that takes bytes of a stranger (``harnesses``): guided by coverage, from the corpus, with nothing installed.

    python tests/fuzz/fuzz_parsers.py --seconds 600 [--seed N] [--harness NAME]
    python tests/fuzz/fuzz_parsers.py --harness NAME --reproduce FILE
    python tests/fuzz/fuzz_parsers.py --harness NAME --atheris [libFuzzer's options]

Without a name all harnesses take turns. New inputs are mutations of those kept; kept are those that reach a new pair of lines. A finding is made as short as it
stays one, and written to build/fuzz: put it into the corpus under a name that says what it was. The exit status is then 1.
For hours by hand there is ``atheris`` as well (from PyPI; nothing else here needs it): libFuzzer's engine, on one harness at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import inspect
import random
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.fuzz.harnesses import HARNESSES, Harness  # noqa: E402  # run as a program, this file has only its own directory on the path
from tests.fuzz.tracing import TRACE_ONE_IN, Coverage  # noqa: E402  # likewise

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

__all__ = ("CORPUS", "corpus_of", "mutate")

CORPUS: Final = Path(__file__).with_name("corpus")
FINDINGS: Final = ROOT / "build" / "fuzz"
MOST: Final = 4096
#: Executions of one harness before the next takes its turn.
TURN: Final = 64
_ODD: Final = (0, 1, 2, 0x7F, 0x80, 0xFF)


def corpus_of(name: str) -> list[Path]:
    """Return the files of a harness's corpus."""
    return sorted((CORPUS / name).glob("*"))


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Return ``data`` changed in one place or in a few; ``other`` may lend a part of itself."""
    mutable = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        place = rng.randrange(len(mutable) + 1)
        length = rng.choice((1, 1, 2, 4, 16))
        match rng.randrange(7):
            case 0 if place < len(mutable):
                mutable[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(mutable):
                mutable[place] = rng.choice(_ODD)
            case 2:
                del mutable[place : place + length]
            case 3:
                mutable[place:place] = mutable[place : place + length]
            case 4 if other:
                start = rng.randrange(len(other))
                mutable[place : place + rng.choice((0, length))] = other[start : start + 4 * length]
            case 5 if place < len(mutable):
                mutable[place] = (mutable[place] + rng.choice((1, 255))) % 256
            case _:
                mutable[place:place] = rng.randbytes(length)
    return bytes(mutable[:MOST])


class Session:
    """One harness at work."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self._harness = HARNESSES[name]
        self._rng = rng
        self.kept = [b"", *(path.read_bytes() for path in corpus_of(name))]
        self.coverage = Coverage()
        self.executions = 0
        for data in self.kept:
            self.coverage.trace(functools.partial(self._harness, data))

    def turn(self) -> bytes | None:
        """Run some inputs; return one that fails, or None."""
        rng = self._rng
        for _ in range(TURN):
            data = mutate(rng, rng.choice(self.kept), rng.choice(self.kept))
            attempt = functools.partial(self._harness, data)
            try:
                if self.executions % TRACE_ONE_IN:
                    attempt()
                elif self.coverage.trace(attempt):
                    self.kept.append(data)
            except Exception:
                return data
            self.executions += 1
        return None


def fails(harness: Harness, data: bytes) -> bool:
    """Whether an invariant does not hold."""
    try:
        harness(data)
    except Exception:
        return True
    return False


def minimise(harness: Harness, data: bytes) -> bytes:
    """Leave out bytes as long as it fails."""
    size = len(data) // 2
    while size:
        start = 0
        while start < len(data):
            shorter = data[:start] + data[start + size :]
            if fails(harness, shorter):
                data = shorter
            else:
                start += size
        size //= 2
    return data


def report(session: Session, data: bytes) -> None:
    """Print and keep a finding."""
    harness = HARNESSES[session.name]
    data = minimise(harness, data)
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path = FINDINGS / f"{session.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    with contextlib.suppress(OSError):  # inside the lab this directory may not be kept
        path.write_bytes(data)
    print(f"FAILED: {session.name}, {len(data)} bytes, {path}\n{data.hex()}")
    try:
        harness(data)
    except Exception:
        traceback.print_exc(file=sys.stdout)


def fuzz(names: list[str], seconds: float, seed: int) -> int:
    """Let the harnesses take turns for so long; return the exit status."""
    sessions = [Session(name, random.Random(f"{seed} {name}")) for name in names]
    start = time.monotonic()
    status = 0
    working = list(sessions)
    while working and time.monotonic() - start < seconds:
        for session in list(working):
            if (data := session.turn()) is not None:
                report(session, data)
                working.remove(session)
                status = 1
    for session in sessions:
        print(
            f"{session.name:9} {session.executions} executions, corpus {len(session.kept)},"
            f" line pairs {len(session.coverage.seen)}"
        )
    total = sum(session.executions for session in sessions)
    elapsed = time.monotonic() - start
    print(f"{'FAILED' if status else 'OK'}: {total} executions in {elapsed:.0f} s, seed {seed}")
    return status


def package_functions() -> Iterator[types.FunctionType]:
    """Give every function and method of the package that is loaded."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ktls."):
            for owner in (module, *filter(inspect.isclass, vars(module).values())):
                if getattr(owner, "__module__", name) == name:
                    yield from filter(inspect.isfunction, vars(owner).values())


def with_atheris(name: str, options: list[str]) -> None:
    """Hand a harness over to atheris; does not return. What it keeps goes to build/fuzz, not into the corpus."""
    atheris = importlib.import_module("atheris")
    for function in package_functions():
        atheris.instrument_func(function)
    kept = FINDINGS / f"atheris-{name}"
    kept.mkdir(parents=True, exist_ok=True)
    places = [str(kept), str(CORPUS / name), f"-artifact_prefix={FINDINGS}/{name}-"]
    atheris.Setup([sys.argv[0], *places, *options], HARNESSES[name])
    atheris.Fuzz()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Fuzz the parsers.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--harness", choices=sorted(HARNESSES), help="only this one")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="run one input")
    parser.add_argument("--atheris", nargs=argparse.REMAINDER, metavar="OPTION")
    arguments = parser.parse_args()
    if arguments.harness is None and (arguments.atheris is not None or arguments.reproduce):
        parser.error("--harness says whose input it is")
    if arguments.atheris is not None:
        with_atheris(arguments.harness, arguments.atheris)
    if arguments.reproduce is not None:
        HARNESSES[arguments.harness](arguments.reproduce.read_bytes())
        print("OK: this input does not fail")
        return 0
    names = [arguments.harness] if arguments.harness else sorted(HARNESSES)
    return fuzz(names, arguments.seconds, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
