"""Errors: what they are, what they say, and that they survive copying and pickling."""

from __future__ import annotations

import copy
import pickle
import ssl

import pytest

from ktls.protocol.enums import AlertDescription
from ktls.protocol.errors import (
    AlertReceived,
    KeyLimitError,
    KTLSError,
    LocalProtocolError,
    OffloadError,
    RemoteProtocolError,
    TruncatedError,
)

ERRORS: dict[str, KTLSError] = {
    "base": KTLSError("what happened"),
    "local": LocalProtocolError("you may not"),
    "remote": RemoteProtocolError("it broke a rule", AlertDescription.DECODE_ERROR),
    "alert": AlertReceived(AlertDescription.INTERNAL_ERROR),
    "unknown alert": AlertReceived(254),
    "truncated": TruncatedError("no close_notify"),
    "offload": OffloadError("no tls module"),
    "limit": KeyLimitError("key used up"),
}
TEXTS = {
    "base": "what happened",
    "local": "you may not",
    "remote": "it broke a rule",
    "alert": "the peer sent the alert internal_error",
    "unknown alert": "the peer sent the alert unknown(254)",
    "truncated": "no close_notify",
    "offload": "kernel TLS was demanded but can't be used: no tls module",
    "limit": "key used up",
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_one_of_the_ssl_module(name: str) -> None:
    assert isinstance(ERRORS[name], ssl.SSLError)
    assert isinstance(ERRORS[name], OSError)


def test_truncation_is_the_eof_error_of_the_ssl_module() -> None:
    assert isinstance(ERRORS["truncated"], ssl.SSLEOFError)
    assert [name for name in ERRORS if isinstance(ERRORS[name], ssl.SSLEOFError)] == ["truncated"]


@pytest.mark.parametrize("name", ERRORS)
def test_str_is_the_message(name: str) -> None:
    assert str(ERRORS[name]) == ERRORS[name].message == TEXTS[name]


def test_only_a_local_error_is_recoverable() -> None:
    assert [name for name, error in ERRORS.items() if error.recoverable] == ["local"]


def test_attributes() -> None:
    remote = RemoteProtocolError("x", AlertDescription.RECORD_OVERFLOW)
    assert remote.alert is AlertDescription.RECORD_OVERFLOW
    assert AlertReceived(AlertDescription.UNKNOWN_CA).description is AlertDescription.UNKNOWN_CA
    assert AlertReceived(254).description == 254
    assert OffloadError("old kernel").reason == "old kernel"


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("way", ["copy", "deepcopy", *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_a_copy_loses_nothing(name: str, way: str | int) -> None:
    error = ERRORS[name]
    if isinstance(way, int):
        twin = pickle.loads(pickle.dumps(error, way))
    else:
        twin = getattr(copy, way)(error)
    assert type(twin) is type(error)
    assert twin is not error
    assert (str(twin), repr(twin), twin.args) == (str(error), repr(error), error.args)
    assert vars(twin) == vars(error)


def test_notes_survive_copying() -> None:
    error = AlertReceived(AlertDescription.UNKNOWN_CA)
    error.add_note("while reading")
    assert copy.copy(error).__notes__ == ["while reading"]
