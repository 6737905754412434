"""Frozen dataclasses as bytes and back, strictly: what is not exactly of the declared types is refused.

Layout: magic, format version (u16), length (u32) of a JSON text, the text, the bytes that are in it only as lengths (secrets never become text), SHA-256 of all that.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import itertools
import json
import math
import struct
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar, cast

__all__ = ("decode", "encode")

_T = TypeVar("_T")
_HEADER: Final = struct.Struct(">HI")
_DIGEST_LENGTH: Final = 32


def encode(magic: bytes, version: int, value: object) -> bytes:
    """Return ``value``, a dataclass, as bytes."""
    pieces: list[bytes] = []
    text = json.dumps(_plain(value, pieces), separators=(",", ":")).encode()
    body = b"".join((magic, _HEADER.pack(version, len(text)), text, *pieces))
    return body + hashlib.sha256(body).digest()


def decode(magic: bytes, version: int, kind: type[_T], data: bytes) -> _T:
    """Return the ``kind`` that ``data`` holds. ``ValueError``: damaged, of another version, or not what the types say; it quotes nothing of ``data``."""
    problem = "not what it should be"
    try:
        return _decode(magic, version, kind, data)
    except _Refused as error:
        problem = str(error)
    except (ValueError, RecursionError, OverflowError):
        pass  # these hold what they did not like
    finally:
        del data  # tracebacks may show locals
    raise ValueError(problem)


class _Refused(ValueError):
    """The message may be shown."""


def _decode(magic: bytes, version: int, kind: type[_T], data: bytes) -> _T:
    start = len(magic) + _HEADER.size
    if len(data) < start + _DIGEST_LENGTH or not data.startswith(magic):
        raise _Refused("not an exported state")
    found, length = _HEADER.unpack_from(data, len(magic))
    if found != version:
        raise _Refused(f"of format {found}, and only {version} is known")
    body, digest = data[:-_DIGEST_LENGTH], data[-_DIGEST_LENGTH:]
    if hashlib.sha256(body).digest() != digest:
        raise _Refused("damaged")
    pieces = _Pieces(body[start + length :])
    value = _typed(kind, json.loads(body[start : start + length]), pieces)
    if pieces.left:
        raise _Refused("too long")
    return cast("_T", value)


class _Pieces:
    """The bytes behind the text, cut off one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise _Refused("too short")
        self._position += count
        return self._data[self._position - count : self._position]


def _plain(value: Any, pieces: list[bytes]) -> Any:
    """Return ``value`` as JSON has it."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, bytes):
        pieces.append(value)
        return len(value)
    if isinstance(value, tuple):
        return [_plain(item, pieces) for item in value]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), pieces) for name in names}
    return dict(value) if isinstance(value, Mapping) else value


def _typed(hint: Any, value: Any, pieces: _Pieces) -> Any:
    """Return the JSON ``value`` as what ``hint`` says."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _typed(inner, value, pieces)
    if origin is typing.Literal:
        return _checked(value, value in arguments)
    if origin is tuple:
        return tuple(_items(arguments, _checked(value, type(value) is list), pieces))
    if origin is Mapping:
        return {name: _tuples(item) for name, item in _checked(value, type(value) is dict).items()}
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, _checked(value, type(value) is dict), pieces)
    if issubclass(hint, enum.Enum):
        return hint[_checked(value, type(value) is str and value in hint.__members__)]
    if hint is bytes:
        return pieces.take(_checked(value, type(value) is int))
    if hint is float:
        return float(_checked(value, type(value) in (int, float) and math.isfinite(value)))
    return _checked(value, type(value) is hint)


def _items(arguments: tuple[Any, ...], values: list[Any], pieces: _Pieces) -> Iterator[Any]:
    if arguments[-1] is ...:
        arguments = tuple(itertools.repeat(arguments[0], len(values)))
    _checked(values, len(arguments) == len(values))
    for argument, value in zip(arguments, values, strict=True):
        yield _typed(argument, value, pieces)


def _dataclass(kind: Any, values: dict[str, Any], pieces: _Pieces) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    _checked(values, names == list(values))
    return kind(**{name: _typed(hints[name], values[name], pieces) for name in names})


def _tuples(value: Any) -> Any:
    """JSON has lists only; what it came from had tuples only."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _checked(value: Any, is_right: bool) -> Any:
    if not is_right:
        raise _Refused("of other contents than this version of ktls has")
    return value
