"""The driver whose records stay with the handshake engine: every system call fails once, in every way. The kernel has no part in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from ktls.testing import pattern

from .engines import Engines
from .scenarios import SCENARIOS, Scenario
from .test_sweep import WHOLE_PRODUCT, spoil_each
from .world import World

if TYPE_CHECKING:
    from ..support import Authority

#: What an engine can't do: change its key when asked to, keep limits, make smaller records. What was read ahead it has in its BIO.
IMPOSSIBLE: Final = {
    *("refresh", "refresh_and_ask", "crossing", "refresh_while_full"),
    *("limit", "limit_in_file", "limit_of_the_peers_key", "small_records", "read_ahead"),
}


def _half_close_with_data_here(w: World) -> None:
    """Of what comes a part is in this process already, opened and not."""
    w.set_up()
    data = pattern(40_000)
    w.peer.send_data(data)
    w.from_peer += len(data)
    w.receive(10)
    w.retry(lambda: w.driver.close_notify())
    w.receive(len(data) - 10)
    w.peer.send_alert()
    w.receive_end()
    w.close()


SWEPT: Final = [
    *(s for s in SCENARIOS.values() if not s.kernel_rx and s.name not in IMPOSSIBLE),
    Scenario("half_close_with_data_here", _half_close_with_data_here),
]


@pytest.fixture(scope="module")
def engines(authority: Authority) -> Engines:
    return Engines(authority)


@pytest.mark.timeout(600 if WHOLE_PRODUCT else 60)
@pytest.mark.parametrize("scenario", SWEPT, ids=[s.name for s in SWEPT])
def test_each_call_fails_once(engines: Engines, scenario: Scenario) -> None:
    spoil_each(engines.layers, scenario)
