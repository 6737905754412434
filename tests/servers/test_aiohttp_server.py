"""aiohttp's server: given a loop, or run on one; its files go out by ``sendfile`` without being asked for."""

from __future__ import annotations

import sys

import pytest
from tests.support import TLS12, Authority, has_kernel_tls

from .conftest import Start


@pytest.mark.parametrize("how", ["run_app", "run_app-uvloop", "runner"])
def test_files_are_sent_by_sendfile(start: Start, authority: Authority, how: str) -> None:
    visitor = start(
        *(sys.executable, "-m", "tests.servers.sites.on_aiohttp", how, authority.server_chain),
        says="out",
    )
    facts = visitor.visit()
    assert facts["loop"][0] == "ktls"
    assert ("uvloop" in facts["loop"]) == ("uvloop" in how)
    sent = len(visitor.contents) if has_kernel_tls() else 0
    assert facts["sent"] == sent
    assert visitor.visit(TLS12)["sent"] == 2 * sent
    visitor.visit_with_curl()
    visitor.visit_with_httpx()
    visitor.visit_with_websocket()
    visitor.server.stop()
