"""Which engine a context gets."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import pytest

from ktls.handshake import engine
from ktls.handshake.engine import engine_for, register_engine
from ktls.handshake.openssl import OpenSSLHandshake

if TYPE_CHECKING:
    from .helpers import Pki


class PlainSubclass(ssl.SSLContext):
    """As ``ktls.SSLContext``: adds, but leaves ``wrap_bio`` alone."""


class Foreign(ssl.SSLContext):
    """As truststore and rustls wrappers: claims to be an ``ssl.SSLContext``."""

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        raise AssertionError("must not be called")


def test_contexts_of_the_ssl_module() -> None:
    for kind in (ssl.SSLContext, PlainSubclass):
        assert engine_for(kind(ssl.PROTOCOL_TLS_CLIENT)) is OpenSSLHandshake


@pytest.mark.parametrize("context", [Foreign(ssl.PROTOCOL_TLS_CLIENT), None, object(), True])
def test_foreign_contexts_are_refused_by_name(context: object) -> None:
    kind = type(context)
    with pytest.raises(TypeError, match=rf"{kind.__module__}\.{kind.__qualname__}.*wrap_bio"):
        engine_for(context)


def test_another_engine_can_stand_beside(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_engines", list(engine._engines))
    register_engine(lambda context: isinstance(context, Foreign), OpenSSLHandshake)
    assert engine_for(Foreign(ssl.PROTOCOL_TLS_CLIENT)) is OpenSSLHandshake
    assert engine_for(pki.client()) is OpenSSLHandshake
    with pytest.raises(TypeError):
        engine_for("nothing")
