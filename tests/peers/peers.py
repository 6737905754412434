"""The desk of a test: starts peers, makes connections with them, checks each, and clears up."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import ktls

from .parties import (
    ALPHABET,
    HOST,
    TLS12,
    TLS13,
    KernelCounters,
    Pki,
    Task,
    listen,
    payload,
    read_exactly,
    same,
)
from .programs import PATIENCE, Program

Role: TypeAlias = Literal["client", "server"]


@dataclass
class Link:
    """One connection: our end, and the program at the other."""

    tls: ktls.KTLSSocket
    program: Program
    #: All data that we sent: the program's output has to be the same.
    _sent: bytearray = field(default_factory=bytearray)

    def send(self, data: bytes) -> None:
        """Send data of the alphabet; ``check_sent`` looks whether it arrived."""
        self._sent += data
        self.tls.sendall(data)

    def sent(self, data: bytes) -> None:
        """Note data that was sent in another way."""
        self._sent += data

    def check_sent(self) -> None:
        """Wait until the program has written what we sent: every byte, nothing else."""
        assert same(self.program.out.wait_for(ALPHABET, len(self._sent)), bytes(self._sent))

    def type(self, data: bytes) -> None:
        """What is typed arrives here."""
        with Task(lambda: read_exactly(self.tls, len(data))) as received:
            self.program.type(data)
        assert same(received.result(), data)

    def take_turns(self, size: int) -> None:
        """Data to the program, then data from it: what it owes us comes with that (OpenSSL answers a KeyUpdate with its next write)."""
        self.send(payload(size, seed=3 + len(self._sent)))
        self.check_sent()
        self.type(payload(size))

    def exchange(self, size: int) -> None:
        """Data in both directions at once, compared byte for byte."""
        up, down = payload(size, seed=1), payload(size, seed=2 + len(self._sent))
        with (
            Task(lambda: read_exactly(self.tls, size)) as received,
            Task(lambda: self.program.type(up)),
        ):
            self.send(down)
        assert same(received.result(), up)
        self.check_sent()


@dataclass
class Peers:
    """``role`` is always ours. What is given to a method as ``arguments`` goes to the program."""

    pki: Pki
    counters: KernelCounters
    stack: ExitStack

    # --- programs ----------------------------------------------------------------------------------------------

    def start(self, argv: Sequence[object], env: Mapping[str, str] | None = None) -> Program:
        program = Program(argv, env)
        self.stack.callback(program.stop)
        return program

    def start_server(self, argv: Sequence[object], env: Mapping[str, str] | None = None) -> Program:
        """Start a server; ``{port}`` in ``argv`` stands for its port."""
        program = Program.server(argv, env)
        self.stack.callback(program.stop)
        return program

    # --- our end -----------------------------------------------------------------------------------------------

    def adopt(self, tls: ktls.KTLSSocket, *, small_records: bool = False) -> ktls.KTLSSocket:
        """Check a new connection, and close it with the test."""
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # tests take turns a lot
        self.stack.callback(_close, tls)
        self.counters.established(tls, small_records=small_records)
        return tls

    def listener(self) -> socket.socket:
        return self.stack.enter_context(listen())

    def accept(
        self,
        listener: socket.socket,
        context: ktls.SSLContext,
        *,
        ragged: bool = False,
        small_records: bool = False,
    ) -> ktls.KTLSSocket:
        sock, _ = listener.accept()
        self.stack.callback(sock.close)
        sock.settimeout(PATIENCE)
        return self.adopt(
            context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=ragged),
            small_records=small_records,
        )

    def connect(
        self,
        port: int,
        context: ktls.SSLContext,
        *,
        session: ssl.SSLSession | None = None,
        ragged: bool = False,
    ) -> ktls.KTLSSocket:
        sock = self.stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        return self.adopt(
            context.wrap_socket(
                sock, server_hostname=HOST, session=session, suppress_ragged_eofs=ragged
            )
        )

    # --- openssl -----------------------------------------------------------------------------------------------

    def s_server(self, *arguments: object, rsa: bool = False) -> Program:
        """``openssl s_server``, listening. It takes commands, so what it prints is mixed with what it received."""
        certificate = self.pki.rsa if rsa else self.pki.ecdsa
        program = self.start(
            ["openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", certificate, *arguments]
        )
        program.port = int(program.out.expect(rb"ACCEPT \S+:(\d+)")[1])
        return program

    def s_client(
        self,
        context: ktls.SSLContext,
        *arguments: object,
        listener: socket.socket | None = None,
        brief: bool = True,
    ) -> Link:
        """``openssl s_client``, connected to us. It verifies our certificate. Not ``brief`` it says more, among the data."""
        listener = listener or self.listener()
        program = self.start(
            [
                *("openssl", "s_client", "-verify_return_error", *(["-brief"] if brief else [])),
                *("-connect", f"127.0.0.1:{listener.getsockname()[1]}"),
                *("-servername", HOST, "-verify_hostname", HOST, "-CAfile", self.pki.ca),
                *arguments,
            ]
        )
        tls = self.accept(listener, context, small_records="-maxfraglen" in arguments)
        if brief:
            program.err.expect(b"Verification: OK")
        return Link(tls, program)

    def openssl(
        self,
        role: Role,
        version: ssl.TLSVersion,
        suite: str | None = None,
        *arguments: object,
        limits: ktls.KeyLimits | None = None,
        keylog: Path | None = None,
    ) -> Link:
        """A connection with ``openssl`` in the role that is not ours."""
        words = [*openssl_words(version, suite), *arguments]
        rsa = version == TLS12 and suite is not None and "ECDSA" not in suite
        context = self.pki.server(version) if role == "server" else self.pki.client(version)
        if suite is not None and version == TLS12:
            context.set_ciphers(suite)
        if limits is not None:
            context.key_limits = limits
        if keylog is not None:
            context.keylog_filename = str(keylog)
        if role == "server":
            link = self.s_client(context, *words)
        else:
            program = self.s_server(*words, rsa=rsa)
            link = Link(self.connect(program.port, context), program)
        cipher = link.tls.cipher()
        assert cipher is not None
        assert suite is None or cipher[0] == suite
        assert link.tls.version() == ("TLSv1.3" if version == TLS13 else "TLSv1.2")
        return link

    # --- gnutls ------------------------------------------------------------------------------------------------

    def gnutls_serv(self, *arguments: object) -> Program:
        """``gnutls-serv --echo``, listening: it echoes line by line."""
        program = self.start_server(
            [
                *("gnutls-serv", "--echo", "--port", "{port}", "--disable-client-cert"),
                *("--x509certfile", self.pki.ecdsa, "--x509keyfile", self.pki.ecdsa, *arguments),
            ]
        )
        program.err.expect(rb"IPv4 0\.0\.0\.0 port \d+\.\.\.done")
        return program

    def start_gnutls_cli(
        self,
        listener: socket.socket,
        *arguments: object,
        env: Mapping[str, str] | None = None,
    ) -> Program:
        """``gnutls-cli``, on its way to us. It verifies our certificate."""
        return self.start(
            [
                *("gnutls-cli", "127.0.0.1", "--port", listener.getsockname()[1]),
                *("--verify-hostname", HOST, "--sni-hostname", HOST, "--x509cafile", self.pki.ca),
                *("--inline-commands", *arguments),
            ],
            env,
        )

    def gnutls_cli(
        self,
        context: ktls.SSLContext,
        *arguments: object,
        env: Mapping[str, str] | None = None,
    ) -> Link:
        """``gnutls-cli``, connected to us."""
        listener = self.listener()
        program = self.start_gnutls_cli(listener, *arguments, env=env)
        tls = self.accept(listener, context, small_records="--recordsize" in arguments)
        program.out.expect(b"Handshake was completed")
        return Link(tls, program)


def openssl_words(version: ssl.TLSVersion, suite: str | None) -> list[str]:
    """Options of ``openssl`` for one version and one suite."""
    words = ["-tls1_3" if version == TLS13 else "-tls1_2"]
    if suite is not None:
        words += ["-ciphersuites" if version == TLS13 else "-cipher", suite]
    return words


def _close(tls: ktls.KTLSSocket) -> None:
    with contextlib.suppress(OSError):  # the peer may be gone; tests of closing close by themselves
        tls.close()
