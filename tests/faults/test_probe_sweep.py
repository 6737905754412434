"""Every system call of the probe fails once, in every way: it still answers, with less than it would, and remembers nothing that passes."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import pytest

from ktls.record import probe
from ktls.record.probe import Capabilities, Finding

from ..sockets.helpers import descriptors
from .seam import Call, Error, Seam

WHOLE_PRODUCT: Final = os.environ.get("KTLS_TRUST") == "1"
#: These say nothing about the kernel.
PASSING: Final = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE),
)
ERRNOS: Final = (
    *PASSING,
    *(errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.ENOENT, errno.ENOPROTOOPT),
    *(errno.EBUSY, errno.EADDRNOTAVAIL, errno.ECONNREFUSED, errno.ETIMEDOUT),
    *(errno.EIO, errno.EBADMSG, errno.EOPNOTSUPP),
)
#: What is asked for, each by itself. A reason (text or None) or whether something works.
QUESTIONS: Final[dict[str, Callable[[], Any]]] = {
    function.__name__: function
    for function in (
        probe.probe,
        probe.kernel_tls_unavailable,
        probe.rekey_supported,
        probe.rekey_unsupported,
        probe.counters_unreadable,
        probe.max_payload_supported,
    )
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    probe.cache_clear()
    yield
    probe.cache_clear()


def ask(
    question: Callable[[], Any], plan: dict[int, Error]
) -> tuple[dict[str, Finding], Seam, bool]:
    """Ask for the first time; return what was answered, and whether anything was remembered."""
    probe.cache_clear()
    seam = Seam()
    seam.plan.update(plan)
    seam.everywhere = True
    with seam.opened():
        answer = question()
        before = len(seam.calls)
        question()
        remembered = len(seam.calls) == before
    return findings(answer), seam, remembered


def findings(answer: object) -> dict[str, Finding]:
    """An answer as findings, by name."""
    if isinstance(answer, bool):
        return {"it": Finding(None if answer else "no")}
    if not isinstance(answer, Capabilities):
        assert answer is None or isinstance(answer, str)
        return {"it": Finding(answer)}
    found: dict[str, Finding] = {}
    for field in dataclasses.fields(answer):
        value = getattr(answer, field.name)
        if isinstance(value, Mapping):
            found |= {f"{field.name} {cipher}": finding for cipher, finding in value.items()}
        elif field.name != "transient":
            found[field.name] = value
    return found


def _plan(calls: list[Call], salt: str) -> Iterator[tuple[int, int]]:
    start = zlib.crc32(salt.encode())
    for position in range(len(calls)):
        for number in ERRNOS if WHOLE_PRODUCT else (ERRNOS[(start + position) % len(ERRNOS)],):
            yield position, number


@pytest.mark.timeout(600 if WHOLE_PRODUCT else 60)
@pytest.mark.parametrize("name", QUESTIONS)
def test_each_call_fails_once(name: str) -> None:
    question = QUESTIONS[name]
    clean, seam, remembered = ask(question, {})
    assert remembered
    calls = seam.calls
    assert calls
    before = descriptors()
    for position, number in _plan(calls, name):
        where = f"{errno.errorcode[number]} instead of call {position}, {calls[position]}"
        spoilt, seam, remembered = ask(question, {position: Error(number)})
        assert len(seam.hits) == 1, where
        assert spoilt.keys() == clean.keys(), where
        _is_honest(name, spoilt, clean, where)
        if number in PASSING:
            # Nothing was found out: whatever was answered, nobody is told so a second time.
            assert findings(question()) == clean, where
            assert not remembered or spoilt == clean, where
        elif remembered:
            assert findings(question()) == spoilt, where
        else:
            assert findings(question()) == clean, where
        del seam
        gc.collect(0)
        assert descriptors() <= before, where


def _is_honest(
    name: str, spoilt: dict[str, Finding], clean: dict[str, Finding], where: str
) -> None:
    """It claims nothing that does not work; and if the kernel can't be used, nothing of it can."""
    for what, finding in spoilt.items():
        assert finding.reason != "", where
        # Nothing was seen to be forbidden: that is all which this question is about.
        if finding and name != "counters_unreadable":
            assert clean[what], f"{what} would work, {where}"
    if not spoilt.get("kernel_tls", Finding()):
        assert not any(spoilt.values()), where


def test_calls_of_every_kind_are_made() -> None:
    """What is spoilt above is everything that the probe does before it meets a kernel without TLS; with one, keys and counters too."""
    _, seam, _ = ask(probe.probe, {})
    names = {call.name for call in seam.calls}
    assert names >= {
        *("socket", "settimeout", "bind", "listen", "getsockname", "connect", "accept"),
        "setsockopt(TCP_ULP)",
    }
    if probe.kernel_tls_unavailable() is None:
        assert names >= {"setsockopt(TLS_TX)", "setsockopt(TLS_RX)", "sendall", "recv"}
