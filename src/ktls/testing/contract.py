"""``check_record_layer``: the contract of ``ktls.record.interface`` as a test suite, for any implementation.

In the spirit of ``trio.testing.check_two_way_stream``: give it a way to make the halves, and it runs every rule against a scripted peer over
loopback TCP, each on a fresh connection. It returns if all hold. It knows nothing of the layer but the interface; all secrets are made up, and no handshake is done.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from ktls.protocol.enums import AlertDescription, ContentType, ProtocolVersion
from ktls.protocol.messages import build_alert
from ktls.protocol.suites import MAX_FRAGMENT, CipherSuite

from .bench import Bench, Case, MakeReceiver, MakeSender, error_of, expect, receive
from .peers import RecordPeer, loopback_pair, made_up_keys, pattern
from .receiver_cases import RECEIVER_CASES
from .rekey_cases import RECEIVER_REKEY_CASES
from .sender_cases import SENDER_CASES, SENDER_REKEY_CASES

__all__ = (
    "BrokenContract",
    "Rekey",
    "alert_goes_out_after_a_bad_record",
    "both_directions_at_once",
    "check_record_layer",
    "receiver_refuses_a_second_key",
    "sender_refuses_a_second_key",
)

#: ``if_told``: check ``install`` where the half says ``can_change_key``, and that it refuses where it does not. ``unasked``: leave it out.
Rekey: TypeAlias = Literal["if_told", "required", "absent", "unasked"]


class BrokenContract(AssertionError):
    """A record layer does not keep a rule of the contract. ``rule`` is its name."""

    def __init__(self, rule: str, said: str) -> None:
        super().__init__(f"{rule}: {said}")
        self.rule = rule


def check_record_layer(
    make_sender: MakeSender | None,
    make_receiver: MakeReceiver | None,
    *,
    suite: CipherSuite,
    limits_fragments: bool = True,
    rekey: Rekey = "if_told",
) -> list[str]:
    """Check a sender, a receiver, or both; return the names of the rules that were checked. Takes a second or so.

    ``make_sender(sock, suite, keys, sequence_number, max_fragment)`` and ``make_receiver(sock, suite, keys, sequence_number)`` make a half on a connected blocking TCP
    socket; None leaves that direction out. ``limits_fragments`` is False where ``max_fragment`` can't be less than 2^14. ``rekey`` demands
    that a key can (or can't) be changed; TLS 1.2 layers may or may not, and are not asked.

    Raises ``BrokenContract`` (an ``AssertionError``) for the first rule that does not hold.
    """
    bench = Bench(suite, make_sender, make_receiver, limits_fragments)
    checked = []
    for case in _cases(bench, rekey):
        try:
            case(bench)
        except Exception as error:
            raise BrokenContract(case.__name__, str(error) or repr(error)) from error
        checked.append(case.__name__)
    return checked


def _cases(bench: Bench, rekey: Rekey) -> list[Case]:
    is_tls13 = bench.suite.version is ProtocolVersion.TLSv1_3
    cases: list[Case] = []
    if bench.make_sender is not None:
        with bench.sending() as (sender, _, _):
            can_change = sender.can_change_key
        _demand(rekey, can_change, is_tls13)
        cases += SENDER_CASES
        if can_change and is_tls13:
            cases += SENDER_REKEY_CASES
        elif is_tls13 and rekey != "unasked":
            cases.append(sender_refuses_a_second_key)
    if bench.make_receiver is not None:
        with bench.receiving() as (receiver, _, _):
            can_change = receiver.can_change_key
        _demand(rekey, can_change, is_tls13)
        cases += RECEIVER_CASES
        if can_change and is_tls13:
            cases += RECEIVER_REKEY_CASES
        elif is_tls13 and rekey != "unasked":
            cases.append(receiver_refuses_a_second_key)
    if bench.make_sender is not None and bench.make_receiver is not None:
        cases += _PAIR_CASES
    return cases


def _demand(rekey: Rekey, can_change: bool, is_tls13: bool) -> None:
    if is_tls13 and rekey in ("required", "absent") and can_change != (rekey == "required"):
        raise BrokenContract("can_change_key", f"it is {can_change}, and {rekey} was demanded")


def sender_refuses_a_second_key(bench: Bench) -> None:
    """The old key is then still in force."""
    with bench.sending() as (sender, peer, _):
        sender.send(b"one")
        error = error_of(lambda: sender.install(made_up_keys(bench.suite, "us", 1)))
        expect(isinstance(error, OSError), f"{error!r} for a second key")
        sender.send(b"two")
        expect(peer.read_data(6) == b"onetwo", "the bytes changed")


def receiver_refuses_a_second_key(bench: Bench) -> None:
    """The old key is then still in force."""
    with bench.receiving() as (receiver, peer, _):
        error = error_of(lambda: receiver.install(made_up_keys(bench.suite, "peer", 1)))
        expect(isinstance(error, OSError), f"{error!r} for a second key")
        peer.send_data(b"data")
        expect(receive(receiver, 4) == b"data", "the bytes changed")


def both_directions_at_once(bench: Bench) -> None:
    make_sender, make_receiver = _both(bench)
    with loopback_pair() as (ours, theirs):
        sender = make_sender(ours, bench.suite, made_up_keys(bench.suite, "us"), 3, MAX_FRAGMENT)
        receiver = make_receiver(ours, bench.suite, made_up_keys(bench.suite, "peer"), 4)
        peer = RecordPeer(theirs, bench.suite, rx_sequence_number=3, tx_sequence_number=4)
        for size in (1, 100, 20_000):
            sender.send(pattern(size))
            peer.send_data(pattern(size))
            expect(peer.read_data(size) == pattern(size), "what we sent changed")
            expect(receive(receiver, size) == pattern(size), "what we received changed")
        expect((sender.sequence_number(), receiver.sequence_number()) == (7, 8), "counted wrong")


def alert_goes_out_after_a_bad_record(bench: Bench) -> None:
    make_sender, make_receiver = _both(bench)
    with loopback_pair() as (ours, theirs):
        sender = make_sender(ours, bench.suite, made_up_keys(bench.suite, "us"), 0, MAX_FRAGMENT)
        receiver = make_receiver(ours, bench.suite, made_up_keys(bench.suite, "peer"), 0)
        peer = RecordPeer(theirs, bench.suite)
        bad = bytearray(peer.seal_data(b"data"))
        bad[-1] ^= 1
        peer.send_raw(bytes(bad))
        error_of(lambda: receiver.recv_into(bytearray(9)))
        alert = build_alert(AlertDescription.BAD_RECORD_MAC)
        sender.send_record(ContentType.ALERT, alert)
        message = peer.read_record()
        expect(message is not None and message.fragment == alert, f"{message} for the alert")


def _both(bench: Bench) -> tuple[MakeSender, MakeReceiver]:
    if bench.make_sender is None or bench.make_receiver is None:
        raise AssertionError("both directions are needed")
    return bench.make_sender, bench.make_receiver


_PAIR_CASES: Final[tuple[Case, ...]] = (both_directions_at_once, alert_goes_out_after_a_bad_record)
