"""uvicorn, with Starlette and FastAPI, by its own options; and gunicorn with uvicorn's worker."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import TLS12, Authority, TlsStat, has_kernel_tls

from .clients import in_kernel
from .conftest import Start
from .programs import installed

KTLS = "ktls.aio:new_event_loop"
KTLS_UVLOOP = "ktls.aio:new_uvloop_event_loop"
PATHSEND = "ktls.asgi:PathSendProtocol"
#: After an orderly stop, a uvicorn of one process raises the signal again, for whoever looks at its status.
ENDS = -signal.SIGTERM
#: A uvicorn with workers leaves its listening socket to the end of the process, whatever the loop.
LEFT_OPEN = r"(sys:1|<sys>:0): ResourceWarning: unclosed <socket.socket fd=\d+, family=2, type=1, proto=0, laddr=\('127.0.0.1', \d+\)>\nResourceWarning"
#: What uvicorn's worker does with gunicorn's settings.
DEPRECATED = r"DeprecationWarning: ssl.PROTOCOL_TLS is deprecated"


def command(authority: Authority, site: str, loop: str, *options: object) -> tuple[object, ...]:
    return (
        *(installed("uvicorn"), f"tests.servers.sites.{site}:app", "--port", 0),
        *("--loop", loop, "--ssl-certfile", authority.server_chain, *options),
    )


@pytest.mark.parametrize(
    ("site", "loop"), [("on_starlette", KTLS), ("on_fastapi", KTLS_UVLOOP)], ids=["ours", "uvloop"]
)
def test_the_loop_is_one_option(start: Start, authority: Authority, site: str, loop: str) -> None:
    visitor = start(*command(authority, site, loop))
    facts = visitor.visit()
    assert facts["loop"][0] == "ktls"
    assert ("uvloop" in facts["loop"]) == (loop is KTLS_UVLOOP)
    assert facts["sent"] == 0  # uvicorn's own protocol reads files and writes them
    visitor.visit(TLS12)
    visitor.visit_with_curl()
    visitor.visit_with_curl("--tls-max", "1.2")
    visitor.visit_with_websocket()
    visitor.visit_with_httpx()
    visitor.server.stop(ENDS)
    assert b"Finished server process" in visitor.server.err.all()


@pytest.mark.parametrize(
    ("site", "loop"), [("on_fastapi", KTLS), ("on_starlette", KTLS_UVLOOP)], ids=["ours", "uvloop"]
)
def test_a_second_option_sends_files_by_sendfile(
    start: Start, authority: Authority, site: str, loop: str
) -> None:
    visitor = start(*command(authority, site, loop, "--http", PATHSEND))
    facts = visitor.visit()
    assert facts["sent"] == (len(visitor.contents) if has_kernel_tls() else 0)
    visitor.visit_with_curl()
    visitor.visit_with_websocket()
    visitor.server.stop(ENDS)


@pytest.mark.parametrize("loop", [KTLS, KTLS_UVLOOP], ids=["ours", "uvloop"])
def test_several_workers(start: Start, authority: Authority, loop: str) -> None:
    visitor = start(*command(authority, "on_starlette", loop, "--workers", 2))
    for _ in range(2):
        visitor.server.err.expect(rb"Application startup complete")
    visitor.visit_workers(2)
    visitor.visit_with_curl()
    visitor.server.stop(allowed=LEFT_OPEN)


def test_it_stops_in_order_while_connections_are_open(start: Start, authority: Authority) -> None:
    visitor = start(*command(authority, "on_starlette", KTLS))
    stat = TlsStat()
    with ExitStack() as stack:
        clients = [visitor.connection() for _ in range(5)]
        for client in clients:
            stack.callback(client.close)
            client.request("GET", "/hello")
            assert client.getresponse().read() == b"hello over https"
        in_kernel(stat, 5)
        visitor.server.stop(ENDS)
        for client in clients:
            assert client.sock.recv(1) == b""  # with close_notify, or it would raise
        in_kernel(stat, 0)


def test_gunicorn_with_the_uvicorn_worker(
    start: Start, authority: Authority, tmp_path: Path
) -> None:
    visitor = start(
        *(installed("gunicorn"), "tests.servers.sites.on_starlette:app"),
        *("--worker-class", "tests.servers.sites.gunicorn_worker.KTLSWorker", "--workers", 2),
        *("--bind", "127.0.0.1:0", "--worker-tmp-dir", tmp_path, "--no-control-socket"),
        *("--certfile", authority.server_chain, "--keyfile", authority.server_chain),
    )
    facts = visitor.visit()
    assert facts["loop"][0] == "ktls"
    assert facts["sent"] == (len(visitor.contents) if has_kernel_tls() else 0)
    visitor.visit_workers(2)
    visitor.visit_with_curl()
    visitor.visit_with_websocket()
    visitor.server.stop(allowed=DEPRECATED)
