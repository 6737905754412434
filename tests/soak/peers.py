"""The peers of the soak, a process: many clients of several kinds, each following a plan that its number and the seed decide.

Arguments, as one JSON object: ``loop``, ``authority``, ``file``, ``seed``, ``ports``, ``seconds``, ``connections``, ``patience``. When the time is up, every client parks one connection in
a state of its own; ``parked`` is said, and a line on stdin lets them go.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import ssl
import struct
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.soak.leaks import Descriptors, find_leaks
from tests.soak.server import Complaints, read_line, say
from tests.soak.workload import (
    ACK,
    ACKNOWLEDGED,
    DUPLEX,
    ECHO,
    HALF_CLOSED,
    SEQUENTIAL,
    Account,
    End,
    Header,
    Line,
    together,
)
from tests.support import HOST, TLS12, has_kernel_tls, has_rekey

import ktls
import ktls.aio
from ktls.handshake.sessions import SessionCache

_SIZES: Final = (0, 1, 1_000, 20_000, 200_000)
_LARGE: Final = 2_000_000
#: Does not fit into TCP's buffers.
_PARKED: Final = 4_000_000
_BAD_RECORD: Final = b"\x17\x03\x03\x00\x20" + bytes(32)


@dataclass
class Plan:
    """What one connection will be like."""

    #: ``ktls``, ``userspace``, ``foreign`` (asyncio's own TLS), ``garbage`` or ``silent`` (no TLS at all)
    stack: str
    #: 0: any, 1: the server changes its keys often
    port: int
    version: ssl.TLSVersion | None
    slow: bool
    rounds: int
    #: ``handshake``, ``abort``, ``reset``, ``close``: we cancel; ``server``: its handler is cancelled; ``vandal``: we send a bad record
    disturbance: str | None

    @classmethod
    def make(cls, rng: random.Random) -> Plan:
        stack = rng.choices(
            ("ktls", "userspace", "foreign", "garbage", "silent"), (55, 22, 18, 3, 2)
        )[0]
        version = TLS12 if rng.random() < 0.15 else None
        disturbance = rng.choices(
            (None, "handshake", "abort", "reset", "close", "server", "vandal"),
            (64, 5, 5, 5, 8, 10, 3),
        )[0]
        if disturbance == "vandal" and stack != "userspace":
            disturbance = "server"
        return cls(
            stack=stack,
            port=0 if version is TLS12 else rng.randrange(2),
            version=version,
            slow=rng.random() < 0.1,
            rounds=rng.choice((1, 1, 2, 5, 10)),
            disturbance=disturbance,
        )


class Peers:
    """All clients, and what they have seen."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.seed = options["seed"]
        self.ports: list[int] = options["ports"]
        self.accounts: dict[int, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        self.parked = 0
        self.all_parked = asyncio.Event()
        self.released = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.until = self.loop.time() + options["seconds"]
        self.can_rekey = has_rekey() or not has_kernel_tls()
        self.contexts = {
            (stack, version): self._context(stack, version)
            for stack in ("ktls", "userspace", "foreign")
            for version in (None, TLS12)
        }

    def _context(self, stack: str, version: ssl.TLSVersion | None) -> ssl.SSLContext:
        context: ssl.SSLContext
        if stack == "foreign":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        else:
            context = ours = ktls.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            ours.offload = "userspace" if stack == "userspace" else "auto"
            ours.session_cache = SessionCache()
        context.load_verify_locations(self.options["authority"])
        if version is not None:
            context.maximum_version = version
        return context

    # --- a client --------------------------------------------------------------------------------------------------

    async def client(self, number: int) -> None:
        """Make one connection after the other, then park one."""
        count = 0
        while self.loop.time() < self.until:
            key = number << 32 | count
            rng = random.Random(f"{self.seed}/{key}")
            plan = Plan.make(rng)
            self.counts[plan.stack] += 1
            self.counts[f"disturbed by {plan.disturbance}"] += 1
            if plan.stack in ("garbage", "silent"):
                await self.no_tls(plan, rng)
            else:
                await self.connection(key, plan, rng)
            count += 1
        key = number << 32 | count
        rng = random.Random(f"{self.seed}/{key}")
        plan = Plan.make(rng)
        plan.disturbance, plan.slow = None, False
        if plan.stack in ("garbage", "silent"):
            plan.stack = "ktls"
        await self.connection(key, plan, rng, park=True)

    async def no_tls(self, plan: Plan, rng: random.Random) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[0])
            if plan.stack == "garbage":
                writer.write(rng.randbytes(rng.randrange(1, 300)))
            if rng.random() < 0.5:
                await asyncio.sleep(2 * rng.random())
            else:
                async with asyncio.timeout(2):
                    await reader.read()
        except (OSError, TimeoutError):
            pass
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass

    async def connection(
        self, key: int, plan: Plan, rng: random.Random, *, park: bool = False
    ) -> None:
        account = Account(disturbed=plan.disturbance is not None)
        task = asyncio.create_task(self.live(key, plan, rng, account, park))
        timer: asyncio.TimerHandle | None = None
        if plan.disturbance in ("handshake", "abort", "reset", "close"):
            delay = rng.random() * (0.3 if plan.disturbance == "handshake" else 3)
            timer = self.loop.call_later(delay, task.cancel)
        await asyncio.wait({task})
        if timer is not None:
            timer.cancel()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.faults.append(f"{key:x} {plan}: " + "".join(traceback.format_exception(error)))
        if task.cancelled():
            account.error = "cancelled"
        self.accounts[key] = {**account.as_json(), "plan": str(plan)}

    async def live(
        self, key: int, plan: Plan, rng: random.Random, account: Account, park: bool
    ) -> None:
        """One connection from its beginning to its end; what is no more than a disturbance makes is in ``account``."""
        try:
            line = await self.open(plan, rng, account)
            try:
                if park:
                    await self.park(key, line, plan)
                else:
                    await self.rounds(key, line, plan)
                await line.close()
            except asyncio.CancelledError:
                await self.give_up(line, plan)
                raise
            except BaseException:
                line.writer.transport.abort()
                raise
        except TimeoutError as error:
            account.error = f"hangs {error}"
            self.faults.append(f"{key:x} {plan} hangs: {account}")
        except (OSError, End) as error:
            account.error = f"{type(error).__name__}: {error}"
            if not account.disturbed:
                self.faults.append(f"{key:x} {plan}: " + "".join(traceback.format_exception(error)))

    async def open(self, plan: Plan, rng: random.Random, account: Account) -> Line:
        sock = socket.socket()
        try:
            if plan.slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            sock.setblocking(False)
            await self.loop.sock_connect(sock, ("127.0.0.1", self.ports[plan.port]))
        except BaseException:
            sock.close()
            raise
        opener = asyncio.open_connection if plan.stack == "foreign" else ktls.aio.open_connection
        reader, writer = await opener(
            sock=sock,
            ssl=self.contexts[plan.stack, plan.version],
            server_hostname=HOST,
            ssl_shutdown_timeout=self.options["patience"],
            limit=4096 if plan.slow else 65536,
        )
        facts = writer.get_extra_info("ktls")
        tls13 = facts is not None and facts.version() == "TLSv1.3"
        return Line(
            reader,
            writer,
            rng,
            Path(self.options["file"]),
            # Whoever has no kernel keys can always change them.
            may_refresh=tls13 and (self.can_rekey or facts.offload.tx == "userspace"),
            may_request=self.can_rekey,
            account=account,
            slowness=0.05 if plan.slow else 0.0,
        )

    async def give_up(self, line: Line, plan: Plan) -> None:
        """The end of a connection whose client was cancelled."""
        if plan.disturbance == "close":
            try:
                await line.close()
            except OSError:
                pass
            return
        sock = line.writer.get_extra_info("socket") if plan.disturbance == "reset" else None
        if sock is not None and sock.fileno() >= 0:  # else it is gone already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.writer.transport.abort()

    # --- rounds ----------------------------------------------------------------------------------------------------

    def header(self, key: int, line: Line, plan: Plan, **more: int) -> Header:
        rng = line.rng
        can_half_close = line.ktls is not None and line.ktls.version() == "TLSv1.3"
        sizes = _SIZES[:-1] if plan.slow else (*_SIZES, _LARGE) if rng.random() < 0.1 else _SIZES
        mode, up, down = rng.randrange(3), rng.choice(sizes), rng.choice(sizes)
        last = rng.random() < 0.1 and can_half_close
        fields = {
            "connection": key,
            "mode": mode,
            "ending": HALF_CLOSED if last else ACKNOWLEDGED,
            "up": up,
            "down": up if mode == ECHO else down,
            "start": rng.randrange(1 << 20),
            "cancel": 0,
            # In TLS 1.2 no key can be changed.
            "style": rng.choice((0, 2) if plan.version is TLS12 else (0, 1, 2, 3))
            + 4 * (rng.random() < 0.15),
        }
        return Header(**{**fields, **more})

    async def rounds(self, key: int, line: Line, plan: Plan) -> None:
        rng = line.rng
        for number in range(plan.rounds):
            header = self.header(key, line, plan)
            if plan.disturbance == "server" and not number:
                header = header._replace(cancel=rng.randrange(1, 3000))
            begun = self.loop.time()
            async with asyncio.timeout(self.options["patience"]):
                if plan.disturbance == "vandal" and rng.random() < 0.5:
                    # Behind our transport's back, which is in user space: so this is no TLS record of anybody's.
                    os.write(line.writer.get_extra_info("socket").fileno(), _BAD_RECORD)
                    self.counts["bad records"] += 1
                await self.round(line, header)
            self.slowest = max(self.slowest, self.loop.time() - begun)
            line.account.rounds += 1
            self.counts["rounds"] += 1
            if header.ending == HALF_CLOSED:
                self.counts["half closes"] += 1
                return
            if self.loop.time() > self.until:
                return
            await asyncio.sleep(rng.choice((0, 0, 0.1, 1, 3)) * rng.random())
            line.maybe_refresh(0.3)

    async def round(self, line: Line, header: Header) -> None:
        end, files = header.ending == HALF_CLOSED, line.ktls is not None
        line.write(header.encode())
        if header.mode == SEQUENTIAL:
            await line.send(header.start, header.up, files=files, end=end)
            await line.receive(header.start, header.down, end=end)
        else:
            await together(
                line.send(header.start, header.up, files=files, end=end),
                line.receive(header.start, header.down, end=end),
            )
        if not end:
            line.write(ACK)
            await line.writer.drain()

    async def park(self, key: int, line: Line, plan: Plan) -> None:
        """Leave the connection idle in one of the states that a loop may spin in, and go on when all are let go."""
        states = ["idle", "idle", "idle", "blocked"]
        if line.ktls is not None and line.ktls.version() == "TLSv1.3":
            states += ["half closed by us", "half closed by both", "refreshed", "refreshed"]
        state = line.rng.choice(states)
        self.counts[f"parked: {state}"] += 1
        header = self.header(key, line, plan, mode=DUPLEX, up=0, down=0, ending=ACKNOWLEDGED)
        if state == "blocked":
            header = header._replace(down=_PARKED)
        elif state == "half closed by us":
            header = header._replace(down=_PARKED, ending=HALF_CLOSED)
        elif state == "half closed by both":
            header = header._replace(up=1000, down=1000, ending=HALF_CLOSED)
        line.write(header.encode())
        if state == "half closed by us":
            line.send_end()
        elif state == "half closed by both":
            await line.receive(header.start, header.down, end=True)
        elif state == "refreshed":
            for _ in range(3):
                line.maybe_refresh(1.0)
        self.parked += 1
        if self.parked == self.options["connections"]:
            self.all_parked.set()
        await self.released.wait()
        async with asyncio.timeout(self.options["patience"]):
            if state == "half closed by both":
                await line.send(header.start, header.up, files=False, end=True)
            else:
                end = header.ending == HALF_CLOSED
                await line.receive(header.start, header.down, end=end)
            if header.ending == ACKNOWLEDGED:
                line.write(ACK)
                await line.writer.drain()
        line.account.rounds += 1


