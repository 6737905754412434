"""The peer breaks the rules, and the first to hear of it is a send: the kernel looks at the next header before anybody reads."""

from __future__ import annotations

import select
import ssl
import threading

import pytest

import ktls
from ktls.protocol.enums import AlertDescription

from .parties import TLS12, TLS13, expected_layers
from .peers import Peers
from .programs import PATIENCE
from .scripted import Meeting, meet

BAD = {
    "too long": (b"\x17\x03\x03\xff\xff" + bytes(16), AlertDescription.RECORD_OVERFLOW),
    "plain text": (b"GET / HTTP/1.1\r\n\r\n", AlertDescription.PROTOCOL_VERSION),
    "wrong key": (b"\x17\x03\x03\x00\x20" + bytes(32), AlertDescription.BAD_RECORD_MAC),
}

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.parametrize("bad", BAD),
    pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"]),
]


def meet_in_kernel(peers: Peers, version: ssl.TLSVersion) -> Meeting:
    peers.counters.may_fail_to_decrypt = True
    meeting = meet(peers, "server", version)
    if expected_layers(meeting.tls.version())[1] != "kernel":
        meeting.tls.close()
        meeting.peer.sock.close()
        pytest.skip("receiving is in user space here: a send hears nothing of it")
    return meeting


def send_until_refused(tls: ktls.KTLSSocket) -> ktls.RemoteProtocolError:
    """What has come is there, but what the kernel thinks of it may take a moment."""
    while True:
        try:
            tls.send(b"hello")
        except ktls.RemoteProtocolError as error:
            return error
        select.select([], [], [], 0.01)


def test_send_says_what_the_peer_did(peers: Peers, version: ssl.TLSVersion, bad: str) -> None:
    meeting = meet_in_kernel(peers, version)
    tls, peer = meeting.tls, meeting.peer
    record, alert = BAD[bad]
    peer.send_raw(peer.seal(23, b"data before") + record)
    assert tls.recv(5) == b"data "
    assert tls.recv(100) == b"before"
    error = send_until_refused(tls)
    assert error.alert == alert
    for _ in range(2):
        with pytest.raises(ktls.RemoteProtocolError) as caught:
            tls.recv(100)
        assert caught.value.alert == alert
        with pytest.raises(ktls.RemoteProtocolError):
            tls.send(b"more")
    tls.close()
    while (heard := peer.read()) is not None and heard[0] == 23:
        pass
    assert heard == (21, bytes((2, alert)))


def test_reader_that_waits_hears_it_too(peers: Peers, version: ssl.TLSVersion, bad: str) -> None:
    meeting = meet_in_kernel(peers, version)
    tls, peer = meeting.tls, meeting.peer
    record, alert = BAD[bad]
    heard: list[object] = []

    def read() -> None:
        try:
            while data := tls.recv(100):
                heard.append(data)
        except OSError as error:
            heard.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    peer.send_raw(peer.seal(23, b"data before"))
    peer.send_raw(record)
    try:
        error = send_until_refused(tls)
    finally:
        reader.join(PATIENCE)
    assert not reader.is_alive()
    assert error.alert == alert
    assert heard[0] == b"data before"
    assert isinstance(heard[1], ktls.RemoteProtocolError)
    assert heard[1].alert == alert
    peer.sock.close()
