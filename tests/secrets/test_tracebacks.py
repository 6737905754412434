"""Crash reporters send the locals of every frame: no key may be among them."""

from __future__ import annotations

import errno
import traceback
from typing import TYPE_CHECKING, Final

import pytest

from ktls.protocol.suites import CipherSuite
from ktls.record.kernel import KernelReceiver, KernelSender, attach
from ktls.testing import loopback_pair, made_up_keys

from .finding import Secrets

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

#: Kernels never change a key of TLS 1.2.
SUITE: Final = CipherSuite.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
OLD, NEW = made_up_keys(SUITE, "old"), made_up_keys(SUITE, "new")


def shown(call: Callable[[], object]) -> str:
    """What a crash reporter sends of the error that ``call`` meets: the kernel refuses."""
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == errno.EBUSY
    return "".join(
        traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    )


@pytest.mark.parametrize("layer", [KernelSender, KernelReceiver])
def test_keys_that_the_kernel_refuses(layer: type[KernelSender] | type[KernelReceiver]) -> None:
    secrets = Secrets({"old": OLD.key, "new": NEW.key})
    with loopback_pair() as (sock, _):
        attach(sock)
        half = layer(sock, SUITE, OLD, 0, can_change_key=False)
        texts = [
            shown(lambda: half.install(NEW)),
            shown(lambda: layer(sock, SUITE, NEW, 0, can_change_key=False)),
        ]
    for text in texts:
        assert "redacted" in text  # locals are shown
        assert secrets.shown_in(text) == set()


def test_such_a_text_would_be_noticed() -> None:
    info = NEW.key

    def fail() -> None:
        raise OSError(errno.EBUSY, f"{info!r}")

    assert Secrets({"new": NEW.key}).shown_in(shown(fail)) == {"new"}
