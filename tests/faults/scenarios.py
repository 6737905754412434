"""What happens on the connections of the sweep: each scenario brings them through other states. Without a fault each ends as it says here."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ktls.protocol.enums import AlertDescription, ContentType, KeyUpdateRequest
from ktls.protocol.limits import KeyLimits
from ktls.protocol.messages import build_alert, build_key_update
from ktls.protocol.suites import MAX_FRAGMENT
from ktls.record.kernel import attach
from ktls.testing import pattern

from .layers import TLS12, Layers, Options
from .world import World

__all__ = ("SCENARIOS", "Scenario")

_HANDSHAKE: Final = ContentType.HANDSHAKE
_TICKET: Final = bytes.fromhex("04 00000e 00001c20 01020304 00 0001 78 0000")
#: Its second half begins with the byte that makes the kernel stop: 0x18.
_TRICKY_TICKET: Final = bytes.fromhex("04 000010 00001c20 01020304 00 0003 78 18 18 0000")
_ASK: Final = KeyUpdateRequest.UPDATE_REQUESTED
_TELL: Final = KeyUpdateRequest.UPDATE_NOT_REQUESTED


@dataclass(frozen=True)
class Scenario:
    """``run`` begins before the layers do, and ends with the connection closed."""

    name: str
    run: Callable[[World], None]
    options: Options = field(default_factory=Options)
    #: Our sending key changes, the peer's does: not every layer can follow.
    refreshes: bool = False
    updates: bool = False
    #: The order of records and data depends on TCP.
    loose: bool = False
    #: Only where the receiving direction is in the kernel.
    kernel_rx: bool = False
    #: Ends with both close_notify.
    whole: bool = True

    def fits(self, layers: Layers, can_rekey: bool) -> bool:
        """Whether ``layers`` can do this on this kernel."""
        if self.kernel_rx and layers.rx != "kernel":
            return False
        if self.options.leftover and layers.name == "both-in-kernel":
            return False  # what was read ahead is opened in this process
        if self.options.max_fragment != MAX_FRAGMENT and layers.policy is None and not can_rekey:
            return False  # such a kernel can't limit its records
        tx = layers.tx == "userspace" or can_rekey
        rx = layers.rx == "userspace" or can_rekey
        return (tx or not self.refreshes) and (rx or not self.updates)


SCENARIOS: Final[dict[str, Scenario]] = {}


def _scenario(
    *,
    small: bool = False,
    suite: object = None,
    records: int | None = None,
    leftover: int = 0,
    max_fragment: int = MAX_FRAGMENT,
    **marks: bool,
) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    limits = KeyLimits(records=records) if records is not None else None
    options = Options(small=small, limits=limits, leftover=leftover, max_fragment=max_fragment)
    if suite is TLS12:
        options = Options(suite=TLS12, small=small, limits=limits)

    def add(run: Callable[[World], None]) -> Callable[[World], None]:
        name = run.__name__.removeprefix("_")
        SCENARIOS[name] = Scenario(name, run, options, **marks)
        return run

    return add


def _data(w: World, size: int) -> None:
    """The peer sends the next ``size`` bytes."""
    w.peer.send_data(pattern(size, w.from_peer))
    w.from_peer += size


def _end(w: World) -> None:
    """The peer closes first, then we do."""
    w.peer.send_alert()
    w.receive_end()
    w.close()


# --- data ---------------------------------------------------------------------------------------------------------


@_scenario()
def _both_ways(w: World) -> None:
    w.set_up()
    w.send(1000)
    _data(w, 1500)
    w.receive(1000)
    w.receive(500)
    w.send(70_000)
    w.send(3000, vector=True)
    _end(w)


@_scenario()
def _direct_reads(w: World) -> None:
    w.set_up()
    for size in (10, 20_000, 300):
        _data(w, size)
        w.receive(size, now=True)
        w.settle()
        w.send(size)
    _end(w)


@_scenario()
def _attached_before(w: World) -> None:
    with contextlib.suppress(OSError):
        attach(w.sock)
    w.set_up()
    w.send(10)
    w.close()


@_scenario(small=True)
def _full(w: World) -> None:
    w.set_up()
    w.fill(400_000)
    _data(w, 5000)
    w.receive(5000)
    w.send(50_000)
    w.close()


@_scenario(small=True)
def _close_while_full(w: World) -> None:
    w.set_up()
    w.fill(400_000)
    w.close()


@_scenario(max_fragment=1024)
def _small_records(w: World) -> None:
    w.set_up()
    w.send(5000)
    w.send_file(3000)
    w.close()


@_scenario(suite=TLS12)
def _tls12(w: World) -> None:
    w.set_up()
    w.send(20_000)
    _data(w, 20_000)
    w.receive(20_000)
    w.peer.send_record(_HANDSHAKE, bytes(4))  # HelloRequest: answered with a warning
    _data(w, 10)
    w.receive(10)
    w.send(10)
    w.peer.send_alert()
    w.receive_end()
    w.close()


@_scenario(leftover=1000)
def _read_ahead(w: World) -> None:
    """The handshake's reader took a whole record and a part of the next."""
    _data(w, 900)
    _data(w, 900)
    w.set_up()
    w.receive(1800)
    w.send(100)
    _data(w, 30_000)
    w.receive(30_000)
    _end(w)


