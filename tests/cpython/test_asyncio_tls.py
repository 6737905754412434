"""CPython's own tests of TLS in asyncio, run against our event loops.

The tests are those of the interpreter, unchanged and not copied; each is an item here. Where a test makes a loop (``asyncio.new_event_loop()``,
``asyncio.SelectorEventLoop(selector)``) it gets one of ours, so that its ``ssl=`` means kernel TLS: in the kernel in the lab, in user space elsewhere. What else
is changed from outside is in ``_adapt``.

A test counts only if it met our code: it has to have begun handshakes of ours, and to have completed them, unless ``exceptions`` says why it does not. On a kernel with kernel TLS all that were completed have
to be sending through it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import unittest
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, final

import pytest

import ktls.aio
from ktls.aio.handshake import Handshake
from ktls.aio.loops import KTLSEventLoop
from ktls.aio.transport import KTLSTransport
from ktls.settings import DEFAULTS

from ..support import has_kernel_tls
from .exceptions import EXCEPTIONS, NO_HANDSHAKE, WITHOUT_US, WITHOUT_US_NEWER
from .finding import SELECTIONS, cases, import_tests

if TYPE_CHECKING:
    from ktls.handshake.handoff import Offload

    from ..support import TlsStat

    LoopFactory = Callable[..., asyncio.AbstractEventLoop]

#: Each with the Python that it was written for; others have some more tests, or less.
_LISTS: Final = {
    "EXCEPTIONS": (EXCEPTIONS, (3, 11)),
    "WITHOUT_US": (WITHOUT_US, (3, 11)),
    "WITHOUT_US_NEWER": (WITHOUT_US_NEWER, (3, 15)),
    "NO_HANDSHAKE": (NO_HANDSHAKE, (3, 11)),
}

#: Seconds that a test may take; the slowest takes 5 in the lab.
_TIME_LIMIT: Final = 20

_TESTS: Final = {
    f"{loop}-{test_id}": (loop, test_id, case)
    for selection in SELECTIONS
    for loop in selection.loops
    for test_id, case in cases(selection)
}

support: Final[Any] = import_tests("support")


@final
class Witness:
    """Sees which handshakes of ours begin, and how they end. (``Settings.observer`` of all contexts that are not ours.)"""

    def __init__(self) -> None:
        self.begun = 0
        self.completed: list[Offload] = []

    def handshake_completed(
        self, version: str, cipher: str, session_reused: bool, offload: Offload
    ) -> None:
        self.completed.append(offload)

    def handshake_failed(self, error: BaseException) -> None: ...

    def key_changed(self, direction: object, cause: object) -> None: ...

    def connection_ended(self, offload: Offload, error: BaseException | None) -> None: ...


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    witness = Witness()
    start = Handshake.start

    def count_and_start(handshake: Handshake) -> None:
        witness.begun += 1
        start(handshake)

    monkeypatch.setattr(Handshake, "start", count_and_start)
    monkeypatch.setattr(DEFAULTS, "observer", witness)
    return witness


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """CPython's tests collect garbage all the time; what the rest of the session has made need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _uvloop(*_: object) -> asyncio.AbstractEventLoop:
    loop = ktls.aio.new_uvloop_event_loop()
    # CPython's tests end the executor of asyncio's loops by this name.
    loop._default_executor = None  # type: ignore[attr-defined]  # asyncio's, and private
    return loop


def _limited(factory: LoopFactory) -> LoopFactory:
    """Have loops end their tests after ``_TIME_LIMIT``. An exception (of pytest's time limit) would do so once, and their cleaning up would hang again."""

    def make(*arguments: Any) -> asyncio.AbstractEventLoop:
        loop = factory(*arguments)

        def stop() -> None:
            loop.stop()
            loop.call_later(0.1, stop)

        loop.call_later(_TIME_LIMIT, stop)
        return loop

    return make


_LOOPS: Final[dict[str, LoopFactory]] = {
    "asyncio": _limited(KTLSEventLoop),
    "uvloop": _limited(_uvloop),
}


@pytest.fixture
def named_ssl() -> Iterator[None]:
    """Some tests look for ``ssl`` in the name of the transport's class. It is no interface, but there is more behind it in those tests."""
    name = KTLSTransport.__name__
    KTLSTransport.__name__ = "KTLSTransport (not SSLTransport)"  # monkeypatch can't do this one
    yield
    KTLSTransport.__name__ = name


