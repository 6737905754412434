"""The other process of the hand-over tests: gets a descriptor and a state, then does what it is told.

Not forked, but started anew: it has nothing of the first process but what comes through the channel.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from typing import Any

import ktls


class Commands:
    """What the first process can ask for: its name, and JSON for its arguments."""

    def __init__(self, tls: ktls.KTLSSocket) -> None:
        self.tls = tls

    def facts(self) -> Any:
        tls = self.tls
        binding = tls.get_channel_binding("tls-exporter")
        return {
            "version": tls.version(),
            "cipher": tls.cipher(),
            "alpn": tls.selected_alpn_protocol(),
            "name": tls.server_hostname,
            "server_side": tls.server_side,
            "certificate": repr(tls.getpeercert()),
            "der": (tls.getpeercert(True) or b"").hex(),
            "binding": None if binding is None else binding.hex(),
            "offload": repr(tls.offload),
        }

    def usage(self) -> list[int]:
        usage = self.tls.key_usage
        return [usage.tx.generation, usage.tx.records, usage.rx.generation, usage.rx.records]

    def send(self, text: str, times: int = 1) -> None:
        for _ in range(times):
            self.tls.sendall(text.encode())

    def recv(self, count: int) -> str:
        data = bytearray()
        while len(data) < count and (piece := self.tls.recv(count - len(data))):
            data += piece
        return data.decode()

    def refresh(self, request_peer: bool) -> None:
        self.tls.refresh_traffic_keys(request_peer)

    def close(self) -> None:
        self.tls.close()


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    state, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 1)
    try:
        commands = Commands(ktls.KTLSSocket.from_state(socket.socket(fileno=descriptors[0]), state))
        commands.tls.settimeout(30)
        channel.send(json.dumps({"result": sorted(os.listdir("/proc/self/fd"))}).encode())
        while request := channel.recv(1 << 20):
            name, *arguments = json.loads(request)
            try:
                answer = {"result": getattr(commands, name)(*arguments)}
            except Exception as error:
                answer = {"error": type(error).__name__}
            channel.send(json.dumps(answer).encode())
    except BaseException:
        channel.send(json.dumps({"error": traceback.format_exc(limit=-3)}).encode())
        raise


if __name__ == "__main__":
    main()