async def main(options: dict[str, Any]) -> None:
    complaints = Complaints()
    descriptors = Descriptors()
    peers = Peers(options)
    clients = [
        asyncio.create_task(peers.client(number)) for number in range(options["connections"])
    ]
    parked = asyncio.create_task(peers.all_parked.wait())
    everybody: asyncio.Future[Any] = asyncio.gather(*clients)
    waiting: set[asyncio.Future[Any]] = {parked, everybody}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    say(parked=peers.parked, slowest=peers.slowest, counts=peers.counts)
    await read_line()
    peers.released.set()
    await asyncio.wait({everybody}, timeout=options["patience"])
    parked.cancel()
    for client in clients:
        if not client.done():
            peers.faults.append(f"a client hangs: {client!r}")
            client.cancel()
    await asyncio.gather(*clients, parked, return_exceptions=True)
    for client in clients:
        if not client.cancelled() and client.exception() is not None:
            peers.faults.append(f"{client.exception()!r}")
    del client, clients, everybody, parked, waiting
    peers.contexts.clear()
    leaks = await find_leaks(descriptors)
    say(
        accounts=peers.accounts,
        complaints=complaints.made + peers.faults,
        leaks=leaks,
        counts=peers.counts,
        slowest=peers.slowest,
    )


def new_loop(name: str) -> asyncio.AbstractEventLoop:
    """Make a loop that knows nothing of kernel TLS."""
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.SelectorEventLoop()


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    with asyncio.Runner(loop_factory=lambda: new_loop(arguments["loop"])) as runner:
        runner.run(main(arguments))
