"""Every system call of the record layers and the driver fails once, in every way, in every state that a scenario brings about.

The long form (``KTLS_TRUST=1``) is the whole product: scenario, layer, call, fault. The short one takes every call once, with one of its faults: another one each time.
"""

from __future__ import annotations

import ast
import gc
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import ktls
from ktls.testing import eventually

from ..sockets.helpers import descriptors
from ..support import has_kernel_tls, has_rekey
from .layers import LAYERS, Layers
from .scenarios import SCENARIOS, Scenario
from .sweep import faults_for, run, verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .seam import Call, Fault
    from .sweep import Result

WHOLE_PRODUCT: Final = os.environ.get("KTLS_TRUST") == "1"
ROOM: Final = Path(ktls.__file__).parent
#: Where the calls are that this sweep is about.
MODULES: Final = tuple(
    f"record/{name}.py" for name in ("catchup", "kernel", "refusal", "tcp", "userspace")
)
CALLS: Final = (
    *("send", "sendmsg", "recv", "recv_into", "recvmsg", "setsockopt", "getsockopt", "shutdown"),
    *("sendfile", "splice", "pread", "fstat", "ioctl"),
)


def _cases() -> Iterator[tuple[Layers, Scenario]]:
    names = ["userspace", "userspace-direct"]
    if has_rekey():
        names = ["kernel", "kernel-direct", "mixed"]
    elif has_kernel_tls():
        names = ["kernel-without-rekey", "both-in-kernel"]
    for name in names:
        for scenario in SCENARIOS.values():
            if scenario.fits(LAYERS[name], has_rekey()):
                yield LAYERS[name], scenario


CASES: Final = list(_cases())


def _plan(calls: list[Call], salt: str) -> Iterator[tuple[int, Fault]]:
    start = zlib.crc32(salt.encode())
    for position, call in enumerate(calls):
        faults = faults_for(call)
        if not WHOLE_PRODUCT:
            if (start + position) % 2:  # the layers begin at different ones
                continue
            faults = [faults[(start + 7 * position) % len(faults)]]
        for fault in faults:
            yield position, fault


@pytest.mark.timeout(600 if WHOLE_PRODUCT else 60)
@pytest.mark.parametrize(
    ("layers", "scenario"), CASES, ids=[f"{layers}-{scenario.name}" for layers, scenario in CASES]
)
def test_each_call_fails_once(layers: Layers, scenario: Scenario) -> None:
    spoil_each(layers, scenario)


def spoil_each(layers: Layers, scenario: Scenario) -> None:
    """Spoil each call of ``scenario``, one after the other, and compare."""
    before = descriptors()
    clean: Result | None
    spoilt: Result | None
    clean = run(scenario, layers)
    assert (clean.outcome == "whole") is scenario.whole
    hits = 0
    plan = list(_plan(clean.calls, f"{layers} {scenario.name}"))
    for position, fault in plan:
        where = f"{fault} instead of call {position}, {clean.calls[position]}"
        try:
            spoilt = run(scenario, layers, {position: fault})
            if spoilt.hits:
                hits += 1
                verify(scenario, clean, spoilt)
        except BaseException as error:
            error.add_note(where)
            raise
    # How often a full buffer is looked at is TCP's business: such a call may be missing.
    assert hits >= min(len(plan), len(clean.calls)) * 0.4
    clean = spoilt = None
    gc.collect()  # errors hold the frames that they passed, and what is in these
    eventually(lambda: descriptors() <= before, "no descriptor is left")


def _written_in(module: str) -> set[str]:
    """Each system call in the text of ``module``, by the function around it."""
    found: set[str] = set()

    def walk(node: ast.AST, around: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            around = f"{around}.{node.name}" if around else node.name
        if isinstance(node, ast.Attribute) and node.attr in CALLS:
            owner = ast.unparse(node.value)
            if owner == "os" or owner.endswith("sock"):
                found.add(f"{module}:{around} {node.attr}")
        if isinstance(node, ast.Name) and node.id == "ioctl":
            found.add(f"{module}:{around} ioctl")
        for child in ast.iter_child_nodes(node):
            walk(child, around)

    walk(ast.parse((ROOM / module).read_text()), "")
    return found


def test_no_call_is_left_out() -> None:
    """The scenarios make every call that is written in the record layers of this kernel."""
    made = {
        f"{call.site} {call.name.partition('(')[0]}"
        for layers, scenario in CASES
        for call in run(scenario, layers).calls
    }
    written = set().union(*map(_written_in, MODULES))
    # Only where a signal handler's exception came too late: tests/record/test_kernel_rules.py.
    written.remove("record/kernel.py:KernelReceiver.__init__ getsockopt")
    # Sending in user space is swept where there is no kernel TLS, all the rest where there is.
    sending = {call for call in written if "UserspaceSender" in call}
    receiving = {call for call in written if "UserspaceReceiver" in call}
    written = written - sending if has_kernel_tls() else sending | receiving
    if not has_rekey() and has_kernel_tls():
        written -= {call for call in written if ".install " in call}
    assert written - made == set()
