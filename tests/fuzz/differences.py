"""In what the kernel's record layer is known to differ from ours, and why that is all right. Whatever is not in this table is a finding.

A difference is excused only where the scenario holds something that can bring it about, only for these two ends, and only if up to there both did the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ktls.protocol.enums import ContentType
from ktls.testing import pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .observing import Observation
    from .scenario import Fault, Scenario

__all__ = ("DIFFERENCES", "Difference", "check", "compare")

_BAD_RECORD_MAC: Final = "alert BAD_RECORD_MAC"
_OVERFLOW: Final = "alert RECORD_OVERFLOW"
_UNEXPECTED: Final = "alert UNEXPECTED_MESSAGE"
_VERSION: Final = "alert PROTOCOL_VERSION"
#: TCP ended before the record did.
_ENDED: Final = frozenset(("TruncatedError", "ECONNRESET"))
#: Faults after which any bytes may be taken for a header.
_FRAMING: Final[frozenset[Fault]] = frozenset(("length", "cut", "noise", "too long"))


@dataclass(frozen=True, slots=True)
class Difference:
    """An excuse: the kernel ends in one of ``kernel`` and user space in one of ``userspace``; None means any end."""

    name: str
    reason: str
    faults: frozenset[Fault]
    kernel: frozenset[str] | None
    userspace: frozenset[str] | None
    #: The protocol version that it is about: "TLSv1_3", "TLSv1_2", or both.
    version: str = ""

    def covers(self, scenario: Scenario, kernel: Observation, userspace: Observation) -> bool:
        """Whether it is an excuse for these two."""
        return (
            bool(self.faults & scenario.faults)
            and scenario.suite.version.name.startswith(self.version)
            and (self.kernel is None or kernel.end in self.kernel)
            and (self.userspace is None or userspace.end in self.userspace)
        )


DIFFERENCES: Final = (
    Difference(
        "version",
        "What is looked at first in a header: the kernel goes by the length, then by the version; ours by the type, then the version. It may not even know where a header is.",
        _FRAMING | {"version", "outer type"},
        frozenset((_VERSION, _OVERFLOW, _BAD_RECORD_MAC)),
        frozenset((_VERSION, _OVERFLOW, _UNEXPECTED, _BAD_RECORD_MAC)),
    ),
    Difference(
        "too long",
        "The kernel takes no TLS 1.3 record over 2^14+17 bytes (RFC 9846 §5.2 allows 2^14+256), no TLS 1.2 record over 2^14 and its own overhead"
        " (RFC 5246 §6.2.3 allows 2^14+2048), and says so when it has the header; ours opens it first, to say what is wrong with it.",
        _FRAMING,
        frozenset((_OVERFLOW,)),
        frozenset((_OVERFLOW, _BAD_RECORD_MAC, _UNEXPECTED)) | _ENDED,
    ),
    Difference(
        "too short",
        "The kernel refuses what is shorter than a tag when it has the header; ours when it has the record.",
        _FRAMING,
        frozenset((_BAD_RECORD_MAC, _VERSION)),
        frozenset((_BAD_RECORD_MAC,)) | _ENDED,
    ),
    Difference(
        "13 bytes",
        "In TLS 1.2 the kernel looks at nothing before it has the header and the explicit nonce: if TCP ends before, a bad header is only a truncation.",
        _FRAMING | {"version", "outer type"},
        _ENDED,
        frozenset((_BAD_RECORD_MAC, _UNEXPECTED, _VERSION, _OVERFLOW)),
        "TLSv1_2",
    ),
    Difference(
        "no inner type",
        "The kernel says EBADMSG for a record of nothing but padding, and so we send bad_record_mac; RFC 9846 §5.4 wants unexpected_message.",
        frozenset(("no inner type",)),
        frozenset((_BAD_RECORD_MAC,)),
        frozenset((_UNEXPECTED,)),
        "TLSv1_3",
    ),
    Difference(
        "outer type unseen",
        "The kernel looks at the outer type of no TLS 1.3 record, nor authenticates it (the additional data has 23): what is inside is what counts.",
        _FRAMING | {"outer type"},
        None,
        frozenset((_UNEXPECTED,)),
        "TLSv1_3",
    ),
    Difference(
        "outer type opened",
        "An unknown type of a TLS 1.2 record is found by us in the header, by the kernel when it can't open the record, or by the connection if it can.",
        _FRAMING | {"outer type"},
        frozenset((_BAD_RECORD_MAC, _UNEXPECTED)) | _ENDED,
        frozenset((_UNEXPECTED,)),
        "TLSv1_2",
    ),
    Difference(
        "empty data in a message",
        "The kernel drops an empty data record in silence, so nobody sees that it stands between two fragments of a message.",
        frozenset(("empty data in a message",)),
        None,
        frozenset((_UNEXPECTED,)),
    ),
    Difference(
        "0x18 in TLS 1.2",
        "The kernel with rekey takes any handshake record that begins with this byte for a KeyUpdate, in TLS 1.2 too, and waits for a key that it does not take.",
        frozenset(("0x18 in TLS 1.2",)),
        frozenset(("alert INTERNAL_ERROR",)),
        None,
        "TLSv1_2",
    ),
)


def check(scenario: Scenario, seen: Observation) -> Iterator[str]:
    """Say what is wrong with one layer's observation, whatever the other made of it."""
    if seen.data != pattern(len(seen.data)):
        yield "application data that was not sent so"
    if seen.again not in (seen.end, "closed" if seen.end == "closed" else seen.end):
        yield f"ends with {seen.end}, and the next time with {seen.again}"
    failed = seen.end not in ("closed", "TruncatedError")
    if failed and seen.end != "ECONNRESET" and seen.states != ("failed", "failed"):
        yield f"ends with {seen.end} in the states {seen.states}"
    if not failed and seen.pending:
        yield f"{seen.pending} bytes pending at the end"
    if scenario.ending == "fin" and seen.end.startswith("alert "):
        closed = any(
            record[1] == ContentType.ALERT and record[2][1:] == b"\0" for record in seen.sent[:-1]
        )
        if not closed and (not seen.sent or seen.sent[-1][1] != ContentType.ALERT):
            yield f"ends with {seen.end} and does not say so to the peer"


