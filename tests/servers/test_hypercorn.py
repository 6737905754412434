"""hypercorn: it makes its loop by ``asyncio.Runner``, in each worker after loading the application, so the switch is a line in front of the application."""

from __future__ import annotations

import sys

import pytest
from tests.support import TLS12, Authority

from .conftest import Start
from .programs import installed


def command(authority: Authority, site: str, *options: object) -> tuple[object, ...]:
    return (
        *(installed("hypercorn"), f"tests.servers.sites.{site}:app", "--bind", "127.0.0.1:0"),
        *("--certfile", authority.server_chain, "--keyfile", authority.server_chain, *options),
    )


@pytest.mark.parametrize("site", ["hypercorn_installed", "hypercorn_uvloop"])
def test_a_line_in_front_of_the_application(start: Start, authority: Authority, site: str) -> None:
    visitor = start(*command(authority, site, "--workers", 2))
    facts = visitor.visit()
    assert facts["loop"][0] == "ktls"
    assert ("uvloop" in facts["loop"]) == (site == "hypercorn_uvloop")
    visitor.visit_workers(2)
    visitor.visit(TLS12)
    visitor.visit_with_websocket()
    visitor.visit_with_httpx()
    visitor.visit_with_httpx(http2=True)
    visitor.visit_with_curl("--http1.1")
    visitor.visit_with_curl("--http2", protocol="2")
    visitor.server.stop()


def test_started_by_a_program(start: Start, authority: Authority) -> None:
    visitor = start(
        sys.executable, "-m", "tests.servers.sites.hypercorn_serve", authority.server_chain
    )
    assert visitor.visit()["loop"][0] == "ktls"
    visitor.visit_with_curl("--http2", protocol="2")
    visitor.visit_with_websocket()
    visitor.server.stop()
