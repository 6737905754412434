"""What the benchmarks of servers share: one server of each kind, in a process of its own, and a certificate for it.

A kind is a name: ``asyncio ssl``, ``uvloop ssl``, ``ktls asyncio``, ``ktls uvloop``, ``plain asyncio``, ``plain uvloop``.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import ssl
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import trustme

import ktls
import ktls.aio


def is_plain(kind: str) -> bool:
    """Whether it is TCP without TLS."""
    return kind.startswith("plain")


def loop_of(kind: str) -> Any:
    """What makes the event loop of that kind."""
    if kind.startswith("ktls"):
        return ktls.aio.new_uvloop_event_loop if "uvloop" in kind else ktls.aio.new_event_loop
    if "uvloop" in kind:
        import uvloop

        return uvloop.new_event_loop
    return asyncio.SelectorEventLoop


async def listen(
    kind: str, certificate: str, protocol: Callable[[], asyncio.Protocol], *, backlog: int = 100
) -> asyncio.Server:
    """Listen, and print the port, for whoever has started this process."""
    context = None
    if not is_plain(kind):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0, ssl=context, backlog=backlog)
    print(server.sockets[0].getsockname()[1], flush=True)
    return server


def command(script: str, kind: str, certificate: str) -> list[str]:
    """The command that makes ``script`` serve."""
    return [sys.executable, script, "--serve", kind, "--certificate", certificate]


def parser(description: str, kinds: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments that such a benchmark takes, those of ``command`` among them."""
    made = argparse.ArgumentParser(description=description.partition("\n")[0])
    made.add_argument("--kinds", nargs="*", default=list(kinds))
    made.add_argument("--json", action="store_true")
    made.add_argument("--serve", help=argparse.SUPPRESS)
    made.add_argument("--certificate", help=argparse.SUPPRESS)
    return made


def run(kind: str, certificate: str, serve: Callable[[str, str], Awaitable[None]]) -> None:
    """Run ``serve`` on the loop of that kind."""

    async def main() -> None:
        await serve(kind, certificate)

    with asyncio.Runner(loop_factory=loop_of(kind)) as runner:
        runner.run(main())


@contextmanager
def identity() -> Iterator[tuple[str, ssl.SSLContext]]:
    """The path of a new certificate for ``localhost``, with its key, and a client's context that trusts it."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with tempfile.NamedTemporaryFile() as file:
        file.write(authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
        file.flush()
        yield file.name, context


def versions() -> str:
    """What the figures were measured on."""
    return f"Linux {platform.release()}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}"
