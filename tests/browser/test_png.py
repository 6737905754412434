"""The reader that judges screenshots must not see what is not there."""

from __future__ import annotations

import struct
import zlib

import pytest

from .png import Picture, decode, encode

PICTURE = Picture(2, 2, bytes([10, 20, 30, 50, 40, 30, 250, 3, 77, 9, 200, 100]))


def test_round_trip() -> None:
    assert decode(encode(PICTURE)) == PICTURE


def test_part() -> None:
    assert PICTURE.part(1, 0, 1, 2) == Picture(1, 2, bytes([50, 40, 30, 9, 200, 100]))


@pytest.mark.parametrize(
    ("kind", "second_row"),
    [
        (0, [250, 3, 77, 9, 200, 100]),
        (1, [250, 3, 77, 15, 197, 23]),
        (2, [240, 239, 47, 215, 160, 70]),
        (3, [245, 249, 62, 115, 179, 47]),
        (4, [240, 239, 47, 15, 180, 23]),
    ],
)
def test_filters(kind: int, second_row: list[int]) -> None:
    """Differences as the PNG specification defines them, worked out by hand."""
    first_row = list(PICTURE.rgb[:6])
    assert decode(with_scanlines(bytes([0, *first_row, kind, *second_row]))) == PICTURE


def test_unknown_filter() -> None:
    with pytest.raises(ValueError, match="filter 5"):
        decode(with_scanlines(bytes([5, *range(6), 0, *range(6)])))


def with_scanlines(scanlines: bytes) -> bytes:
    """A file of PICTURE's size with these bytes instead of its own."""
    file = encode(PICTURE)
    start = file.index(b"IDAT") - 4
    data = zlib.compress(scanlines)
    chunk = b"IDAT" + data
    return file[:start] + struct.pack(">I", len(data)) + chunk + bytes(4) + file[-12:]
