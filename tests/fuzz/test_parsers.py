"""The harnesses in short: every file of the corpus, a little of each engine, and that a harness sees what it is there to see. The long form: ``lab/fuzz``."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktls.handshake import framing, keylog
from ktls.handshake.framing import RecordFramer
from ktls.handshake.tickets import TicketRelay
from ktls.protocol import messages
from ktls.protocol.key_schedule import TrafficKeys
from ktls.record.aead import RecordProtection
from ktls.record.userspace import UserspaceReceiver

from .fuzz_parsers import Session, corpus_of, minimise, mutate
from .harnesses import HARNESSES
from .protocol_target import Broken

if TYPE_CHECKING:
    from ktls.protocol.states import InboundPlainMessage

NAMES: Final = sorted(HARNESSES)
FILES: Final = [(name, path) for name in NAMES for path in corpus_of(name)]
every_harness = pytest.mark.parametrize("name", NAMES)
PROGRAMS: Final = Path(__file__).parent


@pytest.mark.parametrize(("name", "path"), FILES, ids=[f"{n}/{p.name}" for n, p in FILES])
def test_corpus(name: str, path: Path) -> None:
    HARNESSES[name](path.read_bytes())


def test_corpus_is_complete_and_small() -> None:
    assert {name for name, _ in FILES} == set(NAMES)
    assert sum(path.stat().st_size for _, path in FILES) < 200_000


@every_harness
def test_any_bytes(name: str) -> None:
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.binary(max_size=400))
    def run(data: bytes) -> None:
        HARNESSES[name](data)

    run()


@every_harness
def test_mutations_of_the_corpus(name: str) -> None:
    assert Session(name, random.Random(1)).turn() is None


# --- what the harnesses see ---------------------------------------------------------------------------------------


def broken_by_the_corpus(name: str) -> bool:
    """Whether any file of the corpus shows that something is wrong."""
    for path in corpus_of(name):
        try:
            HARNESSES[name](path.read_bytes())
        except Broken:
            return True
    return False


def test_framer_that_loses_a_byte_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = RecordFramer.feed
    monkeypatch.setattr(RecordFramer, "feed", lambda self, data: feed(self, data[:-1] or data))
    assert broken_by_the_corpus("framer")


def test_hello_that_is_read_only_in_one_piece_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def see(self: framing.ClientHelloWatch, record: bytes) -> None:
        if len(record) >= 9 and len(record) - 9 == int.from_bytes(record[6:9], "big"):
            self._message(record[5], record[9:])

    monkeypatch.setattr(framing._HelloWatch, "see", see)
    assert broken_by_the_corpus("hello")


def test_log_lines_found_anywhere_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    anywhere = keylog._LINE.pattern.lstrip(b"^")
    monkeypatch.setattr(keylog, "_LINE", re.compile(anywhere))
    assert broken_by_the_corpus("keylog")


def test_contradiction_that_is_taken_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keylog.Expected, "lose", lambda self, reason: None)
    assert broken_by_the_corpus("keylog")


def test_message_of_any_length_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_HANDSHAKE_MESSAGE", 2**24)
    data = bytes(8) + b"\x04\xff\xff\xff" + bytes(2**18)
    with pytest.raises(Broken, match="too much is kept"):
        HARNESSES["messages"](data)


def test_record_that_depends_on_the_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = UserspaceReceiver._missing
    monkeypatch.setattr(
        UserspaceReceiver,
        "_missing",
        lambda self: missing(self) if self._exact else max(1, missing(self)),
    )
    assert broken_by_the_corpus("records")


def test_noise_that_is_opened_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(self: RecordProtection, header: bytes, body: bytes) -> InboundPlainMessage | None:
        return None

    monkeypatch.setattr(RecordProtection, "open", opened)
    assert broken_by_the_corpus("aead")


def test_state_that_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrafficKeys, "__eq__", lambda self, other: False)
    assert broken_by_the_corpus("state")


def test_refused_ticket_that_leaves_the_engine_open_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TicketRelay, "close", lambda self: None)
    assert broken_by_the_corpus("tickets")


# --- the engine ---------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_inputs() -> None:
    one, two = (
        [mutate(random.Random(seed), b"abcdef", b"ghi") for seed in range(50)] for _ in "ab"
    )
    assert one == two
    assert len(set(one)) > 25


def test_finding_is_made_short() -> None:
    def harness(data: bytes) -> None:
        if b"!" in data and b"?" in data:
            raise Broken("both")

    assert sorted(minimise(harness, b"abc!def?ghi" * 3)) == [*b"!?"]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["fuzz_parsers.py", "fuzz_protocol.py"])
def test_program(program: str) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAMS / program, "--seconds=1"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.splitlines()[-1].startswith("OK: ")
