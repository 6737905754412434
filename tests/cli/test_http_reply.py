from __future__ import annotations

import base64
import hashlib
import io

import pytest

from ktls.cli.failure import Failure
from ktls.cli.http_reply import Reader, Reply, read_reply


def reader(data: bytes, step: int = 1 << 20) -> Reader:
    """A reader of ``data``, which arrives ``step`` bytes at a time."""
    source = io.BytesIO(data)
    return Reader(lambda size: source.read(min(size, step)))


def reply(*fields: str, status: str = "200 OK") -> Reply:
    head = "\r\n".join((f"HTTP/1.1 {status}", *fields, "", ""))
    return read_reply(reader(head.encode("latin-1")))


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_head_and_what_comes_with_it(step: int) -> None:
    source = reader(b'HTTP/1.1 206 Partial Content\r\nETag: "x"\r\nA: b\r\n\r\nbody', step)
    got = read_reply(source)
    assert (got.status, got.phrase, got.validator) == (206, "Partial Content", '"x"')
    body = b""
    while data := source.read(2):
        body += data
    assert body == b"body"


def test_interim_answers_are_skipped() -> None:
    data = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100\r\n\r\nHTTP/1.1 204 \r\n\r\n"
    assert read_reply(reader(data)).status == 204


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 99 X\r\n\r\n",
        b"HTTP/1.1 200 OK" + b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
    ],
)
def test_what_is_not_http(data: bytes) -> None:
    with pytest.raises(Failure):
        read_reply(reader(data))


def test_no_answer() -> None:
    with pytest.raises(EOFError):
        read_reply(reader(b""))


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_chunks(step: int) -> None:
    data = b"3\r\nabc\r\n5;x=y\r\ndefgh\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
    assert b"".join(reader(data, step).chunks()) == b"abcdefgh0123456789"


@pytest.mark.parametrize(
    "data",
    [b"", b"3", b"3\r\n", b"3\r\nab", b"3\r\nabc", b"3\r\nabc\r\n", b"0\r\n", b"0\r\nA: b\r\n"],
)
def test_cut_chunks(data: bytes) -> None:
    with pytest.raises(EOFError):
        list(reader(data).chunks())


@pytest.mark.parametrize(
    "data",
    [b"xyz\r\n", b"-1\r\n", b"\r\n", b"3\r\nabcdef\r\n", b"1" * 2000, b"11111111111111111\r\n"],
)
def test_wrong_chunks(data: bytes) -> None:
    with pytest.raises(Failure):
        list(reader(data).chunks())


def test_length() -> None:
    assert reply("Content-Length: 12").length == 12
    assert reply("Content-Length: 12", "Content-Length: 12").length == 12
    assert reply().length is None
    chunked = reply("Transfer-Encoding: Chunked", "Content-Length: 5")
    assert (chunked.chunked, chunked.length) == (True, None)


@pytest.mark.parametrize(
    "fields",
    [
        ["Content-Length: -1"],
        ["Content-Length: 1x"],
        ["Content-Length: "],
        ["Content-Length: 1", "Content-Length: 2"],
        ["Content-Length: \u00b2"],
        ["Transfer-Encoding: gzip, chunked"],
    ],
)
def test_wrong_length(fields: list[str]) -> None:
    with pytest.raises(Failure):
        _ = reply(*fields).length


@pytest.mark.parametrize(
    ("field", "span"),
    [
        ("bytes 0-9/10", (0, 9, 10)),
        ("bytes 5-9/10", (5, 9, 10)),
        ("bytes */10", None),
        ("bytes 0-9/*", None),
        ("lines 0-9/10", None),
        ("", None),
    ],
)
def test_content_range(field: str, span: tuple[int, int, int] | None) -> None:
    assert reply(f"Content-Range: {field}").content_range == span


def test_validator_has_to_be_strong() -> None:
    date = "Last-Modified: Mon, 23 Nov 2026 18:05:00 GMT"
    assert reply('ETag: "a"', date).validator == '"a"'
    assert reply('ETag: W/"a"', date).validator is None
    assert reply(date).validator == "Mon, 23 Nov 2026 18:05:00 GMT"
    assert reply().validator is None


def test_digest() -> None:
    digest = hashlib.sha256(b"x").digest()
    text = base64.b64encode(digest).decode()
    assert reply(f"Repr-Digest: sha-512=:AAAA:, sha-256=:{text}:").sha256 == digest
    assert reply(f"Digest: SHA-256={text}").sha256 == digest
    assert reply("Digest: MD5=AAAA").sha256 is None
    assert reply("Repr-Digest: sha-256=:short:").sha256 is None
    assert reply().sha256 is None
