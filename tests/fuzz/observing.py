"""One scenario over one record layer, on real sockets, and what came of it, as far as anybody outside can see."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from ktls.protocol.connection import KernelConnection
from ktls.protocol.errors import AlertReceived, KTLSError, RemoteProtocolError
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.catchup import CatchUpReceiver
from ktls.record.driver import Driver
from ktls.record.kernel import attach
from ktls.testing import (
    RecordPeer,
    eventually,
    loopback_pair,
    made_up_keys,
    made_up_secret,
    pattern,
)

from ..record import layers
from .scenario import Action, Scenario, Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktls.record.interface import ReadBuffer, RecordReceiver, RecordSender

__all__ = ("LAYERS", "Layer", "Observation", "observe")

Layer: TypeAlias = Literal["userspace", "kernel", "catch-up"]
LAYERS: Final[tuple[Layer, ...]] = ("userspace", "kernel", "catch-up")

_NO_WAIT: Final = socket.MSG_DONTWAIT
#: Enough for all that a peer sends to one who does not read.
_RECEIVE_BUFFER: Final = 2**20
#: struct tcp_info of linux/tcp.h: tcpi_state, and tcpi_bytes_received.
_STATE: Final = 0
_BYTES_RECEIVED: Final = 128
_ESTABLISHED: Final = 1
_FILE_SIZE: Final = 40_000


@dataclass(frozen=True)
class Observation:
    """What one layer made of a scenario. ``end``, ``again`` and ``outcomes`` are errors by name, see ``name_of``."""

    end: str
    again: str
    data: bytes = field(repr=False)
    tickets: tuple[bytes, ...]
    outcomes: tuple[str, ...]
    #: What the peer got: generation, content type, fragment.
    sent: tuple[tuple[int, int, bytes], ...] = field(repr=False)
    #: In which step the end was met.
    ended_in: int
    states: tuple[str, str]
    generations: tuple[int, int]
    #: Records opened under the last key, if nothing failed.
    opened: int | None
    pending: int

    def __str__(self) -> str:
        records = ", ".join(
            f"{generation}:{content_type}:{len(fragment)}"
            + ("" if content_type == 23 else f"={fragment[:8].hex()}")
            for generation, content_type, fragment in self.sent
        )
        return (
            f"end {self.end} in step {self.ended_in}, then {self.again}; {len(self.data)} bytes, {len(self.tickets)} tickets;"
            f" outcomes {self.outcomes}; states {self.states}, generations {self.generations},"
            f" {self.opened} opened, {self.pending} pending; sent {records}"
        )


def name_of(error: OSError) -> str:
    """Name an error by all that a caller may rely on."""
    if isinstance(error, RemoteProtocolError):
        return f"alert {error.alert.name}"
    if isinstance(error, AlertReceived):
        return f"received {int(error.description)}"
    if isinstance(error, KTLSError):
        return type(error).__name__
    return errno.errorcode.get(error.errno or 0, repr(error))


def observe(scenario: Scenario, layer: Layer) -> Observation:
    """Run ``scenario`` over ``layer``."""
    with contextlib.ExitStack() as stack:
        sock, theirs = stack.enter_context(loopback_pair(rcvbuf=_RECEIVE_BUFFER))
        return _Run(scenario, layer, sock, theirs, stack).run()


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        layer: Layer,
        sock: socket.socket,
        theirs: socket.socket,
        stack: contextlib.ExitStack,
    ) -> None:
        self._scenario = scenario
        self._sock = sock
        sock.setblocking(False)
        self._peer = RecordPeer(theirs, scenario.suite)
        self._steps = list(scenario.steps)
        self._tickets: list[bytes] = []
        self._data = bytearray()
        self._outcomes: list[str] = []
        self._sent: list[tuple[int, int, bytes]] = []
        self._end: str | None = None
        self._ended_in = -1
        self._on_wire = 0
        self._buffer = memoryview(bytearray(scenario.buffer))
        self._pipe: tuple[int, int] | None = None
        if scenario.reading == "splice" and layer == "kernel":
            self._pipe = os.pipe()
            for end in self._pipe:
                stack.callback(os.close, end)
        self._file = os.memfd_create("fuzz")
        stack.callback(os.close, self._file)
        os.write(self._file, pattern(_FILE_SIZE))
        self._driver = self._make_driver(layer)

    def _make_driver(self, layer: Layer) -> Driver:
        scenario, sock, suite = self._scenario, self._sock, self._scenario.suite
        theirs = made_up_keys(suite, "peer")
        sender: RecordSender
        receiver: RecordReceiver
        if layer == "userspace":
            sender = layers.userspace_sender(
                sock, suite, made_up_keys(suite, "us"), 0, MAX_FRAGMENT
            )
            receiver = layers.userspace_receiver(sock, suite, theirs, 0)
        else:
            sender = layers.kernel_sender(sock, suite, made_up_keys(suite, "us"), 0, MAX_FRAGMENT)
            receiver = (
                layers.kernel_receiver(sock, suite, theirs, 0)
                if layer == "kernel"
                else self._catch_up()
            )
        connection = KernelConnection(
            scenario.role,
            suite,
            tx_secret=made_up_secret(suite, "us") if scenario.is_tls13 else None,
            rx_secret=made_up_secret(suite, "peer") if scenario.is_tls13 else None,
            limits=scenario.limits,
            tx_key_can_change=scenario.is_tls13 and (layer == "userspace" or sender.can_change_key),
        )
        return Driver(
            connection,
            sender,
            receiver,
            on_ticket=self._tickets.append,
            clock=lambda: 0.0,
            lock=threading.RLock() if scenario.reading == "loop" else None,
        )

    def _catch_up(self) -> CatchUpReceiver:
        """What was read past the handshake is not sent any more."""
        suite, initial = self._scenario.suite, b""
        if self._steps and isinstance(first := self._steps[0], Wire):
            initial = first.data[: self._scenario.overread]
            self._steps[0] = Wire(first.data[len(initial) :], first.what)
        attach(self._sock)
        return CatchUpReceiver(
            self._sock,
            suite,
            made_up_keys(suite, "peer"),
            0,
            initial,
            can_change_key=layers.can_rekey(suite),
        )

    def run(self) -> Observation:
        for number, step in enumerate(self._steps):
            if isinstance(step, Wire):
                self._peer.send_raw(step.data)
                self._on_wire += len(step.data)
                eventually(
                    lambda: self._info("=Q", _BYTES_RECEIVED) >= self._on_wire, "all bytes arrive"
                )
            else:
                self._outcomes.append(self._attempt(self._action(step)))
            self._read(number)
        self._end_of_peer()
        self._read(len(self._steps))
        return self._conclude()

    def _info(self, layout: str, offset: int) -> int:
        size = struct.calcsize(layout)
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, offset + size)
        value: int = struct.unpack_from(layout, info, offset)[0]
        return value

    # --- reading -----------------------------------------------------------------------------------------------

    def _read(self, step: int) -> None:
        """Read all that is there."""
        if self._end is not None:
            return
        try:
            for piece in self._pieces():
                if not piece:
                    self._end = "closed"
                    break
                self._data += piece
        except OSError as error:
            self._end = name_of(error)
        if self._end is not None:
            self._ended_in = step

    def _pieces(self) -> Iterator[bytes]:
        """Give piece after piece until there is nothing for now; b"" at the end."""
        while True:
            count = self._look()
            if count < 0:
                self._driver.settle(read_ahead=self._scenario.reading == "loop")
                count = self._look()
                if count < 0:
                    return
            yield bytes(self._buffer[:count])

    def _look(self) -> int:
        driver, buffer = self._driver, self._buffer
        if self._scenario.reading == "loop":
            return driver.receiving.read_now(buffer)
        try:
            if self._pipe is not None and not driver.receiving.pending():
                moved = driver.splice(self._pipe[1], len(buffer))
                return os.readv(self._pipe[0], [buffer[:moved]]) if moved else 0
            return driver.recv_into(buffer, 0, _NO_WAIT)
        except BlockingIOError:
            return -1

    # --- acting ------------------------------------------------------------------------------------------------

    def _attempt(self, action: Callable[[], object]) -> str:
        """Do something until it does not have to wait any more; meanwhile the peer reads."""
        for _ in range(10_000):
            try:
                action()
            except BlockingIOError:
                self._peer.pull()
            except OSError as error:
                return name_of(error)
            else:
                return "done"
        raise AssertionError("there is never any room")

    def _action(self, step: Action) -> Callable[[], object]:
        driver = self._driver
        match step.name:
            case "refresh" | "request":
                return lambda: driver.refresh_traffic_keys(step.name == "request", _NO_WAIT)
            case "close":
                return lambda: driver.close_notify(_NO_WAIT)
            case "sendfile":
                return self._all(
                    step.size, lambda start, end: driver.sendfile(self._file, start, end - start)
                )
            case "send":
                data = pattern(step.size)
                return self._all(
                    step.size, lambda start, end: driver.send(data[start:end], _NO_WAIT)
                )
        data = pattern(step.size)

        def vector(start: int, end: int) -> int:
            middle = (start + end) // 2
            pieces: list[ReadBuffer] = (
                [data[start:middle], data[middle:end]] if middle > start else [data[start:end]]
            )
            return driver.send_vector(pieces, _NO_WAIT)

        return self._all(step.size, vector)

    @staticmethod
    def _all(size: int, attempt: Callable[[int, int], int]) -> Callable[[], object]:
        done = 0

        def go_on() -> None:
            nonlocal done
            while done < size:
                done += attempt(done, size)

        return go_on

    # --- ending ------------------------------------------------------------------------------------------------

    def _end_of_peer(self) -> None:
        if self._scenario.ending == "fin":
            self._peer.end()
        else:
            # What we said before has to have arrived, or the reset takes it away.
            self._attempt(lambda: self._driver.flush(_NO_WAIT))
            self._peer.pull()
            self._collect()
            self._peer.reset()
        eventually(lambda: self._info("=B", _STATE) != _ESTABLISHED, "the peer's end arrives")

    def _collect(self) -> None:
        while (message := self._peer.next_record()) is not None:
            self._sent.append(
                (self._peer.rx_generation, int(message.content_type), message.fragment)
            )
            if message.content_type == 22:
                self._peer.next_rx_key()

    def _conclude(self) -> Observation:
        driver, connection = self._driver, self._driver.connection
        if self._end is None:
            raise AssertionError("no end although TCP has ended")
        states = connection.tx_state.value, connection.rx_state.value
        generations = connection.tx_generation, connection.rx_generation
        pending = driver.pending()
        try:
            again = "closed" if self._look() == 0 else "more"
        except OSError as error:
            again = name_of(error)
        opened = None
        if self._end in ("closed", "TruncatedError"):
            opened = driver.key_usage().rx.records
        self._outcomes.append(self._attempt(lambda: driver.send(b"after the end", _NO_WAIT)))
        self._outcomes.append(self._attempt(lambda: driver.close_notify(_NO_WAIT)))
        if self._scenario.ending == "fin":
            self._outcomes.append(self._attempt(lambda: driver.flush(_NO_WAIT)))
            self._sock.shutdown(socket.SHUT_WR)
            eventually(lambda: not self._peer.pull(), "our end arrives")
            self._collect()
        return Observation(
            end=self._end,
            again=again,
            data=bytes(self._data),
            tickets=tuple(self._tickets),
            outcomes=tuple(self._outcomes),
            sent=tuple(self._sent),
            ended_in=self._ended_in,
            states=states,
            generations=generations,
            opened=opened,
            pending=pending,
        )
