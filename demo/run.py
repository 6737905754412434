"""``make demo``: shows kernel TLS at work, on this machine's kernel or on the lab's, with the kernel's own counters as evidence.

This file only finds a place to run; ``show.py`` beside it does the showing. With ``KTLS_REQUIRE_LAB=1`` (CI) nothing but kernel TLS will do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ktls

HERE = Path(__file__).resolve().parent
LAB = HERE.parent / "lab"
#: ``lab/run`` failed itself: no mirror in reach, no space, the kernel does not boot.
LAB_FAILED = 125


def main() -> int:
    """Run the demo in the best place there is; return its exit status."""
    peers = _peers()
    environment = dict(os.environ)
    if peers is not None:
        environment["PATH"] = f"{peers}{os.pathsep}{environment.get('PATH', '')}"
    show = [sys.executable, str(HERE / "show.py")]
    capabilities = ktls.probe()
    if capabilities.kernel_tls and capabilities.rekey_tx and capabilities.rekey_rx:
        print("This machine's kernel has kernel TLS with rekey: the demo runs on it.", flush=True)
        return subprocess.run([*show, "kernel"], env=environment, check=False).returncode
    missing = capabilities.kernel_tls.reason or "it can't change keys"
    print(f"This machine's kernel will not do ({missing}).", flush=True)
    print("The demo runs on the lab's user-mode kernel, with this machine's files.\n", flush=True)
    lab = [str(LAB / "run"), "--kernel", "rekey", "--timeout", "600", "--", *show, "kernel"]
    status = subprocess.run(lab, env=environment, check=False).returncode
    if status != LAB_FAILED or os.environ.get("KTLS_REQUIRE_LAB"):
        return status
    print("\nThe lab can't be had here (see above): the demo runs in user space instead.")
    print("What it shows of the kernel is marked as not run.\n", flush=True)
    return subprocess.run([*show, "userspace"], env=environment, check=False).returncode


def _peers() -> str | None:
    """Return the directory of the peers' programs (curl, openssl), or None to use what this machine has."""
    found = subprocess.run([str(LAB / "peers")], capture_output=True, text=True, check=False)
    for line in found.stdout.splitlines():
        name, _, path = line.partition("=")
        if name == "curl":
            return str(Path(path).parent)
    return None


if __name__ == "__main__":
    sys.exit(main())
