"""The standard ``ssl`` module as a handshake engine.

Theory of operation
-------------------
The engine runs over two memory BIOs and is fed one record at a time, so it can't have taken anything beyond the peer's Finished when it
says that it is done: what is left stays with the framer, still protected. Along the way we look at the records that go by, in both directions, for what the
key log does not say: client_random (to know our lines), server_random (TLS 1.2 key block), and each side's Finished in TLS 1.2.

Where the record layers must go on counting:

* TLS 1.3. Each key starts at 0, and the client has sent nothing under its application key. A server has: one record per session ticket, and they are
  exactly the protected records in the output of the call that completed the handshake.
* TLS 1.2. Finished was record 0 in both directions. The explicit nonce of GCM starts where the engine likes; we go on from that of
  our own Finished.

None of this is believed: the records that were counted are opened with the derived keys. If that, or anything else on the way to the secrets, fails,
then there are no secrets, with the reason, and the engine keeps the connection. It has seen every record up to here and missed none.
"""

from __future__ import annotations

import ssl
import weakref
from typing import TYPE_CHECKING, Final, final

from ktls.protocol.enums import ContentType, HandshakeType, ProtocolVersion, Role
from ktls.protocol.errors import KTLSError, LocalProtocolError
from ktls.protocol.key_schedule import TrafficKeys, TrafficSecret, tls12_key_block
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite, suite_by_openssl_name
from ktls.record.aead import HEADER_LENGTH, RecordProtection

from .framing import ClientHello, ClientHelloWatch, RecordFramer, ServerHelloWatch, split_records
from .gate import gate
from .keylog import Expected, SecretsUnavailableError, tap_for
from .peer_info import peer_info
from .result import CipherTuple, EngineObject, HandshakeResult, HandshakeSecrets
from .sni import Switchable, watch_switches
from .tickets import TicketRelay, discard_engine

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("OpenSSLHandshake", "accepts")

_EXPLICIT_NONCE: Final = 8


def accepts(context: object) -> bool:
    """Whether ``context`` is one of the ``ssl`` module that really uses the ``ssl`` module."""
    return isinstance(context, ssl.SSLContext) and type(context).wrap_bio is ssl.SSLContext.wrap_bio


class _Wire:
    """What one direction shows to somebody who reads along."""

    __slots__ = ("_changed", "finished")

    def __init__(self) -> None:
        self._changed = False
        #: The first handshake record after ChangeCipherSpec. In TLS 1.2 that is Finished, record 0 of the connection's keys.
        self.finished: bytes | None = None

    def see(self, record: bytes) -> None:
        if self.finished is None and len(record) > HEADER_LENGTH:
            if record[0] == ContentType.CHANGE_CIPHER_SPEC:
                self._changed = True
            elif self._changed and record[0] == ContentType.HANDSHAKE:
                self.finished = record


