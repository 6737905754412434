"""Records out of a byte stream, hellos out of records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktls.handshake.framing import (
    HELLO_RETRY_REQUEST_RANDOM,
    ClientHello,
    ClientHelloWatch,
    RecordFramer,
    ServerHelloWatch,
    parse_client_hello,
    split_records,
)

from .helpers import Pki, their_client

RANDOM = bytes(range(32))


def record(body: bytes, content_type: int = 22) -> bytes:
    return bytes((content_type, 3, 3)) + len(body).to_bytes(2, "big") + body


def message(message_type: int, body: bytes) -> bytes:
    return bytes((message_type,)) + len(body).to_bytes(3, "big") + body


def vector(length_bytes: int, body: bytes) -> bytes:
    return len(body).to_bytes(length_bytes, "big") + body


def client_hello(extensions: dict[int, bytes] | None = None) -> bytes:
    body = b"\x03\x03" + RANDOM + vector(1, b"") + vector(2, b"\x13\x01") + vector(1, b"\0")
    if extensions is not None:
        block = b"".join(n.to_bytes(2, "big") + vector(2, e) for n, e in extensions.items())
        body += vector(2, block)
    return body


def server_name(name: bytes, kind: int = 0) -> bytes:
    return vector(2, bytes((kind,)) + vector(2, name))


RECORDS = st.lists(
    st.builds(record, st.binary(max_size=600), st.sampled_from((20, 21, 22, 23))), max_size=6
)


@given(RECORDS, st.binary(max_size=40), st.lists(st.integers(1, 200), min_size=1))
def test_any_split_gives_the_same_records(
    records: list[bytes], rest: bytes, sizes: list[int]
) -> None:
    rest = b"\x16\x03\x03\x40\x00" + rest  # a record that never ends
    stream = b"".join(records) + rest
    framer, found, position = RecordFramer(), [], 0
    while position < len(stream):
        size = sizes[position % len(sizes)]
        framer.feed(stream[position : position + size])
        position += size
        found += list(framer)
    assert found == records
    assert framer.is_tls
    assert framer.take_rest() == rest
    assert framer.take_rest() == b""


@given(st.binary(max_size=300), st.integers(1, 20))
def test_no_byte_is_ever_lost(stream: bytes, size: int) -> None:
    framer, found = RecordFramer(), b""
    for start in range(0, len(stream), size):
        framer.feed(stream[start : start + size])
        found += b"".join(framer)
    assert found + framer.take_rest() == stream


@given(RECORDS)
def test_reading_what_is_needed_never_reads_ahead(records: list[bytes]) -> None:
    framer, stream, found = RecordFramer(), b"".join(records), []
    while stream:
        need = framer.need()
        assert need > 0
        framer.feed(stream[:need])
        stream = stream[need:]
        if framer.need() == 0:
            one = framer.next_record()
            assert one is not None
            found.append(one)
            assert framer.take_rest() == b""
    assert found == records


@pytest.mark.parametrize(
    "garbage",
    [b"G", b"GET / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01", b"\x18\x03\x03", b"\x16\x03\x03\x48\x01"],
)
def test_what_is_not_tls_is_handed_over_at_once(garbage: bytes) -> None:
    framer = RecordFramer()
    framer.feed(record(b"x") + garbage)
    assert list(framer) == [record(b"x"), garbage]
    assert not framer.is_tls
    assert framer.need() > 0
    framer.feed(record(b"later"))
    assert framer.need() == 0
    assert list(framer) == [record(b"later")]


def test_the_largest_record_is_tls() -> None:
    assert split_records(record(bytes(16384 + 2048))) == [record(bytes(16384 + 2048))]


def test_client_hello_says_what_we_need() -> None:
    hello = parse_client_hello(
        client_hello({10: b"\0\0", 0: server_name(b"example.com"), 1: b"\x02", 28: b"\x10\x01"})
    )
    assert hello == ClientHello(
        random=RANDOM,
        server_name="example.com",
        max_fragment_length=1024,
        record_size_limit=4097,
    )


@pytest.mark.parametrize(
    "extensions",
    [
        None,
        {},
        {0: b""},  # as servers acknowledge it
        {0: server_name(b"")},
        {0: server_name(b"name", kind=1)},
        {0: server_name(b"evil\r\nlog line")},
        {0: server_name(b"\xff\xfe")},
        {0: server_name(b"name")[:-1]},
        {1: b""},
        {1: b"\0"},
        {1: b"\x05"},
        {1: b"\x01\x01"},
        {28: b""},
        {28: b"\x00\x3f"},
        {28: b"\x00\x40\x00"},
    ],
)
def test_odd_extensions_say_nothing(extensions: dict[int, bytes] | None) -> None:
    assert parse_client_hello(client_hello(extensions)) == ClientHello(random=RANDOM)


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_a_cut_hello_gives_its_random_or_nothing(cut: int) -> None:
    hello = parse_client_hello(client_hello({0: server_name(b"example.com")})[:cut])
    assert hello == (ClientHello(random=RANDOM) if cut >= 34 else None)


@given(st.binary(max_size=400))
def test_no_bytes_make_the_parser_raise(body: bytes) -> None:
    parse_client_hello(body)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_no_records_make_the_watches_raise(records: list[bytes]) -> None:
    client, server = ClientHelloWatch(), ServerHelloWatch()
    for data in records:
        for one in (data, record(data), record(b"\x01" + data), record(b"\x02" + data)):
            client.see(one)
            server.see(one)


@given(st.integers(1, 50))
def test_a_hello_split_over_records_is_found(size: int) -> None:
    hello = message(1, client_hello({0: server_name(b"example.com")}))
    watch = ClientHelloWatch()
    for start in range(0, len(hello), size):
        assert watch.hello is None
        watch.see(record(hello[start : start + size]))
    assert watch.hello is not None
    assert watch.hello.server_name == "example.com"


def test_a_real_hello_is_read(pki: Pki) -> None:
    client = their_client(pki.client())
    client.step()
    watch = ClientHelloWatch()
    for one in split_records(client.data_to_send()):
        watch.see(one)
    assert watch.hello is not None
    assert (watch.hello.server_name, watch.hello.max_fragment_length) == ("localhost", None)


def test_only_a_client_hello_counts() -> None:
    watch = ClientHelloWatch()
    watch.see(record(message(11, client_hello())))
    watch.see(record(message(1, client_hello())))
    assert watch.hello is None


def test_a_hello_without_end_is_given_up() -> None:
    watch = ClientHelloWatch()
    watch.see(record(b"\x01\xff\xff\xff"))
    watch.see(record(message(1, client_hello())))
    assert watch.hello is None


def server_hello(random: bytes) -> bytes:
    return message(2, b"\x03\x03" + random + b"\0\x13\x01\0")


def test_the_random_of_the_server_skips_hello_retry_request() -> None:
    watch = ServerHelloWatch()
    watch.see(record(message(0, b"")))
    watch.see(record(server_hello(HELLO_RETRY_REQUEST_RANDOM)))
    watch.see(record(b"\x01", 20))
    assert watch.random is None
    watch.see(record(server_hello(RANDOM) + message(11, b"certificate")))
    assert watch.random == RANDOM


@pytest.mark.parametrize(
    "first", [server_hello(RANDOM), message(11, bytes(40)), b"\x02\xff\xff\xff"]
)
def test_nothing_after_the_server_hello_is_looked_at(first: bytes) -> None:
    watch = ServerHelloWatch()
    watch.see(record(first))
    before = watch.random
    assert before in (RANDOM, None)
    watch.see(record(server_hello(bytes(32))))  # what an encrypted Finished may look like
    assert watch.random == before
