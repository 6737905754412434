"""Other people's TLS programs as peers: started, typed into, listened to, and gone when the test ends."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Final

import pytest

#: Bound of every wait for a program. Generous: the lab is slow, and a machine may be busy.
PATIENCE: Final = 30.0


def find_program(name: str) -> str:
    """Return the path of a peer; a missing one is a failure, because tests that did not run are not tests that passed."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not on PATH: run lab/peers and put its directory there")
    return path


class Output:
    """What a program writes to one of its streams, collected by a thread as it comes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._data = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._seen = 0
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        while chunk := os.read(self._stream.fileno(), 65536):
            with self._changed:
                self._data += chunk
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __bytes__(self) -> bytes:
        with self._changed:
            return bytes(self._data)

    def all(self) -> bytes:
        """Return everything, once the stream has ended."""
        self._thread.join(PATIENCE)
        return bytes(self)

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Wait for ``pattern`` behind what was expected before."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while True:
                match = expression.search(bytes(self._data), self._seen)
                if match is not None:
                    self._seen = match.end()
                    return match
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    what = "the program ended" if self._ended else "timeout"
                    raise AssertionError(
                        f"{what} without {pattern!r}: {bytes(self._data)[-500:]!r}"
                    )
                self._changed.wait(left)

    def wait_for(self, alphabet: bytes, count: int) -> bytes:
        """Wait until ``count`` bytes of ``alphabet`` have come, and return all of those; what else the program says is left out."""
        others = bytes(set(range(256)) - set(alphabet))
        deadline = time.monotonic() + PATIENCE
        found, at = bytearray(), 0
        with self._changed:
            while True:
                found += self._data[at:].translate(None, others)
                at = len(self._data)
                left = deadline - time.monotonic()
                if len(found) >= count or self._ended or left <= 0:
                    return bytes(found)
                self._changed.wait(left)

    def close(self) -> None:
        self._thread.join(PATIENCE)
        self._stream.close()


class Program:
    """One running program. It dies with us, however we end."""

    def __init__(self, argv: Sequence[object], env: Mapping[str, str] | None = None) -> None:
        name, *arguments = [str(argument) for argument in argv]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", find_program(name), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **(env or {})},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin = self._process.stdin
        self.out = Output(self._process.stdout)
        self.err = Output(self._process.stderr)
        #: Where it listens, if it is a server.
        self.port = 0
        self._reserved: socket.socket | None = None

    @classmethod
    def server(cls, argv: Sequence[object], env: Mapping[str, str] | None = None) -> Program:
        """Start a server that must be told its port: ``{port}`` in ``argv`` stands for it.

        The port stays bound by us (both sides use SO_REUSEADDR), so nobody else gets it in between.
        """
        reserved = socket.socket()
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        number = reserved.getsockname()[1]
        try:
            program = cls([str(word).replace("{port}", str(number)) for word in argv], env)
        except BaseException:
            reserved.close()
            raise
        program.port, program._reserved = number, reserved
        return program

    def type(self, data: bytes) -> None:
        """Write ``data`` to its standard input, all of it."""
        view = memoryview(data)
        while view:
            view = view[self._stdin.write(view) :]

    def end_input(self) -> None:
        self._stdin.close()

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        return self._process.wait(PATIENCE)

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        """End it, whatever it does."""
        self._stdin.close()
        self.kill()
        self._process.wait(PATIENCE)
        for output in (self.out, self.err):
            output.close()
        if self._reserved is not None:
            self._reserved.close()
