"""The contract suite on every record layer that there is, and on some that are broken."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Literal

import pytest

from ktls.protocol.enums import ContentType, ProtocolVersion
from ktls.protocol.states import InboundPlainMessage
from ktls.protocol.suites import CipherSuite
from ktls.record.probe import max_payload_supported
from ktls.record.userspace import UserspaceReceiver, UserspaceSender
from ktls.testing import BrokenContract, check_record_layer

from . import layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktls.protocol.key_schedule import TrafficKeys
    from ktls.testing.bench import MakeReceiver, MakeSender

suites = pytest.mark.parametrize("suite", layers.SUITES, ids=lambda suite: suite.name)


def check_in_process(
    suite: CipherSuite, make_sender: MakeSender | None, make_receiver: MakeReceiver | None
) -> None:
    checked = check_record_layer(make_sender, make_receiver, suite=suite, rekey="required")
    assert len(checked) >= 15
    is_tls13 = suite.version is ProtocolVersion.TLSv1_3
    assert ("install_restarts_the_numbers" in checked) == (is_tls13 and make_sender is not None)


@suites
@pytest.mark.slow
def test_userspace(suite: CipherSuite) -> None:
    check_in_process(suite, layers.userspace_sender, layers.userspace_receiver)


@suites
@pytest.mark.slow
def test_userspace_that_never_reads_ahead(suite: CipherSuite) -> None:
    check_in_process(suite, None, layers.exact_receiver)


@suites
@pytest.mark.slow
def test_catch_up_where_the_kernel_refuses(suite: CipherSuite) -> None:
    check_in_process(suite, None, layers.refused_catch_up_receiver)


@pytest.mark.slow
def test_fakes_are_verified() -> None:
    check_in_process(layers.TLS13, layers.faulty_sender, layers.faulty_receiver)


def on_kernels(
    test: Callable[[CipherSuite, Literal["required", "absent"]], None],
) -> Callable[[CipherSuite, Literal["required", "absent"]], None]:
    """Run ``test`` with every suite, on each kernel with what that kernel must be able to do."""
    kinds = pytest.mark.parametrize(
        "rekey",
        [
            pytest.param("required", marks=pytest.mark.rekey, id="rekey"),
            pytest.param("absent", marks=pytest.mark.norekey, id="norekey"),
        ],
    )
    return pytest.mark.kernel(pytest.mark.slow(kinds(suites(test))))


@on_kernels
def test_kernel(suite: CipherSuite, rekey: Literal["required", "absent"]) -> None:
    check_record_layer(
        layers.kernel_sender,
        layers.kernel_receiver,
        suite=suite,
        limits_fragments=max_payload_supported(),
        rekey=rekey,
    )


@on_kernels
def test_catch_up(suite: CipherSuite, rekey: Literal["required", "absent"]) -> None:
    # Without rekey it says that it can't, and can all the same as long as it is in user space.
    check_record_layer(
        None,
        layers.catch_up_receiver,
        suite=suite,
        rekey="unasked" if rekey == "absent" else rekey,
    )


@on_kernels
def test_kernel_sends_and_userspace_receives(
    suite: CipherSuite, rekey: Literal["required", "absent"]
) -> None:
    del rekey
    check_record_layer(
        layers.kernel_sender,
        layers.userspace_receiver,
        suite=suite,
        limits_fragments=max_payload_supported(),
    )


@on_kernels
def test_userspace_sends_and_kernel_receives(
    suite: CipherSuite, rekey: Literal["required", "absent"]
) -> None:
    del rekey
    check_record_layer(layers.userspace_sender, layers.kernel_receiver, suite=suite)


# --- the suite itself: it has to find what is broken ------------------------------------------------------------


class Broken:
    """A layer of user space with one thing wrong."""

    def __init__(self, inner: UserspaceSender | UserspaceReceiver) -> None:
        self.inner: Any = inner  # a sender or a receiver, as the subclass needs it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class RetriesInSecret(Broken):
    """Seals first, and asks whether there is room afterwards."""

    def send_record(self, content_type: ContentType, fragment: bytes, flags: int = 0) -> None:
        record = self.inner._protection.seal(content_type, fragment)
        self.inner.flush(flags)
        self.inner._push(record, flags)


class LosesTheRest(Broken):
    """Says that all was accepted."""

    def send(self, data: bytes, flags: int = 0) -> int:
        self.inner.send(data, flags)
        return len(data)


class ForgetsTheNetwork(Broken):
    """Pretends after the first error, as kernel TLS does."""

    failed = False

    def send(self, data: bytes, flags: int = 0) -> int:
        if self.failed:
            return len(data)
        try:
            sent: int = self.inner.send(data, flags)
        except BlockingIOError:
            raise
        except OSError:
            self.failed = True
            raise
        return sent


class NeverFlushes(Broken):
    def flush(self, flags: int = 0) -> None:
        pass


class TellsItsKey(Broken):
    def __repr__(self) -> str:
        return f"<sender {self.inner._protection.keys.key.hex()}>"


class KeepsTheNumbers(Broken):
    def install(self, keys: TrafficKeys) -> None:
        number = self.inner.sequence_number()
        self.inner.install(keys)
        self.inner._number = number


class TakesEmptyRecordsForTheEnd(Broken):
    def read_record(self, flags: int = 0) -> InboundPlainMessage | None:
        message = self.inner.read_record(flags)
        return message if message is not None and message.fragment else None


class SaysItOnce(Broken):
    """Reports a bad record once, and then ends."""

    said = False

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        try:
            return 0 if self.said else self.inner.recv_into(buffer, nbytes, flags)
        except OSError as error:
            self.said = not isinstance(error, BlockingIOError)
            raise


class IgnoresTheBuffer(Broken):
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        count: int = self.inner.recv_into(buffer, 0, flags)
        return count


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (RetriesInSecret, "would_block_takes_nothing"),
        (LosesTheRest, "data_of_any_size_arrives"),
        (ForgetsTheNetwork, "dead_after_a_reset"),
        (NeverFlushes, "would_block_takes_nothing"),
        (TellsItsKey, "repr_shows_no_key"),
        (KeepsTheNumbers, "install_restarts_the_numbers"),
    ],
)
def test_broken_sender_is_found(broken: type[Broken], rule: str, impatient: None) -> None:
    def make(
        sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int, size: int
    ) -> Any:
        return broken(layers.userspace_sender(sock, suite, keys, number, size))

    with pytest.raises(BrokenContract) as caught:
        check_record_layer(make, None, suite=layers.TLS13)
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (TakesEmptyRecordsForTheEnd, "control_records_are_told_and_read_one_by_one"),
        (SaysItOnce, "unreadable_record_is_told_again_and_again"),
        (IgnoresTheBuffer, "record_is_read_in_parts"),
        (KeepsTheNumbers, "install_after_a_key_update"),
    ],
)
def test_broken_receiver_is_found(broken: type[Broken], rule: str, impatient: None) -> None:
    def make(sock: socket.socket, suite: CipherSuite, keys: TrafficKeys, number: int) -> Any:
        return broken(layers.userspace_receiver(sock, suite, keys, number))

    with pytest.raises(BrokenContract) as caught:
        check_record_layer(None, make, suite=layers.TLS13)
    assert caught.value.rule == rule


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is broken may wait for ever; a second is enough to see it."""
    monkeypatch.setattr("ktls.testing.peers.PATIENCE", 1.0)
