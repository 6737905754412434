"""Everything that takes bytes of a stranger, each under a function ``(data) -> None`` that raises if an invariant does not hold.

The rules are the same everywhere: only documented exceptions escape; what comes out is bounded by what went in; and it does not matter how the bytes were cut on their way.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
import ssl
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from ktls.handshake.framing import (
    ClientHelloWatch,
    RecordFramer,
    ServerHelloWatch,
    parse_client_hello,
    split_records,
)
from ktls.handshake.keylog import SecretsUnavailableError, tap_for
from ktls.protocol.enums import AlertDescription, HandshakeType
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.messages import (
    MAX_HANDSHAKE_MESSAGE,
    HandshakeMessage,
    HandshakeReassembler,
    check_new_session_ticket,
    parse_alert,
    parse_key_update,
)
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.aead import HEADER_LENGTH, RecordProtection
from ktls.record.userspace import UserspaceReceiver
from ktls.state import ExportedState
from ktls.testing import is_key_update, made_up_keys

from ..handshake.helpers import Pki, ours_client, run, their_server
from ..record.layers import SUITES, TLS12, TLS13
from .protocol_inputs import decode
from .protocol_target import Broken, execute, require
from .scenario import Scenario, Wire
from .source import Source
from .states import example

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ("HARNESSES", "Harness")

Harness: TypeAlias = "Callable[[bytes], None]"


def pieces(data: bytes, source: Source) -> list[list[bytes]]:
    """Cut ``data`` in several ways: not at all, into bytes (if there are few), and somewhere."""
    cuts = sorted(source.below(len(data) + 1) for _ in range(source.choice((1, 2, 7))))
    edges = [0, *cuts, len(data)]
    somewhere = [data[start:end] for start, end in pairwise(edges)]
    ways = [[data], somewhere]
    if len(data) <= 2000:
        ways.append([data[place : place + 1] for place in range(len(data))])
    return ways


def same(results: Iterable[object], what: str) -> None:
    """Require that all ways gave the same."""
    first, *others = results
    require(all(other == first for other in others), what)


# --- the protocol room ---------------------------------------------------------------------------------------------


def protocol(data: bytes) -> None:
    """Operations on a connection (``protocol_inputs``); the invariants are in ``protocol_target``."""
    execute(decode(data)[:300])


def messages(data: bytes) -> None:
    """The parsers of alerts, KeyUpdates and tickets, and the reassembler: cut anywhere, the same messages or the same alert."""
    for parser in (parse_alert, parse_key_update, check_new_session_ticket):
        try:
            parser(data)
        except RemoteProtocolError as error:
            require(bool(str(error)) and not error.recoverable, "an error without a text")
    source = Source(data[:8])
    same((_reassemble(way) for way in pieces(data[8:], source)), "it matters how messages were cut")


def _reassemble(fragments: list[bytes]) -> object:
    def accept(number: int) -> HandshakeType:
        try:
            return HandshakeType(number)
        except ValueError:
            raise RemoteProtocolError("type", AlertDescription.UNEXPECTED_MESSAGE) from None

    reassembler = HandshakeReassembler(accept)
    found: list[HandshakeMessage] = []
    try:
        for fragment in fragments:
            found += reassembler.feed(fragment)
    except RemoteProtocolError as error:
        # A record with an error in it gives none of its messages: so the messages depend on the cut, the alert does not.
        return error.alert
    fed = b"".join(fragments)
    whole = b"".join(message.encode() for message in found)
    require(fed.startswith(whole), "other messages than were sent")
    require(reassembler.pending is (len(fed) > len(whole)), "bytes lost")
    require(len(fed) - len(whole) < 4 + MAX_HANDSHAKE_MESSAGE, "too much is kept")
    return found, reassembler.pending


# --- records -------------------------------------------------------------------------------------------------------


def records(data: bytes) -> None:
    """The receiver in user space, on a stream of good and bad records (``scenario``), cut anywhere, read ahead or not: the same records, the same error."""
    scenario = Scenario.from_bytes(data, key_updates=True)
    stream = b"".join(step.data for step in scenario.steps if isinstance(step, Wire))
    ways: list[tuple[list[bytes], bytes, bool]] = [
        (way, b"", exact)
        for way in pieces(stream, Source(data[-8:]))
        if len(way) < 50
        for exact in (False, True)
    ]
    ways += [
        ([], stream, False),
        ([stream[scenario.overread :]], stream[: scenario.overread], True),
    ]
    same((_receive(scenario, *way) for way in ways), "it matters how records were cut")


def _receive(scenario: Scenario, way: list[bytes], initial: bytes, exact: bool) -> object:
    """Return the records, and how it ended."""
    suite, generation = scenario.suite, 0
    found: list[tuple[int, bytes]] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        receiver = UserspaceReceiver(
            ours, suite, made_up_keys(suite, "peer"), 0, initial=initial, exact=exact
        )
        for piece in [*way, None]:
            if piece is None:
                theirs.shutdown(socket.SHUT_WR)
            else:
                theirs.sendall(piece)
            try:
                while (message := receiver.read_record()) is not None:
                    require(len(message.fragment) <= MAX_FRAGMENT, "a record that is too long")
                    found.append((int(message.content_type), message.fragment))
                    if scenario.is_tls13 and is_key_update(message):
                        generation += 1
                        receiver.install(made_up_keys(suite, "peer", generation))
            except BlockingIOError:
                continue
            except RemoteProtocolError as error:
                return found, error.alert, receiver.sequence_number()
    return found, "end", receiver.sequence_number()


def aead(data: bytes) -> None:
    """Garbage is opened by no key, refused with an alert, and not counted."""
    source = Source(data)
    suite = source.choice(SUITES)
    protection = RecordProtection(suite, made_up_keys(suite, "peer"), source.below(2**16))
    number = protection.sequence_number
    header = source.take(HEADER_LENGTH).ljust(HEADER_LENGTH, b"\0")
    body = source.rest()[: 2**15]
    refused = protection.header_error(header)
    try:
        protection.open(header, body)
    except RemoteProtocolError as error:
        require(refused is None or error.alert is refused.alert, "two opinions about a header")
    else:
        require(False, "noise was opened")
    require(protection.sequence_number == number, "refused and counted")


# --- the hand-off --------------------------------------------------------------------------------------------------


def framer(data: bytes) -> None:
    """The framer in front of the engine: nothing is lost or moved, cut anywhere, and nobody who asks ``need`` reads ahead."""
    source = Source(data[:8])
    stream = data[8:]
    same((_frame(way) for way in pieces(stream, source)), "it matters how the stream was cut")
    _read_as_needed(stream)


def _frame(way: list[bytes]) -> object:
    framer = RecordFramer()
    found: list[bytes] = []
    noise = b""
    for piece in way:
        framer.feed(piece)
        for record in framer:
            if framer.is_tls:
                found.append(record)
            else:
                noise += record
    rest = framer.take_rest()
    require(not framer.take_rest(), "the rest can be taken twice")
    require(b"".join((*found, noise, rest)) == b"".join(way), "bytes lost or moved")
    require(split_records(b"".join(found)) == found, "records are cut in two ways")
    for record in found:
        require(len(record) == HEADER_LENGTH + int.from_bytes(record[3:5], "big"), "no record")
    return found, noise, rest, framer.is_tls


def _read_as_needed(stream: bytes) -> None:
    framer, start = RecordFramer(), 0
    while start < len(stream) and framer.is_tls:
        need = framer.need()
        require(need > 0, "nothing is needed, and no record comes")
        framer.feed(stream[start : start + need])
        start += need
        taken = list(framer)
        require(len(taken) <= 1, "more than was needed")
        if taken and framer.is_tls:
            require(not framer.take_rest(), "read ahead")


def hello(data: bytes) -> None:
    """What the hellos say in the clear: nothing raises, and it does not matter over how many records a hello was spread."""
    parsed = parse_client_hello(data)
    if parsed is not None:
        name = parsed.server_name
        require(len(parsed.random) == 32, "a random of another length")
        require(name is None or (name.isascii() and name.isprintable()), "a name for a log")
        require(parsed.max_fragment_length in (None, 512, 1024, 2048, 4096), "fragment length")
    source = Source(data[:8])
    results = []
    for way in pieces(data[8:], source):
        client, server = ClientHelloWatch(), ServerHelloWatch()
        for fragment in way:
            for start in range(0, len(fragment), MAX_FRAGMENT):
                piece = fragment[start : start + MAX_FRAGMENT]
                record = b"\x16\x03\x03" + len(piece).to_bytes(2, "big") + piece
                client.see(record)
                server.see(record)
        require(server.random is None or len(server.random) == 32, "a random of another length")
        results.append((client.hello, server.random))
    same(results, "it matters how a hello was cut")
    for watch in (ClientHelloWatch(), ServerHelloWatch()):
        watch.see(data)


_LABELS: Final = (
    *(b"CLIENT_RANDOM", b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0"),
    b"EXPORTER_SECRET",
)
_LINE: Final = re.compile(rb"(%b) ([0-9a-fA-F]{64}) ((?:[0-9a-fA-F]{2})+)" % b"|".join(_LABELS))
_EXPECTED: Final = bytes(range(32))


def keylog(data: bytes) -> None:
    """The reader of the key log: torn lines, other people's, noise. Ours are found, wherever the writes were cut, and nothing stays behind."""
    source = Source(data[:8])
    log = _with_lines(data[8:])
    same((_tap(way) for way in pieces(log, source) if len(way) < 50), "it matters how lines came")