@final
class _Stuck:
    """For a test that makes asyncio's TLS believe that TCP has no room, by its private methods: with ours it is really so, the test writes enough."""

    def __init__(self, transport: KTLSTransport) -> None:
        self._ours = transport
        # Newer ones meddle with the transport below asyncio's TLS, too: ours has none.
        self._transport = SimpleNamespace(write=transport.write)

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None:
        assert self._ours.get_write_buffer_size(), "TCP took all at once"


def _adapt(monkeypatch: pytest.MonkeyPatch, loop_factory: LoopFactory) -> None:
    """Have CPython's tests use our loops, and fit the rest to it."""
    for where, name in (
        (asyncio, "new_event_loop"),
        (asyncio.events, "new_event_loop"),
        (asyncio, "SelectorEventLoop"),
    ):
        monkeypatch.setattr(where, name, loop_factory)
    # The tests write 50 MiB on Linux, and 64 times that factor on macOS, because that is slow. So is the lab.
    monkeypatch.setattr(import_tests("test_asyncio.test_ssl"), "BUF_MULTIPLIER", 64)
    # Children of this process belong to other tests.
    monkeypatch.setattr(support, "reap_children", lambda: None)
    # Without this, tests that say that they need much memory are skipped. They need a fortieth of it with that factor.
    monkeypatch.setattr(support, "max_memuse", 4 << 30)
    monkeypatch.setattr(support, "real_max_memuse", 4 << 30)
    # Private attributes of asyncio's transport.
    monkeypatch.setattr(KTLSTransport, "_ssl_protocol", property(_Stuck), raising=False)
    monkeypatch.setattr(
        KTLSTransport, "_test__append_write_backlog", KTLSTransport.write, raising=False
    )


def _reason(reasons: dict[str, str], test_id: str) -> str | None:
    return next((why for pattern, why in reasons.items() if fnmatchcase(test_id, pattern)), None)


def _run(case: unittest.TestCase) -> str | None:
    """Run a test with the fixtures of its class and module; return why it failed or was skipped, or None."""
    result = unittest.TestResult()
    support.environment_altered = False
    unittest.TestSuite([case]).run(result)
    problems = [text for _, text in result.errors + result.failures]
    problems += [f"skipped: {reason}" for _, reason in result.skipped]
    if not problems and result.testsRun != 1:
        problems.append("did not run")
    if support.environment_altered:
        problems.append("left something behind (see stderr)")
    return "\n".join(problems) or None


# These tests call ``close`` and then close the loop: a connection whose last bytes are not acknowledged yet is cut off there, whoever's it is.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.usefixtures("named_ssl")
@pytest.mark.parametrize(("loop", "test_id", "case"), _TESTS.values(), ids=list(_TESTS))
def test_cpython(
    loop: str,
    test_id: str,
    case: unittest.TestCase,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    witness: Witness,
    tls_stat: TlsStat,
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    _adapt(monkeypatch, _LOOPS[loop])
    problem = _run(case)
    expected = _reason(EXCEPTIONS, test_id)
    if expected is not None:
        assert problem is not None, f"passes, but is in EXCEPTIONS: {expected}"
        pytest.xfail(expected)
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    _check(witness, test_id, tls_stat)


def _check(witness: Witness, test_id: str, tls_stat: TlsStat) -> None:
    without_us = _reason(WITHOUT_US | WITHOUT_US_NEWER, test_id)
    no_handshake = _reason(NO_HANDSHAKE, test_id)
    if without_us is not None:
        assert not witness.begun, f"meets our code, but is in WITHOUT_US: {without_us}"
        return
    assert witness.begun, "no handshake of ours began"
    if no_handshake is not None:
        assert not witness.completed, f"a handshake is complete, but: {no_handshake}"
        return
    assert witness.completed, "no handshake of ours was completed"
    if has_kernel_tls():
        assert {offload.tx for offload in witness.completed} == {"kernel"}
        assert tls_stat["TlsTxSw"] >= len(witness.completed)


@pytest.mark.parametrize(
    "name", [name for name, (_, python) in _LISTS.items() if python == sys.version_info[:2]]
)
def test_lists_name_tests_that_exist(name: str) -> None:
    ids = [test_id for _, test_id, _ in _TESTS.values()]
    patterns, _ = _LISTS[name]
    stale = [pattern for pattern in patterns if not any(fnmatchcase(i, pattern) for i in ids)]
    assert not stale
