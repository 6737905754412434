"""Shared by all tests: the kernel that is demanded, an authority, contexts, echo servers, the kernel's counters.

A test that needs a kernel is marked. Where the kernel is missing such a test is skipped with a reason that ``-ra`` shows; but with KTLS_REQUIRE_KERNEL set
(the lab's runs set it) the kernel must be what was claimed, or the whole session fails before it starts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from .support import Authority, EchoServer, TlsStat, describe_kernel, kernel_kind

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    import ktls

_REQUIRED: Final = os.environ.get("KTLS_REQUIRE_KERNEL")
#: Which kernels will do for a mark.
_MARKS: Final = {"kernel": ("rekey", "norekey"), "rekey": ("rekey",), "norekey": ("norekey",)}
_EXIT_WRONG_KERNEL: Final = 3
_WRONG_KERNEL: Final = "needs a kernel marked"
_skipped: Final[list[str]] = []

_statistics: Final = TlsStat()


def pytest_sessionstart() -> None:
    if _REQUIRED is None:
        return
    if _REQUIRED not in ("rekey", "norekey"):
        pytest.exit(f"KTLS_REQUIRE_KERNEL is {_REQUIRED!r}: rekey or norekey", _EXIT_WRONG_KERNEL)
    if kernel_kind() != _REQUIRED:
        pytest.exit(
            f"KTLS_REQUIRE_KERNEL is {_REQUIRED}, but this is {describe_kernel()}",
            _EXIT_WRONG_KERNEL,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    kind = kernel_kind()
    for item in items:
        for mark, kinds in _MARKS.items():
            if item.get_closest_marker(mark) is not None and kind not in kinds:
                item.add_marker(
                    pytest.mark.skip(reason=f"{_WRONG_KERNEL} {mark}: {describe_kernel()}")
                )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and _WRONG_KERNEL in str(report.longrepr):
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # The marks are chosen by -m; with a kernel demanded, nothing that was chosen may be skipped for want of one.
    if _REQUIRED is not None and _skipped:
        session.exitstatus = _EXIT_WRONG_KERNEL


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("kernel", sep="-")
    terminalreporter.line(describe_kernel())
    if _REQUIRED is not None and _skipped:
        terminalreporter.line(
            f"FAILED: KTLS_REQUIRE_KERNEL is {_REQUIRED}, but these need another: {_skipped}",
            red=True,
        )
    sent = sum(_statistics[f"TlsTx{kind}"] for kind in ("Sw", "Device"))
    received = sum(_statistics[f"TlsRx{kind}"] for kind in ("Sw", "Device"))
    terminalreporter.line(
        f"kernel TLS was set up {sent} times for sending and {received} times for receiving in this session"
    )


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that all contexts of the session trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stdlib_client(authority: Authority) -> ssl.SSLContext:
    """A client's context of the ``ssl`` module. Not to be changed."""
    return authority.client()


@pytest.fixture(scope="session")
def stdlib_server(authority: Authority) -> ssl.SSLContext:
    """A server's context of the ``ssl`` module. Not to be changed."""
    return authority.server()


@pytest.fixture
def ktls_client(authority: Authority) -> ktls.SSLContext:
    """A client's context of ``ktls``."""
    return authority.ktls_client()


@pytest.fixture
def ktls_server(authority: Authority) -> ktls.SSLContext:
    """A server's context of ``ktls``."""
    return authority.ktls_server()


@pytest.fixture
def echo_server() -> Iterator[Callable[[ssl.SSLContext], EchoServer]]:
    """Start echo servers, each with a context of either implementation; they are stopped at the end."""
    servers: list[EchoServer] = []

    def start(context: ssl.SSLContext) -> EchoServer:
        servers.append(EchoServer(context))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def tls_stat() -> TlsStat:
    """The kernel's counters, as differences from the start of the test."""
    return TlsStat()