def _with_lines(data: bytes) -> bytes:
    """Make lines out of the shorthand ``@`` and a byte, so that mutation meets them often."""
    label_and_rest = [
        label + b" " + random.hex().encode() + b" " + secret.hex().encode() + ending
        for label in _LABELS
        for random in (_EXPECTED, bytes(32))
        for secret in (b"\x11" * 32, b"\x22" * 48, b"")
        for ending in (b"\n", b"")
    ]
    first, *others = data.split(b"@")
    return first + b"".join(
        label_and_rest[(other[0] if other else 0) % len(label_and_rest)] + other[1:]
        for other in others
    )


def _tap(way: list[bytes]) -> object:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with tempfile.NamedTemporaryFile() as users:
        context.keylog_filename = users.name
        tap = tap_for(context)
        path = Path(context.keylog_filename)
        users_start = len(Path(users.name).read_bytes())  # the ssl module writes a comment there
        expected, bystander = tap.expect(_EXPECTED), tap.expect(b"\xff" * 32)
        with open(path, "ab", buffering=0) as writer:
            start = os.fstat(writer.fileno()).st_size
            for piece in way:
                writer.write(piece)
                tap.forget(tap.expect(os.urandom(32)))  # makes it read what is new
        try:
            secrets: object = tap.collect(expected)
        except SecretsUnavailableError as error:
            secrets = str(error)
        require(tap.collect(bystander) == {}, "the secrets of somebody else")
        _check_secrets(b"".join(way), secrets)
        left = path.read_bytes()[start:]
        *whole, torn = b"".join(way).split(b"\n")
        require(left.strip(b"\0") == torn.strip(b"\0"), "lines stay in memory")
        copied = Path(users.name).read_bytes()[users_start:]
        wanted = [line for line in whole if line and line[:1] != b"#"]
        require([line for line in copied.split(b"\n") if line] == wanted, "the user's own key log")
        return secrets, copied


