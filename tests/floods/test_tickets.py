"""Tickets for a client that keeps sessions. In Python 3.11 each session that is asked for takes some 6 KB for good, so a server that sends tickets for ever must not be followed for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sockets.helpers import Case
from .attacks import ticket

if TYPE_CHECKING:
    import ssl

    from ..sockets.helpers import Net


def test_a_subscriber_is_told_a_few_sessions(net: Net) -> None:
    link = net.link(Case(role="client"))
    assert link.ours._established is not None
    relay = link.ours._established.tickets
    assert relay is not None
    sessions: list[ssl.SSLSession] = []
    relay.subscribe(sessions.append)
    for number in range(1, 101):
        relay.feed(ticket(100))
        assert len(sessions) == min(number, 16)
    assert relay.tickets == 100
    assert not relay.closed
