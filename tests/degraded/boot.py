"""Run as a program, as root of a lab kernel just started (``lab/run --no-tls-module``): take modules away, and run ``session`` each time.

    python -m tests.degraded.boot DIRECTORY

Prints one JSON object: what ``session`` printed, by situation. A module is hidden by an empty file on top of it; what was loaded before stays loaded, hence the order.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

_BUSYBOX: Final = "/run/lab/bin/busybox"
_MODULES: Final = Path("/lib/modules") / platform.release() / "kernel"
_CIPHERS: Final = ("crypto/gcm.ko", "crypto/chacha20poly1305.ko", "crypto/ccm.ko")


def hide(module: str) -> None:
    """Make a module unloadable."""
    subprocess.run([_BUSYBOX, "mount", "-o", "bind", "/dev/null", _MODULES / module], check=True)


def show(module: str) -> None:
    subprocess.run([_BUSYBOX, "umount", _MODULES / module], check=True)


def session(directory: str, *words: str) -> Any:
    command = [sys.executable, "-W", "error", "-m", "tests.degraded.session", directory, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main(directory: str) -> None:
    found = {"module not loaded, nobody": session(directory, "nobody")}
    hide("net/tls/tls.ko")
    found["no module"] = session(directory)
    show("net/tls/tls.ko")
    for cipher in _CIPHERS:
        hide(cipher)
    found["no ciphers"] = session(directory)
    show("crypto/gcm.ko")
    found["no ChaCha20"] = session(directory)
    for cipher in _CIPHERS[1:]:
        show(cipher)
    found["all modules, nobody"] = session(directory, "nobody")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
