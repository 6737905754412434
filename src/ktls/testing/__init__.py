"""Public helpers for tests of record layers, drivers and front ends.

- ``check_record_layer``: the contract of ``ktls.record.interface`` as a test suite.
- ``RecordPeer``: the other end of a connection, scripted record by record.
- ``FaultySender``, ``FaultyReceiver``: verified fakes that refuse, wait and keep a diary.
- ``loopback_pair``, ``made_up_keys``, ``made_up_secret``, ``pattern``, ``eventually``, ``turns``, ``fill_up``, ``halve_send_buffer``, ``wait_readable``, ``wait_writable``: what such tests are made of.
"""

from __future__ import annotations

from .contract import BrokenContract, check_record_layer
from .faulty import FaultyReceiver, FaultySender
from .peers import (
    PATIENCE,
    RecordPeer,
    eventually,
    fill_up,
    halve_send_buffer,
    is_key_update,
    loopback_pair,
    made_up_keys,
    made_up_secret,
    pattern,
    turns,
    wait_readable,
    wait_writable,
)

__all__ = (
    "PATIENCE",
    "BrokenContract",
    "FaultyReceiver",
    "FaultySender",
    "RecordPeer",
    "check_record_layer",
    "eventually",
    "fill_up",
    "halve_send_buffer",
    "is_key_update",
    "loopback_pair",
    "made_up_keys",
    "made_up_secret",
    "pattern",
    "turns",
    "wait_readable",
    "wait_writable",
)
