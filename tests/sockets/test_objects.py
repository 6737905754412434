"""Sockets as objects: files over them, garbage, and descriptors, of which none is left or closed twice."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import ssl
import tempfile
import threading
import warnings
from typing import Any

import pytest

from ..support import HOST, has_kernel_tls
from .helpers import PATIENCE, Case, Link, Net, descriptors, read_all, tcp_pair


def test_makefile_keeps_the_connection(net: Net, layer: Case) -> None:
    link = net.link(layer)
    reader, writer = link.ours.makefile("rb"), link.ours.makefile("wb")
    link.ours.close()
    assert link.ours.fileno() >= 0
    writer.write(b"still here")
    writer.close()
    assert link.theirs.recv(100) == b"still here"
    link.theirs.sendall(b"so am I\n")
    assert reader.readline() == b"so am I\n"
    reader.close()
    assert link.ours.fileno() == -1
    assert link.theirs.recv(1) == b""


def test_context_manager(net: Net, layer: Case) -> None:
    link = net.link(layer)
    with link.ours as tls:
        assert tls is link.ours
        tls.sendall(b"x")
    assert tls.fileno() == -1
    assert read_all(link.theirs) == b"x"


def test_detach(net: Net, layer: Case) -> None:
    link = net.link(layer)
    fd = link.ours.fileno()
    assert link.ours.detach() == fd
    assert link.ours.fileno() == -1
    link.ours.close()
    os.fstat(fd)  # is open
    raw = net.keep(socket.socket(fileno=fd))
    if layer.tx_layer == "kernel":
        raw.sendall(b"the kernel goes on")
        assert link.theirs.recv(100) == b"the kernel goes on"
    else:
        raw.sendall(b"\x17\x03\x03\x00\x01x")
        with pytest.raises(ssl.SSLError):
            link.theirs.recv(100)


def test_calls_on_a_closed_socket(net: Net) -> None:
    ours = net.link().ours
    ours.close()
    for call in (
        lambda: ours.recv(1),
        lambda: ours.send(b"x"),
        lambda: ours.do_handshake(),
        lambda: ours.getpeername(),
        lambda: ours.shutdown(socket.SHUT_WR),
    ):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()
    assert "closed" in repr(ours) or "fd=-1" in repr(ours)


def forget(everything: list[Any]) -> None:
    """Make garbage of it and collect it."""
    everything.clear()
    gc.collect()


def link_that_was_used(net: Net, layer: Case, *, files: bool) -> Link:
    link = net.link(layer)
    if files and layer.rx_layer == "kernel":
        link.theirs.sendall(b"x")
        with tempfile.TemporaryFile() as file:
            link.ours.recvfile(file, 1)
    return link


@pytest.mark.parametrize("files", [False, True], ids=["plain", "after-recvfile"])
def test_garbage_is_reported_and_its_descriptors_closed(net: Net, layer: Case, files: bool) -> None:
    gc.collect()
    net.link(layer)  # whatever is made once
    before = descriptors()
    links = [link_that_was_used(net, layer, files=files)]
    net.sockets.remove(links[0].ours)
    fd, theirs = links[0].ours.fileno(), links[0].theirs
    with pytest.warns(ResourceWarning, match="unclosed"):
        forget(links)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        theirs.recv(1)  # garbage says no goodbye: that would look like an end in order
    theirs.close()
    assert descriptors() - before == set()


def test_number_of_a_closed_descriptor_is_not_closed_again(net: Net, layer: Case) -> None:
    """Two socket objects share the descriptor; neither may close it when it belongs to somebody else already."""
    ours = net.link(layer).ours
    fd = ours.fileno()
    ours.close()
    other = os.open("/dev/null", os.O_RDONLY)
    if other != fd:
        os.dup2(other, fd)
        os.close(other)
    net.sockets.remove(ours)
    ours.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del ours
        gc.collect()
    os.fstat(fd)  # is open
    os.close(fd)


def test_garbage_in_a_cycle(net: Net, layer: Case) -> None:
    class Holder:
        sock: Any
        myself: Any

    holders = [Holder()]
    holders[0].myself = holders[0]
    holders[0].sock = net.link(layer).ours
    net.sockets.remove(holders[0].sock)
    fd = holders[0].sock.fileno()
    with pytest.warns(ResourceWarning, match="unclosed"):
        forget(holders)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_no_descriptor_is_left_after_many_connections(net: Net) -> None:
    def talk(number: int) -> None:
        client, server = tcp_pair()
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = net.context("ktls", "client")
        theirs = net.spawn(net.context("stdlib", "server").wrap_socket, server, server_side=True)
        with context.wrap_socket(client, server_hostname=HOST) as ours, theirs.result() as peer:
            peer.sendall(b"x")
            assert ours.recv(1) == b"x"
            if number % 2:
                ours.settimeout(0.0)

    talk(0)
    talk(1)
    join_closers()
    gc.collect()
    before = descriptors()
    for number in range(200 if not has_kernel_tls() else 60):  # the lab is slow
        talk(number)
    join_closers()
    assert descriptors() - before == set()


def join_closers() -> None:
    for thread in threading.enumerate():
        if thread.name == "ktls-close":
            thread.join(PATIENCE)


def test_pickling_is_refused(net: Net) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(net.link().ours)
