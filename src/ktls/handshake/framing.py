"""Records cut out of a byte stream, and what the two hellos say in the clear.

``RecordFramer`` lets a handshake engine be fed record by record, so that it stops exactly at Finished (RFC 9846 §5.1 for the header).
``ClientHelloWatch`` and ``ServerHelloWatch`` read along. They see bytes that nobody has checked: on anything odd they see nothing and
never raise, because the engine is the one to complain.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from ktls.protocol.enums import ContentType, HandshakeType
from ktls.protocol.suites import MAX_FRAGMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = (
    "HELLO_RETRY_REQUEST_RANDOM",
    "ClientHello",
    "ClientHelloWatch",
    "RecordFramer",
    "ServerHelloWatch",
    "parse_client_hello",
    "split_records",
)

_HEADER: Final = 5
#: No version lets a record be longer (RFC 5246 §6.2.3; TLS 1.3 allows less).
_MAX_BODY: Final = MAX_FRAGMENT + 2048
_RECORD_TYPES: Final = frozenset(ContentType)
#: A ServerHello with this random is a HelloRetryRequest: SHA-256 of "HelloRetryRequest" (RFC 9846 §4.2.3).
HELLO_RETRY_REQUEST_RANDOM: Final = bytes.fromhex(
    "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c"
)
_RANDOM: Final = 32
#: What OpenSSL takes as a ClientHello at most; a longer one is refused there, so there is no point in keeping it here.
_MAX_HELLO: Final = 131_396

_SERVER_NAME: Final = 0  # RFC 6066 §3
_MAX_FRAGMENT_LENGTH: Final = 1  # RFC 6066 §4
_RECORD_SIZE_LIMIT: Final = 28  # RFC 8449 §4
_MIN_RECORD_SIZE_LIMIT: Final = 64
_WANTED: Final = frozenset((_SERVER_NAME, _MAX_FRAGMENT_LENGTH, _RECORD_SIZE_LIMIT))
#: Type and length of an extension (RFC 9846 §4.3).
_EXTENSION_HEADER: Final = struct.Struct("!HH")


@final
class RecordFramer:
    """Cuts a byte stream into whole TLS records, headers included.

    What can't be TLS (an unknown record type, a length that no version allows) is handed over as it is, and so is all that follows: the engine shall
    say what is wrong, in its own words and with its own alert.
    """

    __slots__ = ("_buffer", "is_tls")

    def __init__(self) -> None:
        self._buffer = bytearray()
        #: False from the first byte on that can't be TLS.
        self.is_tls = True

    def __repr__(self) -> str:
        return f"<RecordFramer holding {len(self._buffer)} bytes>"

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they came from the network."""
        self._buffer += data

    def __iter__(self) -> Iterator[bytes]:
        while (record := self.next_record()) is not None:
            yield record

    def next_record(self) -> bytes | None:
        """Return the next whole record, or everything there is once it is not TLS; None if there is nothing whole."""
        end = self._record_end()
        if end is None or not self._buffer or len(self._buffer) < end:
            return None
        record = bytes(self._buffer[:end])
        del self._buffer[:end]
        return record

    def need(self) -> int:
        """Return how many bytes complete the current header or, once that is known, the current record; 0 if one is whole.

        Who never reads more than this many bytes at once never reads ahead.
        """
        end = self._record_end()
        if end is None:
            return _HEADER - len(self._buffer)
        if not self.is_tls:
            return 0 if self._buffer else MAX_FRAGMENT  # any number is as good as another
        return max(end - len(self._buffer), 0)

    def take_rest(self) -> bytes:
        """Return the bytes that no record was made of, and forget them."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def _record_end(self) -> int | None:
        """Return where the current record ends, or None if its header is not complete."""
        buffer = self._buffer
        if self.is_tls and buffer and buffer[0] not in _RECORD_TYPES:
            self.is_tls = False
        if not self.is_tls:
            return len(buffer)
        if len(buffer) < _HEADER:
            return None
        length = buffer[3] << 8 | buffer[4]
        if length > _MAX_BODY:
            self.is_tls = False
            return len(buffer)
        return _HEADER + length


def split_records(data: bytes) -> list[bytes]:
    """Cut ``data``, which an engine produced and so is nothing but whole records, into them."""
    records, start = [], 0
    while start < len(data):
        end = start + _HEADER + int.from_bytes(data[start + 3 : start + _HEADER], "big")
        records.append(data[start:end])
        start = end
    return records


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientHello:
    """What a ClientHello says that somebody needs after the handshake."""

    random: bytes
    server_name: str | None = None
    #: In bytes: 512 to 4096 (RFC 6066 §4).
    max_fragment_length: int | None = None
    #: As on the wire: in TLS 1.3 one byte of it is the content type (RFC 8449 §4).
    record_size_limit: int | None = None


class _TooShortError(Exception):
    """A hello that ends too early."""


class _Reader:
    """Takes a hello apart from the left."""

    __slots__ = ("_data", "_offset")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def take(self, count: int) -> bytes:
        chunk = self._data[self._offset : self._offset + count]
        if len(chunk) != count:
            raise _TooShortError
        self._offset += count
        return chunk

    def vector(self, length_bytes: int) -> bytes:
        return self.take(int.from_bytes(self.take(length_bytes), "big"))


def parse_client_hello(body: bytes) -> ClientHello | None:
    """Read the body of a ClientHello (RFC 9846 §4.2.2); None if it is not one."""
    reader = _Reader(body)
    try:
        reader.take(2)  # legacy_version
        random = reader.take(_RANDOM)
    except _TooShortError:
        return None
    extensions: dict[int, bytes] = {}
    block = b""
    try:
        reader.vector(1)  # legacy_session_id
        reader.vector(2)  # cipher_suites
        reader.vector(1)  # legacy_compression_methods
        block = reader.vector(2)
    except _TooShortError:
        pass  # the engine refuses it, or there were no extensions at all (RFC 5246 §7.4.1.2)
    start = 0
    while start + 4 <= len(block):
        number, length = _EXTENSION_HEADER.unpack_from(block, start)
        start += 4 + length
        if number in _WANTED and start <= len(block):
            extensions.setdefault(number, block[start - length : start])
    return ClientHello(
        random=random,
        server_name=_host_name(extensions.get(_SERVER_NAME, b"")),
        max_fragment_length=_fragment_length(extensions.get(_MAX_FRAGMENT_LENGTH, b"")),
        record_size_limit=_size_limit(extensions.get(_RECORD_SIZE_LIMIT, b"")),
    )


def _host_name(extension: bytes) -> str | None:
    try:
        names = _Reader(_Reader(extension).vector(2))
        if names.take(1) != b"\0":  # host_name: the one type there is
            return None
        name = names.vector(2)
    except _TooShortError:
        return None
    # Printable ASCII only: it will end up in people's logs.
    return name.decode("ascii") if name and all(0x20 < byte < 0x7F for byte in name) else None


def _fragment_length(extension: bytes) -> int | None:
    return 2 ** (8 + extension[0]) if len(extension) == 1 and 1 <= extension[0] <= 4 else None


def _size_limit(extension: bytes) -> int | None:
    limit = int.from_bytes(extension, "big")
    return limit if len(extension) == 2 and limit >= _MIN_RECORD_SIZE_LIMIT else None


class _HelloWatch:
    """Puts together the handshake messages at the beginning of one direction, until the wanted hello was seen, or can't come any more."""

    __slots__ = ("_buffer", "_done")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._done = False

    def see(self, record: bytes) -> None:
        """Look at one whole record."""
        if self._done or len(record) <= _HEADER or record[0] != ContentType.HANDSHAKE:
            return
        self._buffer += record[_HEADER:]
        while not self._done and len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[1:4], "big")
            if length > _MAX_HELLO:
                self._done = True
            elif len(self._buffer) < 4 + length:
                return
            else:
                message = bytes(self._buffer[: 4 + length])
                del self._buffer[: 4 + length]
                self._done = self._message(message[0], message[4:])
        if self._done:
            self._buffer.clear()

    def _message(self, message_type: int, body: bytes) -> bool:
        """Look at one whole message; return whether that was all."""
        raise NotImplementedError


