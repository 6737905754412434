"""What every ``RecordReceiver`` has to do: one function a rule, named after it."""

from __future__ import annotations

import socket
from typing import Final

from ktls.protocol.enums import AlertDescription, ContentType
from ktls.protocol.errors import RemoteProtocolError
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.interface import ControlRecord, RecordReceiver

from .bench import (
    DATA,
    RESET_ERRNOS,
    SIZES,
    Bench,
    Case,
    error_of,
    expect,
    receive,
    reset_noticed,
)
from .peers import eventually, made_up_keys, pattern, wait_readable

__all__ = (
    "RECEIVER_CASES",
    "control_records_are_told_and_read_one_by_one",
    "counting_goes_on_from_the_first_number",
    "data_comes_before_the_control_record_behind_it",
    "data_of_any_size_arrives",
    "empty_records_are_not_the_end",
    "end_of_stream_is_told_again_and_again",
    "framing_error_is_not_lost_to_a_look",
    "nbytes_is_respected",
    "nothing_and_half_a_record_would_block",
    "nothing_is_hidden_from_poll",
    "padding_is_removed",
    "pending_bytes_need_no_poll",
    "read_record_takes_the_rest_of_a_data_record",
    "record_is_read_in_parts",
    "record_may_come_byte_by_byte",
    "record_without_a_type_is_refused",
    "records_merge_into_a_large_buffer",
    "replayed_record_is_refused",
    "repr_shows_no_key",
    "reset_is_told_again_and_again",
    "too_long_record_is_refused",
    "too_much_inside_a_record_is_refused",
    "too_short_record_is_refused",
    "unprotected_record_is_refused",
    "unreadable_record_is_told_again_and_again",
    "what_is_not_tls_is_refused",
    "wrong_key_is_refused",
)

_ALERT: Final = ContentType.ALERT
_HANDSHAKE: Final = ContentType.HANDSHAKE
_NO_WAIT: Final = socket.MSG_DONTWAIT
_WARNING: Final = b"\x01\x5a"
#: A handshake message of a type that no layer has to understand: HelloRequest.
_HELLO_REQUEST: Final = bytes(4)


