"""What every ``RecordSender`` has to do: one function a rule, named after it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from typing import Final

from ktls.protocol.enums import ContentType
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.interface import ReadBuffer, RecordSender

from .bench import (
    DATA,
    RESET_ERRNOS,
    SIZES,
    Bench,
    Case,
    deliver,
    error_of,
    expect,
    fill,
    flushed,
    reset_noticed,
)
from .peers import RecordPeer, eventually, made_up_keys, pattern, turns, wait_readable

__all__ = (
    "SENDER_CASES",
    "SENDER_REKEY_CASES",
    "a_vector_is_one_piece",
    "any_bytes_like_object_is_sent",
    "bad_file_is_no_harm",
    "control_records_go_out_whole_and_in_order",
    "counting_goes_on_from_the_first_number",
    "data_of_any_size_arrives",
    "dead_after_a_reset",
    "dead_after_the_peer_closed",
    "flush_is_true_only_when_everything_is_out",
    "install_leaves_accepted_records_alone",
    "install_restarts_the_numbers",
    "max_fragment_is_respected",
    "no_data_is_no_record",
    "records_are_full",
    "repr_shows_no_key",
    "sendfile_sends_what_is_asked",
    "sendfile_stops_where_there_is_no_room",
    "would_block_takes_nothing",
)

_ALERT: Final = ContentType.ALERT
_HANDSHAKE: Final = ContentType.HANDSHAKE
_NO_WAIT: Final = socket.MSG_DONTWAIT


def data_of_any_size_arrives(bench: Bench) -> None:
    for size in SIZES:
        with bench.sending() as (sender, peer, _):
            expect(deliver(sender, peer, pattern(size)) == pattern(size), f"{size} bytes changed")
            expect(
                sender.sequence_number() == peer.rx.sequence_number,
                f"{sender.sequence_number()} records counted, {peer.rx.sequence_number} came",
            )


def any_bytes_like_object_is_sent(bench: Bench) -> None:
    with bench.sending() as (sender, peer, _):
        for data in (b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4]):
            expect(sender.send(data) == 3, "3 bytes fit")
            expect(peer.read_data(3) == b"abc", "the bytes changed")


def a_vector_is_one_piece(bench: Bench) -> None:
    pieces: list[ReadBuffer] = [b"one", bytearray(b"two"), memoryview(b"xthreex")[1:6]]
    with bench.sending() as (sender, peer, _):
        expect(sender.send_vector(pieces) == 11, "11 bytes fit")
        expect(_fragment(peer, DATA) == b"onetwothree", "the pieces do not share a record")
    many: list[ReadBuffer] = [bytes((number % 256,)) * 20 for number in range(2000)]
    with bench.sending() as (sender, peer, _):
        accepted = sender.send_vector(many)
        expect(accepted > 1000, f"only {accepted} bytes of 2,000 pieces were sent")
        expect(peer.read_data(accepted) == b"".join(many)[:accepted], "the bytes changed")
        expect(sender.sequence_number() == peer.rx.sequence_number, "records are not counted")


def no_data_is_no_record(bench: Bench) -> None:
    with bench.sending() as (sender, _, _):
        expect(sender.send(b"") == 0, "0 bytes were sent")
        expect(sender.sequence_number() == 0, "an empty record was made")


def records_are_full(bench: Bench) -> None:
    with bench.sending() as (sender, peer, _):
        expect(sender.send(bytes(2 * MAX_FRAGMENT + 5)) == 2 * MAX_FRAGMENT + 5, "it fits")
        lengths = [_fragment(peer, DATA) for _ in range(3)]
        expect([*map(len, lengths)] == [MAX_FRAGMENT, MAX_FRAGMENT, 5], f"lengths {lengths}")


def control_records_go_out_whole_and_in_order(bench: Bench) -> None:
    with bench.sending() as (sender, peer, _):
        sender.send(b"one")
        sender.send_record(_ALERT, b"\x01\x5a")
        sender.send(b"two")
        sender.send_record(_HANDSHAKE, pattern(MAX_FRAGMENT))
        expected = [
            (DATA, b"one"),
            (_ALERT, b"\x01\x5a"),
            (DATA, b"two"),
            (_HANDSHAKE, pattern(MAX_FRAGMENT)),
        ]
        for content_type, fragment in expected:
            expect(
                peer.read_record() == InboundPlainMessage(content_type, fragment),
                f"the record of type {content_type.name} did not come, or not in its place",
            )
        expect(sender.sequence_number() == 4, "4 records were sent")


def counting_goes_on_from_the_first_number(bench: Bench) -> None:
    with bench.sending(sequence_number=7) as (sender, peer, _):
        expect(sender.sequence_number() == 7, "it begins at 7")
        sender.send(b"x")
        expect(peer.read_data(1) == b"x", "the byte changed")
        expect(sender.sequence_number() == 8, "one record was sent")


def max_fragment_is_respected(bench: Bench) -> None:
    if not bench.limits_fragments:
        return
    with bench.sending(max_fragment=512) as (sender, peer, _):
        expect(sender.max_fragment == 512, f"max_fragment is {sender.max_fragment}")
        sender.send(pattern(1200))
        with _file(pattern(1200)) as file:
            sender.sendfile(file.fileno(), 0, 1200)
        lengths = [len(_fragment(peer, DATA)) for _ in range(6)]
        expect(lengths == [512, 512, 176] * 2, f"lengths {lengths}")


def would_block_takes_nothing(bench: Bench) -> None:
    with bench.sending(small=True) as (sender, peer, sock):
        expected = bytearray(fill(sender, sock))
        attempts: dict[bytes, Callable[[], object]] = {
            b"x": lambda: sender.send(b"x", _NO_WAIT),
            b"!": lambda: sender.send_record(_ALERT, b"\x01\x5a", _NO_WAIT),
            b"": lambda: sender.flush(_NO_WAIT),
        }
        refused = set()
        for _ in turns("everything is refused once"):
            for sign, attempt in attempts.items():
                number = sender.sequence_number()
                try:
                    attempt()
                except BlockingIOError:
                    expect(sender.sequence_number() == number, "a record was sealed all the same")
                    refused.add(sign)
                else:
                    expected += sign
            if len(refused) == len(attempts):
                break
            expected += bytes(fill(sender, sock))
        # Retried once there is room, everything is there, once and in order.
        todo = [b"!", b"x"]
        expected += b"!x"
        stream = bytearray()
        for _ in turns("everything arrived"):
            peer.pull()
            while (message := peer.next_record()) is not None:
                stream += message.fragment if message.content_type == DATA else b"!"
            try:
                if todo:
                    attempts[todo[0]]()
                    todo.pop(0)
                else:
                    sender.flush(_NO_WAIT)
            except BlockingIOError:
                continue
            if len(stream) == len(expected):
                break
        expect(stream == expected, "lost, repeated or out of order")
        expect(sender.sequence_number() == peer.rx.sequence_number, "counted wrong")


def flush_is_true_only_when_everything_is_out(bench: Bench) -> None:
    with bench.sending(small=True) as (sender, peer, sock):
        accepted = fill(sender, sock)
        for _ in turns("flush blocks, although nothing is read"):
            if not flushed(sender):
                break
            accepted += fill(sender, sock)  # TCP took the rest after all
        arrived = bytearray()
        # What is not in this process goes out by itself.
        while not sender.unsent and len(arrived) < accepted:
            expect(wait_readable(peer.sock), "accepted data did not go out by itself")
            _grown(peer, arrived)
        for _ in turns("everything arrived"):
            if _grown(peer, arrived) == accepted:
                break
            flushed(sender)
        eventually(lambda: flushed(sender), "everything arrived, but flush still blocks")
        expect(not sender.unsent, "flushed, but something is left")


def sendfile_sends_what_is_asked(bench: Bench) -> None:
    content = pattern(3 * MAX_FRAGMENT + 100)
    with bench.sending() as (sender, peer, _), _file(content) as file:
        fd = file.fileno()
        for offset, count, expected in (
            (0, 10, content[:10]),
            (5, MAX_FRAGMENT, content[5 : 5 + MAX_FRAGMENT]),
            (len(content) - 7, 1000, content[-7:]),
            (0, len(content), content),
        ):
            sent = sender.sendfile(fd, offset, count)
            expect(sent == len(expected), f"{sent} of {len(expected)} bytes")
            expect(peer.read_data(sent) == expected, "the bytes changed")
        number = sender.sequence_number()
        for offset in (len(content), len(content) + 1):
            expect(sender.sendfile(fd, offset, 10) == 0, "0 is the end of the file")
        expect(sender.sequence_number() == number == peer.rx.sequence_number, "counted wrong")


def sendfile_stops_where_there_is_no_room(bench: Bench) -> None:
    content = pattern(2**20)
    with bench.sending(small=True) as (sender, peer, sock), _file(content) as file:
        sock.setblocking(False)
        offset = 0
        arrived = bytearray()
        for _ in turns("the whole file sent"):
            if offset == len(content):
                break
            try:
                offset += sender.sendfile(file.fileno(), offset, len(content) - offset)
            except BlockingIOError:
                _grown(peer, arrived)
        for _ in turns("the whole file arrived"):
            flushed(sender)
            if _grown(peer, arrived) == len(content):
                break
        expect(bytes(arrived) == content, "the bytes changed")


def bad_file_is_no_harm(bench: Bench) -> None:
    with bench.sending() as (sender, peer, _):
        reads, writes = os.pipe()
        os.close(writes)
        try:
            error = error_of(lambda: sender.sendfile(reads, 0, 10))
        finally:
            os.close(reads)
        expect(isinstance(error, OSError), f"{error!r} for a pipe")
        sender.send(b"on")
        expect(peer.read_data(2) == b"on", "the connection did not go on")


def dead_after_a_reset(bench: Bench) -> None:
    with bench.sending() as (sender, peer, sock):
        sender.send(b"x")
        peer.reset()
        reset_noticed(sock)
        _stays_dead(sender)


def dead_after_the_peer_closed(bench: Bench) -> None:
    with bench.sending() as (sender, peer, sock):
        peer.sock.close()
        sender.send(b"x")  # TCP answers this one with RST
        reset_noticed(sock)
        _stays_dead(sender)


def repr_shows_no_key(bench: Bench) -> None:
    with bench.sending() as (sender, _, _):
        keys = made_up_keys(bench.suite, "us")
        for secret in (keys.key, keys.iv):
            expect(secret.hex() not in repr(sender), "the key, in hexadecimal")
            expect(repr(secret)[2:-1] not in repr(sender), "the key")


def install_restarts_the_numbers(bench: Bench) -> None:
    with bench.sending() as (sender, peer, _):
        for generation in range(1, 20):
            sender.send(b"old")
            expect(peer.read_data(3) == b"old", "the bytes changed")
            sender.install(made_up_keys(bench.suite, "us", generation))
            expect(sender.sequence_number() == 0, "numbers begin at 0 again")
            peer.next_rx_key()
            sender.send(b"new")
            sender.send_record(_ALERT, b"\x01\x5a")
            expect(peer.read_data(3) == b"new", "the bytes changed")
            expect(_fragment(peer, _ALERT) == b"\x01\x5a", "the alert changed")
            expect(sender.sequence_number() == 2, "2 records since")


def install_leaves_accepted_records_alone(bench: Bench) -> None:
    """What was accepted before is under the old key, wherever it waits."""
    with bench.sending(small=True) as (sender, peer, sock):
        accepted = fill(sender, sock)
        number = sender.sequence_number()
        sender.install(made_up_keys(bench.suite, "us", 1))
        arrived = bytearray()
        for _ in turns("everything arrived"):
            flushed(sender)
            if _grown(peer, arrived, number) == accepted:
                break
        peer.next_rx_key()
        sender.send(b"new")
        expect(peer.read_data(3) == b"new", "the bytes changed")


def _stays_dead(sender: RecordSender) -> None:
    """Every call raises the same network error, again and again, whatever the layer below pretends."""
    with _file(b"file") as file:
        first = error_of(lambda: sender.send(b"x"))
        expect(isinstance(first, OSError), f"{first!r} from a dead connection")
        number = getattr(first, "errno", None)
        expect(number in RESET_ERRNOS, f"{first!r} from a dead connection")
        for _ in range(3):
            for attempt in (
                lambda: sender.send(b"x"),
                lambda: sender.send(bytes(2**17), _NO_WAIT),
                lambda: sender.send_record(_ALERT, b"\x01\x00"),
                lambda: sender.sendfile(file.fileno(), 0, 4),
                lambda: sender.flush(),
            ):
                error = error_of(attempt)
                expect(
                    isinstance(error, OSError) and error.errno == number,
                    f"{error!r} after {first!r}",
                )


def _grown(peer: RecordPeer, stream: bytearray, until: int | None = None) -> int:
    """Add to ``stream`` what has come, record ``until`` at the most; return its length."""
    peer.pull()
    while (until is None or peer.rx.sequence_number < until) and (
        message := peer.next_record()
    ) is not None:
        stream += message.fragment
    return len(stream)


def _fragment(peer: RecordPeer, content_type: int) -> bytes:
    message = peer.read_record()
    if message is None or message.content_type != content_type:
        raise AssertionError(f"{message} instead of a record of type {content_type}")
    return message.fragment


def _file(content: bytes) -> tempfile._TemporaryFileWrapper[bytes]:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115  # callers do
    file.write(content)
    file.flush()
    return file


SENDER_CASES: Final[tuple[Case, ...]] = (
    data_of_any_size_arrives,
    any_bytes_like_object_is_sent,
    a_vector_is_one_piece,
    no_data_is_no_record,
    records_are_full,
    control_records_go_out_whole_and_in_order,
    counting_goes_on_from_the_first_number,
    max_fragment_is_respected,
    would_block_takes_nothing,
    flush_is_true_only_when_everything_is_out,
    sendfile_sends_what_is_asked,
    sendfile_stops_where_there_is_no_room,
    bad_file_is_no_harm,
    dead_after_a_reset,
    dead_after_the_peer_closed,
    repr_shows_no_key,
)

#: For senders whose ``can_change_key`` is true.
SENDER_REKEY_CASES: Final[tuple[Case, ...]] = (
    install_restarts_the_numbers,
    install_leaves_accepted_records_alone,
)