# --- files --------------------------------------------------------------------------------------------------------


@_scenario()
def _file(w: World) -> None:
    w.set_up()
    w.send(10)
    w.send_file(100_000)
    w.send_file(5000, ask=3000)
    w.send_file(5000, ask=9000)
    w.send(10)
    w.close()


@_scenario()
def _file_cut_off(w: World) -> None:
    w.set_up()
    w.send_file(150_000, cut=100_000)
    w.send(10)
    w.close()


@_scenario(kernel_rx=True)
def _splice(w: World) -> None:
    w.set_up()
    _data(w, 40_000)
    w.receive_file(40_000)
    _data(w, 100)
    w.peer.send_record(_HANDSHAKE, _TICKET)
    _data(w, 100)
    w.receive_file(200)
    _end(w)


@_scenario(kernel_rx=True, updates=True, refreshes=True)
def _splice_update(w: World) -> None:
    w.set_up()
    _data(w, 100)
    w.peer.send_key_update(request=True)
    _data(w, 20_000)
    w.receive_file(20_100)
    w.send(10)
    _end(w)


# --- the peer's keys ----------------------------------------------------------------------------------------------


@_scenario(updates=True)
def _update(w: World) -> None:
    w.set_up()
    _data(w, 10)
    w.receive(10)
    w.peer.send_key_update()
    _data(w, 20)
    w.receive(20)
    w.send(30)
    _end(w)


@_scenario(updates=True, refreshes=True)
def _update_requested(w: World) -> None:
    w.set_up()
    w.send(10)
    for _ in range(2):
        w.peer.send_key_update(request=True)
        _data(w, 20)
        w.receive(20)
        w.send(30)
    _end(w)


@_scenario(updates=True, refreshes=True, loose=True)
def _updates_behind_data(w: World) -> None:
    """The kernel decrypts a KeyUpdate while it fills a buffer; ``poll`` is silent then."""
    w.set_up()
    w.peer.send_raw(w.peer.seal_data(pattern(10, w.from_peer)) + w.peer.seal_key_update(True))
    w.from_peer += 10
    w.receive(10, now=True)
    w.settle()
    _data(w, 5)
    w.receive(5)
    w.peer.send_key_update(request=True)
    w.settle()
    w.send(10)
    _end(w)


@_scenario(updates=True, refreshes=True, small=True, loose=True)
def _update_while_full(w: World) -> None:
    w.set_up()
    w.fill(400_000)
    w.peer.send_key_update(request=True)
    _data(w, 20)
    w.receive(20)
    w.send(40_000)
    _end(w)


@_scenario(updates=True, refreshes=True)
def _split_update(w: World) -> None:
    w.set_up()
    message = build_key_update(_ASK)
    w.peer.send_record(_HANDSHAKE, message[:2])
    w.settle()
    w.peer.send_record(_HANDSHAKE, message[2:])
    w.peer.next_tx_key()
    _data(w, 20)
    w.receive(20)
    w.send(30)
    _end(w)


@_scenario()
def _tickets(w: World) -> None:
    """One of them stops a kernel by mistake."""
    w.set_up()
    w.peer.send_record(_HANDSHAKE, _TICKET)
    w.peer.send_record(_HANDSHAKE, _TRICKY_TICKET[:17])
    w.peer.send_record(_HANDSHAKE, _TRICKY_TICKET[17:])
    _data(w, 10)
    w.receive(10)
    _end(w)


@_scenario(updates=True)
def _ticket_and_update(w: World) -> None:
    """In one record."""
    w.set_up()
    w.peer.send_record(_HANDSHAKE, _TICKET + build_key_update(_TELL))
    w.peer.next_tx_key()
    _data(w, 10)
    w.receive(10)
    _end(w)