@final
class ClientHelloWatch(_HelloWatch):
    """Finds the first ClientHello. The one that answers a HelloRetryRequest has the same random (RFC 9846 §4.2.2)."""

    __slots__ = ("hello",)

    def __init__(self) -> None:
        super().__init__()
        self.hello: ClientHello | None = None

    def _message(self, message_type: int, body: bytes) -> bool:
        if message_type == HandshakeType.CLIENT_HELLO:
            self.hello = parse_client_hello(body)
        return True


@final
class ServerHelloWatch(_HelloWatch):
    """Finds the random of the ServerHello that counts: the first whose random does not make it a HelloRetryRequest.

    Nothing later may be looked at: an encrypted Finished of TLS 1.2 is a record of the same type, and begins like a ServerHello one time in 256.
    """

    __slots__ = ("random",)

    def __init__(self) -> None:
        super().__init__()
        self.random: bytes | None = None

    def _message(self, message_type: int, body: bytes) -> bool:
        if message_type == HandshakeType.HELLO_REQUEST and not body:
            return False  # may come at any time, and is ignored (RFC 5246 §7.4.1.1)
        random = body[2 : 2 + _RANDOM]
        if message_type != HandshakeType.SERVER_HELLO or len(random) < _RANDOM:
            return True
        if random == HELLO_RETRY_REQUEST_RANDOM:
            return False
        self.random = random
        return True
