"""A scripted peer for one end of a connection, and the sockets, secrets and waiting that such tests need.

``RecordPeer`` speaks records over a real TCP socket: it can say anything, at any time, also what no honest peer would say, and it opens
what comes with the keys that it was given. It is independent of the record layers: all it shares with them is ``RecordProtection``.

Nothing here waits for ever: sockets get SO_RCVTIMEO and SO_SNDTIMEO (a Python timeout would poll first, and hide what the layers under test do).
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, final

from ktls.protocol.enums import AlertDescription, ContentType, KeyUpdateRequest, ProtocolVersion
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret
from ktls.protocol.messages import build_alert, build_key_update
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite
from ktls.record.aead import HEADER_LENGTH, RecordProtection

__all__ = (
    "PATIENCE",
    "RecordPeer",
    "eventually",
    "fill_up",
    "halve_send_buffer",
    "is_key_update",
    "loopback_pair",
    "made_up_keys",
    "made_up_secret",
    "pattern",
    "turns",
    "wait_readable",
    "wait_writable",
)

#: Seconds after which waiting is a failure.
PATIENCE: Final = 20.0
_TICK: Final = 0.001
#: Seconds that TCP may need to move bytes from one buffer to the other.
_MOVING: Final = 0.05
#: The last made-up secret of each name: a thousand generations one after the other are not all made from the first.
_made: Final[dict[tuple[CipherSuite, str], TrafficSecret]] = {}


def made_up_secret(suite: CipherSuite, name: str, generation: int = 0) -> TrafficSecret:
    """Return the traffic secret of ``generation`` (TLS 1.3) that begins with the made-up one called ``name``."""
    secret = _made.get((suite, name))
    if secret is None or secret.generation > generation:
        first = hashlib.new(suite.hash_name, b"ktls test secret " + name.encode()).digest()
        secret = TrafficSecret(suite, first)
    while secret.generation < generation:
        secret = secret.next()
    _made[suite, name] = secret
    return secret


def made_up_keys(suite: CipherSuite, name: str, generation: int = 0) -> TrafficKeys:
    """Return made-up keys for ``suite``, of either version. TLS 1.2 knows generation 0 only."""
    if suite.version is ProtocolVersion.TLSv1_3:
        return made_up_secret(suite, name, generation).keys()
    if generation:
        raise ValueError("TLS 1.2 has one generation of keys")
    stream = hashlib.sha512(b"ktls test keys " + name.encode()).digest()
    aead = suite.aead
    iv_end = aead.key_length + aead.fixed_iv_length
    explicit = (
        int.from_bytes(stream[iv_end : iv_end + 8], "big") if aead.fixed_iv_length == 4 else 0
    )
    return TrafficKeys(stream[: aead.key_length], stream[aead.key_length : iv_end], explicit)


@contextlib.contextmanager
def loopback_pair(
    *, sndbuf: int | None = None, rcvbuf: int | None = None
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give two connected blocking TCP sockets on the loopback interface, whose operations fail with EAGAIN after ``PATIENCE`` seconds.

    ``sndbuf`` and ``rcvbuf`` set the buffers of both before they connect (small ones fill quickly). Both are closed at the end, if they are still open.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        left = stack.enter_context(socket.socket())
        for sock in (listener, left):
            _set_buffers(sock, sndbuf, rcvbuf)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        left.connect(listener.getsockname())
        right, address = listener.accept()
        stack.enter_context(right)
        if address != left.getsockname():
            raise ConnectionError(f"{address} is a stranger")
        for sock in (left, right):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(PATIENCE), 0))
        yield left, right


def _set_buffers(sock: socket.socket, sndbuf: int | None, rcvbuf: int | None) -> None:
    for option, size in ((socket.SO_SNDBUF, sndbuf), (socket.SO_RCVBUF, rcvbuf)):
        if size is not None:
            sock.setsockopt(socket.SOL_SOCKET, option, size)


def pattern(size: int, start: int = 0) -> bytes:
    """Return ``size`` bytes that repeat only after 251, so that a lost, repeated or moved record shows."""
    first = start % 251
    cycle = bytes(range(251))
    return (cycle * ((first + size) // 251 + 1))[first : first + size]


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until ``condition`` holds. For what has no event to wait for, such as an acknowledgement of TCP."""
    pause = threading.Event()
    for _ in turns(what):
        if condition():
            return
        pause.wait(_TICK)