# --- our keys -----------------------------------------------------------------------------------------------------


@_scenario(refreshes=True)
def _refresh(w: World) -> None:
    w.set_up()
    w.send(10)
    w.refresh()
    w.send(10)
    w.refresh()
    w.refresh()
    w.send_file(20_000)
    w.close()


@_scenario(refreshes=True, updates=True)
def _refresh_and_ask(w: World) -> None:
    w.set_up()
    w.send(10)
    w.refresh(request_peer=True)
    w.pump()
    w.peer.send_key_update()
    _data(w, 10)
    w.receive(10)
    w.send(10)
    _end(w)


@_scenario(refreshes=True, updates=True)
def _crossing(w: World) -> None:
    """Both ask at once."""
    w.set_up()
    w.refresh(request_peer=True)
    w.peer.send_key_update(request=True)
    w.peer.send_key_update()
    _data(w, 10)
    w.receive(10)
    w.send(10)
    _end(w)


@_scenario(refreshes=True, small=True, loose=True)
def _refresh_while_full(w: World) -> None:
    w.set_up()
    w.fill(400_000)
    w.refresh()
    w.fill(1000)
    w.send(30_000)
    w.close()


@_scenario(refreshes=True, records=4, loose=True)
def _limit(w: World) -> None:
    w.set_up()
    for _ in range(6):
        w.send(20)
    w.send(100_000)
    w.close()


@_scenario(refreshes=True, records=4, loose=True)
def _limit_in_file(w: World) -> None:
    w.set_up()
    w.send_file(150_000)
    w.send(10)
    w.close()


@_scenario(refreshes=True, updates=True, records=2)
def _limit_of_the_peers_key(w: World) -> None:
    w.set_up()
    for _ in range(3):
        _data(w, 16384)
        w.receive(16384)
    w.pump()
    w.peer.send_key_update()
    _data(w, 10)
    w.receive(10)
    _end(w)


# --- the end ------------------------------------------------------------------------------------------------------


@_scenario()
def _half_close(w: World) -> None:
    w.set_up()
    w.send(10)
    w.retry(lambda: w.driver.close_notify())
    _data(w, 20_000)
    w.receive(20_000)
    _end(w)


@_scenario()
def _peers_half_close(w: World) -> None:
    w.set_up()
    w.peer.send_alert()
    w.receive_end()
    w.send(20_000)
    w.send_file(10_000)
    w.close()


@_scenario(whole=False)
def _alert(w: World) -> None:
    w.set_up()
    w.send(10)
    _data(w, 10)
    w.peer.send_alert(AlertDescription.INTERNAL_ERROR)
    w.receive(10)
    w.receive(1)  # AlertReceived


@_scenario(whole=False)
def _bad_record(w: World) -> None:
    w.set_up()
    _data(w, 10)
    record = bytearray(w.peer.seal_data(b"forged"))
    record[-1] ^= 1
    w.peer.send_raw(bytes(record))
    w.receive(10)
    w.receive(1)  # RemoteProtocolError, and an alert


@_scenario(kernel_rx=True, whole=False)
def _bad_record_spliced(w: World) -> None:
    w.set_up()
    w.peer.send_raw(b"\x17\x03\x03\xff\xff" + bytes(100))
    w.receive_file(1)  # RemoteProtocolError, and an alert


@_scenario(kernel_rx=True, whole=False)
def _bad_record_met_by_send(w: World) -> None:
    w.set_up()
    w.peer.send_raw(b"\x17\x03\x03\xff\xff" + bytes(100))
    w.send(10)
    w.receive(1)  # RemoteProtocolError at one of them, and an alert


@_scenario(whole=False)
def _not_tls_seen_by_settle(w: World) -> None:
    w.set_up()
    w.peer.send_raw(b"GET / HTTP/1.1\r\n\r\n")
    w.settle()
    w.receive(1)  # RemoteProtocolError, and an alert


@_scenario(whole=False)
def _illegal_message(w: World) -> None:
    w.set_up()
    w.peer.send_record(ContentType.ALERT, build_alert(AlertDescription.CLOSE_NOTIFY)[:1])
    w.receive(1)  # RemoteProtocolError, and an alert


@_scenario(whole=False)
def _truncated(w: World) -> None:
    w.set_up()
    _data(w, 10)
    w.peer.sock.shutdown(socket.SHUT_WR)
    w.receive(10)
    w.receive(1)  # TruncatedError