def _check_secrets(log: bytes, secrets: object) -> None:
    """Every well-formed line of ours has to be found; if two contradict each other nothing may be."""
    wanted: dict[str, bytes] = {}
    contradicted = False
    for line in log.split(b"\n")[:-1]:
        match = _LINE.fullmatch(line)
        if match is not None and bytes.fromhex(match[2].decode()) == _EXPECTED:
            secret = bytes.fromhex(match[3].decode())
            contradicted |= wanted.setdefault(match[1].decode(), secret) != secret
    if contradicted:
        require(isinstance(secrets, str), "secrets although a label came with two values")
    elif isinstance(secrets, dict):
        require(wanted == secrets, "other secrets than there are whole lines for")


@functools.cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    pki = Pki()
    return pki.client(ssl.TLSVersion.TLSv1_3), pki.server(ssl.TLSVersion.TLSv1_3)


def tickets(data: bytes) -> None:
    """Tickets whose syntax is good, given back to a client's engine: it takes one, or refuses it with an alert and is closed. The input is the ticket's body."""
    try:
        check_new_session_ticket(data)
    except RemoteProtocolError:
        return
    for_client, for_server = _contexts()
    client, server = ours_client(for_client), their_server(for_server)
    run(client, server)
    relay = client.result().tickets
    if relay is None:
        raise Broken("no relay")
    try:
        relay.feed(HandshakeMessage(HandshakeType.NEW_SESSION_TICKET, data).encode())
    except RemoteProtocolError as error:
        require(relay.closed and relay.tickets == 0, f"refused ({error}) and open")
    else:
        require(relay.tickets == 1 and relay.has_ticket and not relay.closed, "taken and not there")
        relay.ratchet()
        require(not relay.closed and relay.generation == 1, "no more to be used")
    _ = relay.session
    relay.close()


# --- a connection's state ------------------------------------------------------------------------------------------


_JSON: Final = (b"0", b"-1", b"1e999", b"null", b"true", b"[]", b"{}", b'"', b",", b"}", b"9" * 20)


def state(data: bytes) -> None:
    """A state that was damaged, but has the right digest: it is refused by ``ValueError``, or goes through as it is. The input says what is changed."""
    source = Source(data)
    parts = example(source.choice((TLS13, TLS12)))
    text, rest = bytearray(parts.text), bytearray(parts.rest)
    while source:
        changed = rest if source.chance(20) else text
        place = source.below(2**16) % (len(changed) + 1)
        removed = source.choice((0, 1, 1, 2, 8, 40))
        changed[place : place + removed] = source.choice(
            (b"", source.take(1), source.choice(_JSON))
        )
    body = parts.join(bytes(text), bytes(rest))
    untouched = text == parts.text and rest == parts.rest
    for candidate, good in (
        (data, False),
        (body, False),
        (body + hashlib.sha256(body).digest(), untouched),
    ):
        try:
            exported = ExportedState.from_bytes(candidate)
        except ValueError:
            require(not good, "a good state is refused")
            continue
        again = ExportedState.from_bytes(exported.to_bytes())
        require(again.snapshot == exported.snapshot, "a state changes on its way")


HARNESSES: Final[dict[str, Harness]] = {
    function.__name__: function
    for function in (aead, framer, hello, keylog, messages, protocol, records, state, tickets)
}