@final
class OpenSSLHandshake:
    """One handshake of the ``ssl`` module; a ``HandshakeEngine``."""

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        keep_session: bool = True,
    ) -> None:
        self._role = Role.SERVER if server_side else Role.CLIENT
        self._server_hostname = server_hostname
        self._keep_session = keep_session
        self._post_handshake_auth = not server_side and context.post_handshake_auth
        self._tap = tap_for(context)
        self._expected: Expected | None = None
        if server_side:
            watch_switches(context)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with gate:  # from Python 3.13 on a context has a lock of its own, and a child would wait for it for ever
            sslobject = context.wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if isinstance(sslobject, Switchable):
            sslobject.ktls_on_switch = weakref.WeakMethod(self._context_switched)
        self._engine: EngineObject | None = EngineObject(sslobject, incoming, outgoing)
        self._framer = RecordFramer()
        self._client_hello = ClientHelloWatch()
        self._server_hello = ServerHelloWatch()
        self._sent, self._received = _Wire(), _Wire()
        self._output = bytearray()
        self._started = self._eof = self._failed = False
        self._result: HandshakeResult | None = None

    def __repr__(self) -> str:
        state = "failed" if self._failed else "complete" if self._result else "in progress"
        return f"<OpenSSLHandshake {self._role.value}, {state}>"

    def __del__(self) -> None:
        # wrap_bio may have raised in __init__, before there was anything to give up.
        if getattr(self, "_expected", None) is not None:
            self._forget()

    # --- bytes in, bytes out -----------------------------------------------------------------------------------

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they came from the network, however many; ``ValueError`` if the handshake is complete."""
        if self._result is not None:
            raise ValueError("the handshake is complete: these bytes are not for it")
        self._framer.feed(data)

    def eof(self) -> None:
        """Note that the peer closed the TCP connection."""
        self._eof = True

    def data_to_send(self) -> bytes:
        """Return the bytes that are to be sent now, once."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def bytes_needed(self) -> int:
        """Return how many bytes may be received without reading past the handshake."""
        return 0 if self._result is not None else self._framer.need()

    def step(self) -> bool:
        """Go as far as the bytes fed so far allow; return whether the handshake is complete. Raises ``ssl.SSLError``."""
        if self._result is not None:
            return True
        if self._engine is None:
            raise LocalProtocolError("the handshake has failed or was closed")
        try:
            return self._run(self._engine)
        except BaseException:
            self._failed = True
            self.close()
            raise

    def result(self) -> HandshakeResult:
        """Return the result; ``ValueError`` if the handshake is not complete."""
        if self._result is None:
            raise ValueError("the handshake is not complete")
        return self._result

    def close(self) -> None:
        """Abandon a handshake that will not be finished."""
        if self._result is None:
            self._forget()
            self._engine = None

    # --- the run -----------------------------------------------------------------------------------------------

    def _run(self, engine: EngineObject) -> bool:
        if not self._started:
            self._started = True
            if self._role is Role.CLIENT and self._handshake(engine):
                return True
        for record in self._framer:
            self._see_received(record)
            engine.incoming.write(record)
            if self._handshake(engine):
                return True
        if self._eof:
            self._end(engine)
        return False

    def _handshake(self, engine: EngineObject) -> bool:
        """Let the engine go as far as it can; return whether it is done."""
        done = False
        try:
            with gate:
                engine.sslobject.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            pass
        finally:
            output = engine.outgoing.read()
            self._output += output
        records = split_records(output) if output else []
        for record in records:
            self._see_sent(record)
        if done:
            self._complete(engine, records)
        return done

    def _end(self, engine: EngineObject) -> None:
        """The peer is gone: let the engine say so."""
        engine.incoming.write(self._framer.take_rest())
        engine.incoming.write_eof()
        try:
            self._handshake(engine)
        except ssl.SSLEOFError:
            raise
        except ssl.SSLError as error:
            raise ssl.SSLEOFError(
                ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol"
            ) from error
        raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")

    def _see_received(self, record: bytes) -> None:
        self._received.see(record)
        if self._role is Role.CLIENT:
            self._server_hello.see(record)
        else:
            self._see_client_hello(record)

    def _see_sent(self, record: bytes) -> None:
        self._sent.see(record)
        if self._role is Role.SERVER:
            self._server_hello.see(record)
        else:
            self._see_client_hello(record)

    def _see_client_hello(self, record: bytes) -> None:
        """Look for the ClientHello, and announce its random to the tap before any secret can follow from it."""
        if self._client_hello.hello is None:
            self._client_hello.see(record)
            if self._client_hello.hello is not None:
                self._expected = self._tap.expect(self._client_hello.hello.random)

    def _context_switched(self, context: ssl.SSLContext) -> None:
        """A server name callback is about to put another context in place."""
        if not isinstance(context, ssl.SSLContext):
            return  # ssl will complain
        self._forget()
        self._tap = tap_for(context)
        if self._client_hello.hello is not None:
            self._expected = self._tap.expect(self._client_hello.hello.random)

    def _forget(self) -> None:
        expected, self._expected = self._expected, None
        if expected is not None:
            self._tap.forget(expected)

    # --- the end -----------------------------------------------------------------------------------------------

    def _complete(self, engine: EngineObject, last_output: list[bytes]) -> None:
        sslobject = engine.sslobject
        version, cipher = _facts_of(sslobject)
        suite = suite_by_openssl_name(cipher[0])
        secrets, reason = None, None
        try:
            secrets = self._secrets(sslobject, version, cipher[0], suite, last_output)
        except SecretsUnavailableError as error:
            reason = str(error)
        self._forget()
        hello = self._client_hello.hello
        client_random = hello.random if hello is not None else None
        info = peer_info(sslobject, self._role, self._server_hostname, hello)
        self._result = HandshakeResult(
            role=self._role,
            version=version,
            cipher=cipher,
            suite=suite,
            secrets=secrets,
            no_secrets_reason=reason,
            leftover=engine.incoming.read() + self._framer.take_rest(),
            max_fragment=_max_fragment(self._role, version, hello),
            info=info,
            engine_object=engine if secrets is None else None,
            tickets=None if secrets is None else self._hand_over(engine, secrets),
            client_random=client_random,
            key_log=self._key_logger(client_random),
        )
        self._engine = None

    def _key_logger(self, client_random: bytes | None) -> Callable[[str, bytes], None] | None:
        """Return what writes later secrets to the user's key log; None without one, to keep nothing for it."""
        log = self._tap.log
        if client_random is None or self._tap.user_keylog is None:
            return None

        def key_log(label: str, secret: bytes) -> None:
            log(label, client_random, secret)

        return key_log

    def _hand_over(self, engine: EngineObject, secrets: HandshakeSecrets) -> TicketRelay | None:
        """Let go of the engine, or make a relay of it."""
        if self._role is Role.CLIENT and self._keep_session:
            return TicketRelay(
                engine.sslobject,
                engine.incoming,
                engine.outgoing,
                rx_secret=secrets.rx_secret,
                tx_secret=secrets.tx_secret,
                sweep=self._tap.sweep,
            )
        discard_engine(engine.sslobject)
        return None

    def _secrets(
        self,
        sslobject: ssl.SSLObject,
        version: str,
        cipher_name: str,
        suite: CipherSuite | None,
        last_output: list[bytes],
    ) -> HandshakeSecrets:
        """Return the proven secrets, or raise ``SecretsUnavailableError``."""
        if version not in ("TLSv1.2", "TLSv1.3"):
            raise SecretsUnavailableError(f"{version} is too old")
        if suite is None:
            raise SecretsUnavailableError(
                f"no record layer of ktls protects the cipher suite {cipher_name}"
            )
        if sslobject.compression() is not None:
            raise SecretsUnavailableError("the connection uses TLS compression")
        if self._post_handshake_auth and version == "TLSv1.3":
            raise SecretsUnavailableError("the context offers post-handshake authentication")
        hello, expected = self._client_hello.hello, self._expected
        if hello is None or expected is None:
            raise SecretsUnavailableError("the ClientHello was not understood")
        self._expected = None
        try:
            log = self._tap.collect(expected)
            if suite.version is ProtocolVersion.TLSv1_3:
                return self._secrets13(suite, log, last_output)
            return self._secrets12(suite, log, hello.random)
        except KeyError as error:
            raise SecretsUnavailableError(f"the key log has no {error.args[0]}") from None
        except KTLSError as error:
            raise SecretsUnavailableError(
                f"the secrets of the key log do not fit the connection: {error}"
            ) from None
        except ValueError:
            raise SecretsUnavailableError("the key log has a secret of a wrong length") from None
        except OSError as error:
            raise SecretsUnavailableError(f"the key log can't be read: {error.strerror}") from None

    def _secrets13(
        self, suite: CipherSuite, log: dict[str, bytes], last_output: list[bytes]
    ) -> HandshakeSecrets:
        client = TrafficSecret(suite, log["CLIENT_TRAFFIC_SECRET_0"])
        server = TrafficSecret(suite, log["SERVER_TRAFFIC_SECRET_0"])
        is_client = self._role is Role.CLIENT
        tx, rx = (client, server) if is_client else (server, client)
        sent = 0
        if not is_client:
            protection = RecordProtection(suite, tx.keys())
            _prove(protection, last_output, HandshakeType.NEW_SESSION_TICKET)
            sent = protection.sequence_number
        return HandshakeSecrets(
            suite=suite,
            tx=tx,
            rx=rx,
            tx_sequence_number=sent,
            rx_sequence_number=0,
            exporter_secret=log.get("EXPORTER_SECRET"),
        )

    def _secrets12(
        self, suite: CipherSuite, log: dict[str, bytes], client_random: bytes
    ) -> HandshakeSecrets:
        server_random = self._server_hello.random
        ours, theirs = self._sent.finished, self._received.finished
        if server_random is None or ours is None or theirs is None:
            raise SecretsUnavailableError("the handshake was not understood")
        client, server = tls12_key_block(suite, log["CLIENT_RANDOM"], client_random, server_random)
        tx, rx = (client, server) if self._role is Role.CLIENT else (server, client)
        for keys, finished in ((tx, ours), (rx, theirs)):
            _prove(RecordProtection(suite, keys), [finished], HandshakeType.FINISHED)
        if suite.aead.fixed_iv_length == 4:
            body = ours[HEADER_LENGTH:]
            explicit = int.from_bytes(body[:_EXPLICIT_NONCE], "big")
            tx = TrafficKeys(tx.key, tx.iv, (explicit + 1) % 2**64)
        return HandshakeSecrets(
            suite=suite, tx=tx, rx=rx, tx_sequence_number=1, rx_sequence_number=1
        )


