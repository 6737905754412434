"""Where CPython's own tests are, and which of them are about TLS in asyncio."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import unittest
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

_SCRIPT: Final = Path(__file__).parents[2] / "lab" / "python-tests"
_PACKAGE: Final = "test.test_asyncio"


@final
@dataclass(frozen=True)
class Selection:
    """Some tests of a module of CPython, and the loops that they can be run on."""

    module: str
    #: Searched in the test's id.
    pattern: str
    loops: tuple[str, ...]

    def __contains__(self, test_id: str) -> bool:
        return test_id.startswith(f"{self.module}.") and bool(re.search(self.pattern, test_id))


#: uvloop takes no selector, and its sendfile is another, so test_sendfile and test_events can't be run on it.
SELECTIONS: Final = (
    Selection("test_ssl", "", ("asyncio", "uvloop")),
    Selection("test_sslproto", "StartTLSTests", ("asyncio", "uvloop")),
    Selection("test_sslproto", "HandshakeTests", ("asyncio",)),
    Selection("test_sendfile", "", ("asyncio",)),
    Selection("test_streams", "_ssl|_tls", ("asyncio", "uvloop")),
    Selection("test_events", r"EventLoopTests\..*ssl", ("asyncio",)),
)


def import_tests(name: str) -> ModuleType:
    """Import a module of CPython's test package by its name there. Raises ``RuntimeError`` where there is no such package to be had."""
    if not _can_import(_PACKAGE):
        _get_package()
    return importlib.import_module(f"test.{name}")


def _can_import(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _get_package() -> None:
    """Have Debian's copy of the package imported: Debian and others leave it out of the interpreter."""
    answer = subprocess.run(
        [_SCRIPT, sys.executable], stdout=subprocess.PIPE, text=True, check=False
    )
    if answer.returncode:
        raise RuntimeError(
            f"this Python has no {_PACKAGE}, and lab/python-tests could not get it (see above)"
        )
    # First, and without what may have been imported of an incomplete one: one package, one version.
    sys.path.insert(0, answer.stdout.strip())
    for name in [name for name in sys.modules if name == "test" or name.startswith("test.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def cases(selection: Selection) -> Iterator[tuple[str, unittest.TestCase]]:
    """The tests of a selection: their ids (``test_ssl.TestSSL.test_shutdown_cleanly``), and themselves, ready to run once."""
    module = import_tests(f"test_asyncio.{selection.module}")
    for case in _flatten(unittest.defaultTestLoader.loadTestsFromModule(module)):
        test_id = case.id().removeprefix(f"{_PACKAGE}.")
        if test_id in selection:
            yield test_id, case


def _flatten(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _flatten(test)
        else:
            yield test