def turns(what: str) -> Iterator[None]:
    """Go on for as long as patience lasts; then raise ``AssertionError``. For loops that do something in each turn."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        yield
    raise AssertionError(f"not within {PATIENCE:g} s: {what}")


def wait_readable(sock: socket.socket, patience: float | None = None) -> bool:
    """Wait until ``poll`` says that ``sock`` is readable or has failed; False if it does not within ``patience`` seconds."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll((PATIENCE if patience is None else patience) * 1000))


def wait_writable(sock: socket.socket, patience: float = _MOVING) -> bool:
    """Wait until there is room to send; False if none appears within ``patience`` seconds. A moment is enough where the peer reads nothing."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    return bool(poller.poll(patience * 1000))


def fill_up(send: Callable[[], int], sock: socket.socket) -> int:
    """Call ``send`` until it would block, and no room appears for a moment; return the sum. Afterwards SO_SNDBUF is half of what it was.

    TCP goes on probing the closed window, and may move a little at any time later. With twice as much queued as may be, that makes no room.
    """
    total = 0
    for _ in turns("send says that it would block"):
        try:
            total += send()
        except BlockingIOError:
            if not wait_writable(sock):
                break
    halve_send_buffer(sock)
    return total


def halve_send_buffer(sock: socket.socket) -> None:
    """Allow half as much to be queued for sending. What is queued already stays."""
    size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size // 4)  # the kernel doubles it


@final
class RecordPeer:
    """The other end: seals and opens any record on ``sock``.

    ``tx_name`` and ``rx_name`` are the names of made-up secrets, seen from this peer: what it sends with, what it receives with.
    ``tx`` and ``rx`` are the ``RecordProtection`` at work; tests may replace them.
    """

    def __init__(
        self,
        sock: socket.socket,
        suite: CipherSuite,
        *,
        tx_name: str = "peer",
        rx_name: str = "us",
        tx_sequence_number: int = 0,
        rx_sequence_number: int = 0,
    ) -> None:
        self.sock = sock
        self.suite = suite
        self.tx_generation = 0
        self.rx_generation = 0
        self._names = tx_name, rx_name
        self.tx = RecordProtection(suite, made_up_keys(suite, tx_name), tx_sequence_number)
        self.rx = RecordProtection(suite, made_up_keys(suite, rx_name), rx_sequence_number)
        self._buffer = bytearray()

    def __repr__(self) -> str:
        return f"<RecordPeer {self.suite.name} tx={self.tx_generation} rx={self.rx_generation}>"

    # --- sending -----------------------------------------------------------------------------------------------

    def seal(self, content_type: int, fragment: bytes, padding: int = 0) -> bytes:
        """Return one record and count it, without sending it."""
        return self.tx.seal(content_type, fragment, padding)

    def seal_data(self, data: bytes) -> bytes:
        """Return ``data`` as records of 2^14 bytes and a rest."""
        pieces = range(0, len(data), MAX_FRAGMENT)
        return b"".join(
            self.seal(ContentType.APPLICATION_DATA, data[start : start + MAX_FRAGMENT])
            for start in pieces
        )

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def send_data(self, data: bytes) -> None:
        """Send application data."""
        self.send_raw(self.seal_data(data))

    def send_record(self, content_type: int, fragment: bytes, padding: int = 0) -> None:
        """Send one record."""
        self.send_raw(self.seal(content_type, fragment, padding))

    def seal_key_update(self, request: bool = False) -> bytes:
        """Return a KeyUpdate record, and go on with the next key."""
        message = build_key_update(KeyUpdateRequest(int(request)))
        record = self.seal(ContentType.HANDSHAKE, message)
        self.next_tx_key()
        return record

    def send_key_update(self, request: bool = False) -> None:
        """Send a KeyUpdate, and go on with the next key."""
        self.send_raw(self.seal_key_update(request))

    def send_alert(self, description: AlertDescription = AlertDescription.CLOSE_NOTIFY) -> None:
        """Send an alert: close_notify, if no other is named."""
        self.send_record(ContentType.ALERT, build_alert(description))

    def next_tx_key(self) -> None:
        """Seal everything from here on with the next generation."""
        self.tx_generation += 1
        self.tx = RecordProtection(
            self.suite, made_up_keys(self.suite, self._names[0], self.tx_generation)
        )

    def next_rx_key(self) -> None:
        """Open everything from here on with the next generation."""
        self.rx_generation += 1
        self.rx = RecordProtection(
            self.suite, made_up_keys(self.suite, self._names[1], self.rx_generation)
        )

    # --- receiving ---------------------------------------------------------------------------------------------

    def pull(self) -> bool:
        """Read what has come so far, without waiting; False at the end of the TCP stream."""
        while True:
            try:
                data = self.sock.recv(256 * 1024, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._buffer += data

    def next_record(self) -> InboundPlainMessage | None:
        """Open the next record if it was pulled wholly; None if not. A KeyUpdate is opened and nothing more: see ``next_rx_key``."""
        if len(self._buffer) < HEADER_LENGTH:
            return None
        end = HEADER_LENGTH + int.from_bytes(self._buffer[3:HEADER_LENGTH], "big")
        if len(self._buffer) < end:
            return None
        record = bytes(self._buffer[:end])
        del self._buffer[:end]
        return self.rx.open(record[:HEADER_LENGTH], record[HEADER_LENGTH:])

    def read_record(self) -> InboundPlainMessage | None:
        """Wait for the next record and open it; None at the end of the TCP stream. ``BlockingIOError`` if nothing comes."""
        while (message := self.next_record()) is None:
            data = self.sock.recv(256 * 1024)
            if not data:
                if self._buffer:
                    raise ConnectionError(
                        f"TCP ended inside a record, {len(self._buffer)} bytes in"
                    )
                return None
            self._buffer += data
        return message

    def read_message(self) -> InboundPlainMessage | None:
        """As ``read_record``, and follow the keys: after a KeyUpdate everything is opened with the next one."""
        message = self.read_record()
        if message is not None and is_key_update(message):
            self.next_rx_key()
        return message

    def read_data(self, size: int) -> bytes:
        """Wait for ``size`` bytes of application data and follow the keys; other records than KeyUpdates are an error."""
        data = bytearray()
        while len(data) < size:
            message = self.read_message()
            if message is None:
                raise ConnectionError(f"TCP ended after {len(data)} of {size} bytes")
            if message.content_type == ContentType.APPLICATION_DATA:
                data += message.fragment
            elif not is_key_update(message):
                raise ConnectionError(f"a record of type {message.content_type} amid the data")
        return bytes(data)

    def read_all(self) -> tuple[list[InboundPlainMessage], bool]:
        """Read to the end of the TCP stream and follow the keys; return the records, and whether the last one was whole."""
        messages = []
        try:
            while (message := self.read_message()) is not None:
                messages.append(message)
        except ConnectionError:
            return messages, False
        return messages, True

    # --- ending ------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """End our side of the TCP stream, as it is."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Reset the TCP connection."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self.sock.close()


def is_key_update(message: InboundPlainMessage) -> bool:
    """Whether ``message`` is a whole KeyUpdate."""
    known = {build_key_update(request) for request in KeyUpdateRequest}
    return message.content_type == ContentType.HANDSHAKE and message.fragment in known
