"""Servers as processes of their own, started by the command lines that a user would type, and what they must leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.peers.programs import PATIENCE, Output

__all__ = ("ServerProcess", "installed")

_ROOT: Final = Path(__file__).parents[2]
_ADDRESS: Final = rb"https?://127\.0\.0\.1:(\d+)"
#: What a server may not say, however it is stopped.
_COMPLAINTS: Final = re.compile(r"Traceback|Warning|ERROR|CRITICAL|Exception|Fatal|never awaited")


def installed(program: str) -> str:
    """Return the path of a command that came with a package."""
    return str(Path(sys.executable).with_name(program))


class ServerProcess:
    """A running server, with its workers. It says its address on one of its streams; the port is chosen by the kernel."""

    def __init__(self, argv: Sequence[object], file: Path) -> None:
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=_ROOT,
            env={**os.environ, "SITE_FILE": str(file), "PYTHONWARNINGS": "default"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.out = Output(self._process.stdout)
        self.err = Output(self._process.stderr)
        self.port = 0

    def await_address(self, stream: Output) -> None:
        """Wait until the server has said on ``stream`` where it listens."""
        self.port = int(stream.expect(_ADDRESS)[1])

    @property
    def pid(self) -> int:
        """The process id of the process that was started."""
        return self._process.pid

    def stop(self, status: int = 0, *, allowed: str | None = None) -> None:
        """End it by SIGTERM, as an administrator would; it must do so in order, with ``status``, and without a word of complaint but for ``allowed``, a pattern."""
        self._process.send_signal(signal.SIGTERM)
        ended = self._process.wait(PATIENCE)
        said = (self.out.all() + self.err.all()).decode()
        if allowed is not None:
            said = re.sub(allowed, "", said)
        assert not _COMPLAINTS.search(said), said
        assert ended == status, said

    def clear(self) -> None:
        """Leave nothing of it behind, workers included, however the test went."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(PATIENCE)
        self.out.close()
        self.err.close()