def data_of_any_size_arrives(bench: Bench) -> None:
    for size in SIZES:
        with bench.receiving() as (receiver, peer, _):
            records = peer.seal_data(pattern(size))
            received = bytearray()
            # In pieces that fit into TCP's buffers.
            for start in range(0, size, 4 * MAX_FRAGMENT):
                piece = min(4 * MAX_FRAGMENT, size - start)
                count = -(-piece // MAX_FRAGMENT)
                end = _end_of(records, count)
                peer.send_raw(records[:end])
                records = records[end:]
                received += receive(receiver, piece)
            expect(bytes(received) == pattern(size), f"{size} bytes changed")
            expect(
                receiver.sequence_number() == peer.tx.sequence_number,
                f"{receiver.sequence_number()} records counted of {peer.tx.sequence_number}",
            )


def records_merge_into_a_large_buffer(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        peer.send_raw(b"".join(peer.seal(DATA, pattern(100, 100 * n)) for n in range(50)))
        expect(receive(receiver, 5000) == pattern(5000), "the bytes changed")
        expect(receiver.sequence_number() == 50, "50 records came")


def record_is_read_in_parts(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        peer.send_data(pattern(MAX_FRAGMENT))
        expect(receive(receiver, 1) == pattern(1), "the first byte")
        expect(receive(receiver, 16000, step=777) == pattern(16000, 1), "the middle")
        rest = MAX_FRAGMENT - 16001
        buffer = bytearray(MAX_FRAGMENT)
        expect(receiver.recv_into(buffer, 0, _NO_WAIT) == rest, "the rest is there without waiting")
        expect(buffer[:rest] == pattern(rest, 16001), "the rest changed")
        expect(receiver.pending() == 0, f"{receiver.pending()} bytes are said to be left")


def nbytes_is_respected(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        peer.send_data(b"abcdef")
        buffer = bytearray(b"------")
        expect(receiver.recv_into(buffer, 2) == 2, "2 bytes were asked for")
        expect(buffer == b"ab----", f"{bytes(buffer)!r}")
        expect(receiver.recv_into(memoryview(buffer)[3:5]) == 2, "the buffer has room for 2")
        expect(buffer == b"ab-cd-", f"{bytes(buffer)!r}")
        expect(receive(receiver, 2) == b"ef", "the rest")


def control_records_are_told_and_read_one_by_one(bench: Bench) -> None:
    records: list[tuple[int, bytes]] = [
        (_ALERT, _WARNING),
        (_ALERT, _WARNING),
        (_HANDSHAKE, _HELLO_REQUEST),
    ]
    if bench.is_tls13:
        records += [(_ALERT, b""), (99, b"unknown"), (ContentType.CHANGE_CIPHER_SPEC, b"\x01")]
    records.append((_HANDSHAKE, b"\x04" + pattern(MAX_FRAGMENT - 1)))
    with bench.receiving() as (receiver, peer, sock):
        peer.send_raw(b"".join(peer.seal(*record) for record in records))
        buffer = bytearray(100)
        for number, (content_type, fragment) in enumerate(records):
            for _ in range(2):
                eventually(receiver.record_waits, f"record {number} does not show")
                error = error_of(lambda: receiver.recv_into(buffer))
                expect(isinstance(error, ControlRecord), f"{error!r} at record {number}")
            message = receiver.read_record()
            expect(message == InboundPlainMessage(content_type, fragment), f"record {number}")
        expect(not receiver.record_waits(), "a record waits, but none has come")
        peer.send_data(b"data")
        expect(wait_readable(sock), "the data did not come")
        expect(not receiver.record_waits(), "application data is not what is asked for")
        expect(receive(receiver, 4) == b"data", "the bytes changed")
        expect(receiver.sequence_number() == len(records) + 1, "counted wrong")


def data_comes_before_the_control_record_behind_it(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        peer.send_raw(
            peer.seal(DATA, b"one")
            + peer.seal(DATA, b"two")
            + peer.seal(_ALERT, _WARNING)
            + peer.seal(DATA, b"three")
        )
        expect(receive(receiver, 6, step=100) == b"onetwo", "the data in front of it")
        error = error_of(lambda: receiver.recv_into(bytearray(100)))
        expect(isinstance(error, ControlRecord), f"{error!r} instead of a control record")
        expect(receiver.read_record() == InboundPlainMessage(_ALERT, _WARNING), "the alert")
        expect(receive(receiver, 5) == b"three", "the data behind it")


def read_record_takes_the_rest_of_a_data_record(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        peer.send_raw(peer.seal(DATA, b"abcdef") + peer.seal(_ALERT, _WARNING))
        expect(receive(receiver, 2) == b"ab", "the bytes changed")
        expect(receiver.read_record() == InboundPlainMessage(DATA, b"cdef"), "the rest")
        expect(receiver.read_record() == InboundPlainMessage(_ALERT, _WARNING), "the alert")


def empty_records_are_not_the_end(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        peer.send_raw(
            peer.seal(DATA, b"")
            + peer.seal(DATA, b"a")
            + peer.seal(DATA, b"")
            + peer.seal(DATA, b"")
            + peer.seal(DATA, b"b")
        )
        expect(receive(receiver, 2, step=100) == b"ab", "the bytes changed")
        expect(receiver.sequence_number() == 5, "empty records count")


def padding_is_removed(bench: Bench) -> None:
    if not bench.is_tls13:
        return
    with bench.receiving() as (receiver, peer, _):
        for size, padding in ((1, 1), (10, 1000), (16000, 384), (0, 50)):
            peer.send_record(DATA, pattern(size), padding)
            peer.send_record(_ALERT, _WARNING, padding)
            expect(receive(receiver, size) == pattern(size), "the bytes changed")
            message = receiver.read_record()
            if message == InboundPlainMessage(DATA, b""):
                message = receiver.read_record()
            expect(message == InboundPlainMessage(_ALERT, _WARNING), f"{message} after {size}")


def end_of_stream_is_told_again_and_again(bench: Bench) -> None:
    for cut in (0, 3, 30):
        with bench.receiving() as (receiver, peer, _):
            peer.send_raw(peer.seal_data(b"data") + peer.seal_data(bytes(100))[:cut])
            peer.end()
            expect(receive(receiver, 4) == b"data", "the data in front of it")
            for _ in range(3):
                expect(receiver.recv_into(bytearray(10)) == 0, "0 is the end")
                expect(receiver.read_record() is None, "None is the end")


def unreadable_record_is_told_again_and_again(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, sock):
        good = peer.seal_data(b"good")
        bad = bytearray(peer.seal_data(b"evil"))
        bad[-1] ^= 1
        peer.send_raw(good + bytes(bad) + peer.seal_data(b"behind"))
        expect(receive(receiver, 4, step=100) == b"good", "the good record in front of it")
        _stays_failed(receiver, sock, AlertDescription.BAD_RECORD_MAC)
        expect(receiver.sequence_number() == 1, "one record was opened")


def replayed_record_is_refused(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, sock):
        record = peer.seal_data(b"once")
        peer.send_raw(record + record)
        expect(receive(receiver, 4, step=100) == b"once", "the first")
        _stays_failed(receiver, sock, AlertDescription.BAD_RECORD_MAC)


def wrong_key_is_refused(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, sock):
        peer.tx = type(peer.tx)(bench.suite, made_up_keys(bench.suite, "another"))
        peer.send_data(b"data")
        _stays_failed(receiver, sock, AlertDescription.BAD_RECORD_MAC)


def framing_error_is_not_lost_to_a_look(bench: Bench) -> None:
    """The layer below may report it once only, and ``record_waits`` may be who hears it."""
    with bench.receiving() as (receiver, peer, sock):
        peer.send_raw(b"\x17\x03\x03\xff\xff" + bytes(8))
        expect(wait_readable(sock), "nothing came")
        try:
            expect(receiver.record_waits(), "the error does not show")
        except RemoteProtocolError:
            pass
        _stays_failed(receiver, sock, AlertDescription.RECORD_OVERFLOW)


def too_long_record_is_refused(bench: Bench) -> None:
    length = MAX_FRAGMENT + (256 if bench.is_tls13 else 2048) + 1
    header = b"\x17\x03\x03" + length.to_bytes(2, "big")
    with bench.receiving() as (receiver, peer, sock):
        # TLS 1.2 layers may want the explicit nonce, too, before they look.
        peer.send_raw(peer.seal_data(b"good") + header + bytes(8))
        expect(receive(receiver, 4, step=100) == b"good", "the good record in front of it")
        _stays_failed(receiver, sock, AlertDescription.RECORD_OVERFLOW)


def too_much_inside_a_record_is_refused(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, sock):
        peer.send_raw(peer.seal(DATA, bytes(MAX_FRAGMENT + 40)))
        _stays_failed(receiver, sock, AlertDescription.RECORD_OVERFLOW)


def too_short_record_is_refused(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, sock):
        peer.send_raw(b"\x17\x03\x03\x00\x0f" + bytes(15))
        _stays_failed(receiver, sock, AlertDescription.BAD_RECORD_MAC)


def record_without_a_type_is_refused(bench: Bench) -> None:
    if not bench.is_tls13:
        return
    with bench.receiving() as (receiver, peer, sock):
        peer.send_raw(peer.seal(0, b"", 20))
        _stays_failed(
            receiver,
            sock,
            AlertDescription.UNEXPECTED_MESSAGE,
            AlertDescription.BAD_RECORD_MAC,
        )


def what_is_not_tls_is_refused(bench: Bench) -> None:
    # Which of its first five bytes is looked at first is the layer's business.
    alerts = (
        AlertDescription.UNEXPECTED_MESSAGE,
        AlertDescription.PROTOCOL_VERSION,
        AlertDescription.RECORD_OVERFLOW,
    )
    for text in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        with bench.receiving() as (receiver, peer, sock):
            peer.send_raw(peer.seal_data(b"good") + text)
            expect(receive(receiver, 4, step=100) == b"good", "the good record in front of it")
            _stays_failed(receiver, sock, *alerts)


def unprotected_record_is_refused(bench: Bench) -> None:
    if not bench.is_tls13:
        return
    with bench.receiving() as (receiver, peer, sock):
        peer.send_raw(b"\x15\x03\x03\x00\x02\x01\x00")
        _stays_failed(
            receiver, sock, AlertDescription.UNEXPECTED_MESSAGE, AlertDescription.BAD_RECORD_MAC
        )


def nothing_and_half_a_record_would_block(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        _would_block(receiver)
        record = peer.seal_data(b"whole")
        for cut in (3, 5, 12, len(record) - 1):
            peer.send_raw(record[:cut])
            # The bytes are on their way within this machine; would-block is right before and after.
            _would_block(receiver)
            peer.send_raw(record[cut:])
            expect(receive(receiver, 5) == b"whole", "the bytes changed")
            record = peer.seal_data(b"whole")


def record_may_come_byte_by_byte(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, _):
        record = peer.seal(DATA, b"data") + peer.seal(_ALERT, _WARNING)
        for byte in record:
            peer.send_raw(bytes((byte,)))
        expect(receive(receiver, 4, step=100) == b"data", "the bytes changed")
        expect(receiver.read_record() == InboundPlainMessage(_ALERT, _WARNING), "the alert")


def counting_goes_on_from_the_first_number(bench: Bench) -> None:
    with bench.receiving(sequence_number=7) as (receiver, peer, _):
        expect(receiver.sequence_number() == 7, "it begins at 7")
        peer.send_data(b"x")
        expect(receive(receiver, 1) == b"x", "the byte changed")
        expect(receiver.sequence_number() == 8, "one record came")


def pending_bytes_need_no_poll(bench: Bench) -> None:
    """Either ``poll`` or ``pending`` shows the rest of a record."""
    with bench.receiving() as (receiver, peer, sock):
        peer.send_data(b"abcdef")
        expect(receive(receiver, 2) == b"ab", "the bytes changed")
        expect(receiver.pending() in (0, 4), f"{receiver.pending()} bytes are said to be left")
        expect(receiver.pending() or wait_readable(sock), "the rest of the record is hidden")


def nothing_is_hidden_from_poll(bench: Bench) -> None:
    """A read that ended with a record: either ``poll`` or ``pending`` shows what came with it."""
    for kind in ("data", "empty", "alert", "bad"):
        with bench.receiving() as (receiver, peer, sock):
            first = peer.seal_data(b"data")
            behind = {
                "data": lambda: peer.seal_data(b"more"),
                "empty": lambda: peer.seal(DATA, b"") + peer.seal_data(b"more"),
                "alert": lambda: peer.seal(_ALERT, _WARNING),
                "bad": lambda: b"\x17\x03\x03\x00\x20" + bytes(32),
            }[kind]()
            peer.send_raw(first + behind)
            expect(receive(receiver, 4, step=4) == b"data", "the bytes changed")
            expect(receiver.pending() or wait_readable(sock), f"{kind} is hidden behind data")


def reset_is_told_again_and_again(bench: Bench) -> None:
    with bench.receiving() as (receiver, peer, sock):
        peer.send_data(b"data")
        expect(receive(receiver, 4) == b"data", "the bytes changed")
        peer.reset()
        reset_noticed(sock)
        for _ in range(3):
            for attempt in (lambda: receiver.recv_into(bytearray(9)), receiver.read_record):
                error = error_of(attempt)
                expect(
                    isinstance(error, OSError) and error.errno in RESET_ERRNOS,
                    f"{error!r} after a reset",
                )


def repr_shows_no_key(bench: Bench) -> None:
    with bench.receiving() as (receiver, _, _):
        keys = made_up_keys(bench.suite, "peer")
        for secret in (keys.key, keys.iv):
            expect(secret.hex() not in repr(receiver), "the key, in hexadecimal")
            expect(repr(secret)[2:-1] not in repr(receiver), "the key")


def _end_of(records: bytes, count: int) -> int:
    """Where the first ``count`` records end."""
    end = 0
    for _ in range(count):
        end += 5 + int.from_bytes(records[end + 3 : end + 5], "big")
    return end


def _would_block(receiver: RecordReceiver) -> None:
    for attempt in (
        lambda: receiver.recv_into(bytearray(9), 0, _NO_WAIT),
        lambda: receiver.read_record(_NO_WAIT),
    ):
        error = error_of(attempt)
        expect(isinstance(error, BlockingIOError), f"{error!r} instead of would-block")


def _stays_failed(receiver: RecordReceiver, sock: socket.socket, *alerts: AlertDescription) -> None:
    """Every call raises the same error, and the socket can still send the alert."""
    for _ in range(3):
        for attempt in (lambda: receiver.recv_into(bytearray(9)), receiver.read_record):
            error = error_of(attempt)
            expect(isinstance(error, RemoteProtocolError), f"{error!r} for a bad record")
            expect(getattr(error, "alert", None) in alerts, f"{error!r} asks for another alert")
    left = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    expect(not left, f"error {left} is left for the next send")


RECEIVER_CASES: Final[tuple[Case, ...]] = (
    data_of_any_size_arrives,
    records_merge_into_a_large_buffer,
    record_is_read_in_parts,
    nbytes_is_respected,
    control_records_are_told_and_read_one_by_one,
    data_comes_before_the_control_record_behind_it,
    read_record_takes_the_rest_of_a_data_record,
    empty_records_are_not_the_end,
    padding_is_removed,
    end_of_stream_is_told_again_and_again,
    unreadable_record_is_told_again_and_again,
    replayed_record_is_refused,
    wrong_key_is_refused,
    framing_error_is_not_lost_to_a_look,
    too_long_record_is_refused,
    too_much_inside_a_record_is_refused,
    too_short_record_is_refused,
    record_without_a_type_is_refused,
    what_is_not_tls_is_refused,
    unprotected_record_is_refused,
    nothing_and_half_a_record_would_block,
    record_may_come_byte_by_byte,
    counting_goes_on_from_the_first_number,
    pending_bytes_need_no_poll,
    nothing_is_hidden_from_poll,
    reset_is_told_again_and_again,
    repr_shows_no_key,
)
