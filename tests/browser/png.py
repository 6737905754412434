"""Just enough PNG to paint pictures and to look at a screenshot: eight bits a channel, RGB, or RGBA whose alpha is ignored."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final, final

__all__ = ("Picture", "decode", "encode")

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_CHANNELS: Final = {2: 3, 6: 4}  # by colour type: RGB, RGBA


@final
@dataclass(frozen=True, slots=True)
class Picture:
    """Rows of red, green, blue bytes, from top to bottom."""

    width: int
    height: int
    rgb: bytes

    def __post_init__(self) -> None:
        assert len(self.rgb) == self.width * self.height * 3

    def part(self, left: int, top: int, width: int, height: int) -> Picture:
        """Return a rectangle of it."""
        starts = ((y * self.width + left) * 3 for y in range(top, top + height))
        return Picture(width, height, b"".join(self.rgb[s : s + width * 3] for s in starts))


def encode(picture: Picture) -> bytes:
    """Return a PNG file."""
    stride = picture.width * 3
    rows = (picture.rgb[at : at + stride] for at in range(0, len(picture.rgb), stride))
    scanlines = b"".join(b"\0" + row for row in rows)  # 0: not filtered
    header = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    return (
        _SIGNATURE
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(scanlines))
        + _chunk(b"IEND", b"")
    )


def decode(file: bytes) -> Picture:
    """Read a PNG file. Raises ``ValueError`` for kinds that the browser does not write."""
    if not file.startswith(_SIGNATURE):
        raise ValueError("not a PNG file")
    width = height = channels = 0
    data = b""
    at = len(_SIGNATURE)
    while at < len(file):
        length, kind = struct.unpack_from(">I4s", file, at)
        body = file[at + 8 : at + 8 + length]
        at += length + 12
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
            if depth != 8 or interlace or colour not in _CHANNELS:
                raise ValueError(f"{depth} bits, colour type {colour}, interlace {interlace}")
            channels = _CHANNELS[colour]
        elif kind == b"IDAT":
            data += body
    pixels = _unfilter(zlib.decompress(data), width * channels, channels)
    rgb = bytearray(width * height * 3)
    for channel in range(3):
        rgb[channel::3] = pixels[channel::channels]
    return Picture(width, height, bytes(rgb))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _unfilter(scanlines: bytes, stride: int, step: int) -> bytes:
    """Undo the filters (PNG specification, section 9): each byte is a difference to its neighbours ``left``, ``up``, ``corner``."""
    pixels = bytearray()
    above = bytearray(stride)
    for at in range(0, len(scanlines), stride + 1):
        kind = scanlines[at]
        row = bytearray(scanlines[at + 1 : at + 1 + stride])
        for i in range(stride if kind else 0):
            left = row[i - step] if i >= step else 0
            up = above[i]
            if kind == 1:
                guess = left
            elif kind == 2:
                guess = up
            elif kind == 3:
                guess = (left + up) // 2
            elif kind == 4:
                guess = _paeth(left, up, above[i - step] if i >= step else 0)
            else:
                raise ValueError(f"filter {kind}")
            row[i] = (row[i] + guess) & 255
        pixels += row
        above = row
    return bytes(pixels)


def _paeth(left: int, up: int, corner: int) -> int:
    """Whichever neighbour is nearest to ``left + up - corner``."""
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    if to_left <= to_up and to_left <= to_corner:
        return left
    return up if to_up <= to_corner else corner
