from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import pytest

from ktls.cli.system import Driver, Module, counters, drivers, module_state

if TYPE_CHECKING:
    from pathlib import Path

CRYPTO = """\
name         : gcm(aes)
driver       : generic-gcm-aesni
module       : aesni_intel
priority     : 400
internal     : no
type         : aead

name         : gcm(aes)
driver       : gcm_base(ctr(aes-generic),ghash-generic)
priority     : 100
internal     : no

name         : gcm(aes)
driver       : __generic-gcm-aesni
priority     : 900
internal     : yes

name         : rfc7539(chacha20,poly1305)
driver       : rfc7539(chacha20-generic,poly1305-generic)
priority     : 100
"""


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="ascii")


def test_driver_with_the_highest_priority(tmp_path: Path) -> None:
    put(tmp_path / "crypto", CRYPTO)
    assert drivers(tmp_path) == (
        Driver("gcm(aes)", "generic-gcm-aesni", 400),
        Driver("ccm(aes)", None, -1),
        Driver("rfc7539(chacha20,poly1305)", "rfc7539(chacha20-generic,poly1305-generic)", 100),
    )


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("generic-gcm-aesni", "AES-NI"),
        ("generic-gcm-vaes-avx512", "VAES"),
        ("rfc7539-simd", "SIMD"),
        ("gcm-aes-ce", "ARMv8 crypto"),
        ("gcm_base(ctr(aes-generic),ghash-generic)", "generic C"),
        ("gcm_base(ctr(aes-lib),ghash-lib)", "the kernel's crypto library"),
        (None, "not in use yet"),
    ],
)
def test_what_a_driver_computes_with(name: str | None, means: str) -> None:
    assert Driver("gcm(aes)", name).means == means


def test_nothing_to_read(tmp_path: Path) -> None:
    """No /proc, no /lib/modules: as in some sandboxes."""
    assert counters(tmp_path) == {}
    assert drivers(tmp_path) == ()
    module = module_state(tmp_path, tmp_path)
    assert module == Module(loaded=False, on_disk=None)
    assert "as root on the host: modprobe tls" in (module.advice() or "")


def test_counters(tmp_path: Path) -> None:
    put(tmp_path / "net/tls_stat", "TlsCurrTxSw   \t3\nTlsDecryptError\t0\nodd line here\n")
    assert counters(tmp_path) == {"TlsCurrTxSw": 3, "TlsDecryptError": 0}


def test_module_loaded(tmp_path: Path) -> None:
    put(tmp_path / "sys/net/ipv4/tcp_available_ulp", "espintcp mptcp tls\n")
    module = module_state(tmp_path, tmp_path)
    assert module.loaded
    assert module.advice() is None


@pytest.mark.parametrize(
    ("listed", "on_disk", "advice"),
    [
        ("kernel/net/tls/tls.ko.xz: kernel/crypto/aead.ko\n", True, "as root: modprobe tls"),
        ("kernel/net/mptcp/mptcp.ko:\n", False, "installed without the tls module"),
    ],
)
def test_module_not_loaded(tmp_path: Path, listed: str, on_disk: bool, advice: str) -> None:
    put(tmp_path / platform.release() / "modules.dep", listed)
    module = module_state(tmp_path, tmp_path)
    assert module == Module(loaded=False, on_disk=on_disk)
    assert advice in (module.advice() or "")