def compare(scenario: Scenario, kernel: Observation, userspace: Observation) -> tuple[str, str]:
    """Return the name of the difference that is met, and what is wrong: both empty if both layers did the same."""
    if _comparable(scenario, kernel) == _comparable(scenario, userspace):
        return "", ""
    for known in DIFFERENCES:
        if known.covers(scenario, kernel, userspace):
            return known.name, _beginnings(scenario, kernel, userspace)
    return "", "the layers differ"


def _comparable(scenario: Scenario, seen: Observation) -> tuple[object, ...]:
    # A record that was refused stays with our own layer (``pending``), and has left the kernel.
    sent, generations = _sent(scenario, seen), seen.generations
    if scenario.limits.records is not None:
        generations = 0, generations[1]  # see ``_sent``
    return (
        (seen.end, seen.again, seen.data, seen.tickets, seen.outcomes, sent, seen.ended_in),
        (seen.states, generations, seen.opened),
    )


def _beginnings(scenario: Scenario, kernel: Observation, userspace: Observation) -> str:
    """Say what differs before the end: one has to be the beginning of the other."""
    pairs = (
        ("data", kernel.data, userspace.data),
        ("tickets", kernel.tickets, userspace.tickets),
        ("records", _before_alert(scenario, kernel), _before_alert(scenario, userspace)),
    )
    for what, left, right in pairs:
        shorter = min(len(left), len(right))
        if left[:shorter] != right[:shorter]:
            return f"different {what} before the difference that is known"
    return ""


def _before_alert(scenario: Scenario, seen: Observation) -> tuple[tuple[int, int, bytes], ...]:
    """What was sent, without the alert that answers the end."""
    sent = _sent(scenario, seen)
    return sent[:-1] if sent and sent[-1][1] == ContentType.ALERT else sent


def _sent(scenario: Scenario, seen: Observation) -> tuple[tuple[int, int, bytes], ...]:
    """What was sent, as far as it is determined.

    When the peer is asked for a new key (a limit) depends on how much a read takes, and on how many records were opened ahead: so our key may be one on.
    """
    if scenario.limits.records is None:
        return seen.sent
    return tuple((0, *record[1:]) for record in seen.sent if record[1] != ContentType.HANDSHAKE)