def _prove(protection: RecordProtection, records: list[bytes], expected: HandshakeType) -> None:
    """Open records that were sent or received already (``KTLSError``, ``SecretsUnavailableError``).

    They must begin with a message of the expected type. Only the first must: a large ticket is split over records.
    """
    beginning = b""
    for record in records:
        message = protection.open(record[:HEADER_LENGTH], record[HEADER_LENGTH:])
        if message.content_type != ContentType.HANDSHAKE:
            raise SecretsUnavailableError("the engine sent something else than handshake messages")
        beginning = beginning or message.fragment[:1]
    if records and beginning != bytes((expected,)):
        raise SecretsUnavailableError(f"a record that should be {expected.name} is not")


#: (version, cipher) as the engine says it: there are a few dozen, and connections share them.
_facts: Final[dict[tuple[str, CipherTuple], tuple[str, CipherTuple]]] = {}


def _facts_of(sslobject: ssl.SSLObject) -> tuple[str, CipherTuple]:
    facts = sslobject.version() or "", sslobject.cipher() or ("", "", 0)
    return _facts.setdefault(facts, facts)


def _max_fragment(role: Role, version: str, hello: ClientHello | None) -> int:
    """Return the largest fragment that we may send, whatever was negotiated.

    A smaller record is always legal, so an offer is honoured without looking for the answer to it. As a client we never offer any.
    """
    limit = MAX_FRAGMENT
    if role is Role.SERVER and hello is not None:
        if hello.max_fragment_length is not None:
            limit = min(limit, hello.max_fragment_length)
        if hello.record_size_limit is not None:
            inner_type = 1 if version == "TLSv1.3" else 0  # RFC 8449 §4: it counts in TLS 1.3
            limit = min(limit, hello.record_size_limit - inner_type)
    return limit
