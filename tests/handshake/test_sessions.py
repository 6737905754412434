"""The session cache."""

from __future__ import annotations

import ssl
import threading
from typing import TYPE_CHECKING, cast

import pytest

from ktls.handshake.sessions import SessionCache

from .helpers import TLS12, TLS13, Pki, ours_client, run, their_client, their_server

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = ("localhost", 443)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeSession:
    def __init__(self, time: int = 1000, timeout: int = 300) -> None:
        self.time = time
        self.timeout = timeout


def session(time: int = 1000, timeout: int = 300) -> ssl.SSLSession:
    return cast("ssl.SSLSession", FakeSession(time, timeout))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> SessionCache:
    return SessionCache(3, clock=clock)


def test_a_ticket_is_used_once(cache: SessionCache) -> None:
    one, two = session(), session()
    cache.store(KEY, one)
    cache.store(KEY, two)
    assert [cache.take(KEY) for _ in range(3)] == [two, one, None]
    assert len(cache) == 0


def test_a_tls12_session_stays_and_is_replaced(cache: SessionCache) -> None:
    one, two = session(), session()
    cache.store(KEY, one, single_use=False)
    assert [cache.take(KEY) for _ in range(2)] == [one, one]
    cache.store(KEY, two, single_use=False)
    assert cache.take(KEY) is two
    cache.clear()
    assert cache.take(KEY) is None


@pytest.mark.parametrize("single_use", [True, False])
def test_expired_sessions_are_not_given_out(
    cache: SessionCache, clock: Clock, single_use: bool
) -> None:
    long, short = session(timeout=600), session(timeout=300)
    cache.store(KEY, long)
    cache.store(KEY, short, single_use=True)
    clock.now += 299
    assert cache.take(KEY) is short
    cache.store(KEY, short)
    clock.now += 1
    assert cache.take(KEY) is long
    cache.store(KEY, short, single_use=single_use)
    assert cache.take(KEY) is None
    assert len(cache) == 0


def test_no_ticket_lives_longer_than_a_week(cache: SessionCache, clock: Clock) -> None:
    cache.store(KEY, session(timeout=10**9), single_use=False)
    clock.now += 604_799
    assert cache.take(KEY) is not None
    clock.now += 1
    assert cache.take(KEY) is None


def test_it_is_bounded_and_drops_the_least_recently_used(cache: SessionCache) -> None:
    for port in range(3):
        cache.store(("a", port), session(), single_use=False)
    assert cache.take(("a", 0)) is not None
    cache.store(("a", 3), session())
    assert len(cache) == 3
    assert cache.take(("a", 1)) is None
    assert cache.take(("a", 0)) is not None
    kept = [session() for _ in range(10)]
    for one in kept:
        cache.store(KEY, one)
    assert [cache.take(KEY) for _ in range(5)] == [*reversed(kept[-4:]), None]
    with pytest.raises(ValueError, match="one entry"):
        SessionCache(0)


def test_threads_take_each_ticket_once() -> None:
    cache = SessionCache()
    stored, taken = [[session() for _ in range(500)] for _ in range(4)], []

    def in_threads(work: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def work(number: int) -> None:
        for one in stored[number]:
            cache.store(KEY, one)
            if (got := cache.take(KEY)) is not None:
                taken.append(got)

    in_threads(work)
    assert len({id(one) for one in taken}) == len(taken)
    assert "sessions of" in repr(cache)


def test_real_sessions_resume(pki: Pki) -> None:
    cache = SessionCache()
    for version in (TLS12, TLS13):
        client_context, server_context = pki.client(version), pki.server(version)
        client, server = their_client(client_context), their_server(server_context)
        run(client, server)
        client.read()
        assert client.sslobject.session is not None
        cache.store(KEY, client.sslobject.session, single_use=version is TLS13)
        again = ours_client(client_context, cache.take(KEY))
        run(again, their_server(server_context))
        assert again.result().info.session_reused
        assert (cache.take(KEY) is None) is (version is TLS13)
        cache.clear()
