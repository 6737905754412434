"""Record layers that do as they are told: a real layer inside, and refusals, delays and a diary around it.

They are verified fakes: without orders they pass ``check_record_layer`` like the layer inside. With orders they show what a driver does when the
kernel refuses something, at exactly that step::

    sender = FaultySender(UserspaceSender(sock, suite, keys))
    sender.refuse("install", OSError(errno.ENOMEM, "no memory"))    # the next call of install; the one after it goes through
    sender.before("send", gate.wait)                                # the next call of send waits for gate first

Calls: ``send``, ``send_record``, ``sendfile``, ``install``, ``flush``, ``recv_into``, ``read_record``, ``sequence_number``.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import final

from ktls.protocol.enums import ContentType
from ktls.protocol.key_schedule import TrafficKeys
from ktls.protocol.states import InboundPlainMessage
from ktls.record.interface import (
    LayerName,
    ReadBuffer,
    RecordReceiver,
    RecordSender,
    WriteBuffer,
)

__all__ = (
    "FaultyReceiver",
    "FaultySender",
)


class _Faulty:
    """Orders and diary. ``calls`` are the calls that went through to the layer inside, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._orders: defaultdict[str, deque[Callable[[], object]]] = defaultdict(deque)

    def refuse(self, call: str, error: Exception, times: int = 1) -> None:
        """Make the next ``times`` calls of ``call`` raise ``error`` instead."""

        def give_up() -> None:
            raise error

        self._orders[call].extend([give_up] * times)

    def before(self, call: str, action: Callable[[], object]) -> None:
        """Run ``action`` in front of the next call of ``call`` that has no other order."""
        self._orders[call].append(action)

    def _begin(self, call: str) -> None:
        if self._orders[call]:
            self._orders[call].popleft()()
        self.calls.append(call)


@final
class FaultySender(_Faulty):
    """A ``RecordSender`` around another one."""

    def __init__(self, inner: RecordSender) -> None:
        super().__init__()
        self.inner = inner
        self.name: LayerName = inner.name
        self.can_change_key = inner.can_change_key
        self.max_fragment = inner.max_fragment

    def send(self, data: ReadBuffer, flags: int = 0) -> int:
        """See ``RecordSender``."""
        self._begin("send")
        return self.inner.send(data, flags)

    def send_vector(self, buffers: list[ReadBuffer], flags: int = 0) -> int:
        """See ``RecordSender``."""
        self._begin("send_vector")
        return self.inner.send_vector(buffers, flags)

    def send_record(self, content_type: ContentType, fragment: bytes, flags: int = 0) -> None:
        """See ``RecordSender``."""
        self._begin("send_record")
        self.inner.send_record(content_type, fragment, flags)

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """See ``RecordSender``."""
        self._begin("sendfile")
        return self.inner.sendfile(fd, offset, count)

    def install(self, keys: TrafficKeys) -> None:
        """See ``RecordSender``."""
        self._begin("install")
        self.inner.install(keys)

    @property
    def unsent(self) -> bool:
        """See ``RecordSender``."""
        return self.inner.unsent

    def sequence_number(self) -> int:
        """See ``RecordSender``."""
        self._begin("sequence_number")
        return self.inner.sequence_number()

    def flush(self, flags: int = 0) -> None:
        """See ``RecordSender``."""
        self._begin("flush")
        self.inner.flush(flags)


@final
class FaultyReceiver(_Faulty):
    """A ``RecordReceiver`` around another one."""

    def __init__(self, inner: RecordReceiver) -> None:
        super().__init__()
        self.inner = inner

    @property
    def name(self) -> LayerName:
        """See ``RecordReceiver``."""
        return self.inner.name

    @property
    def can_change_key(self) -> bool:
        """See ``RecordReceiver``."""
        return self.inner.can_change_key

    def recv_into(self, buffer: WriteBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """See ``RecordReceiver``."""
        self._begin("recv_into")
        return self.inner.recv_into(buffer, nbytes, flags)

    def read_record(self, flags: int = 0) -> InboundPlainMessage | None:
        """See ``RecordReceiver``."""
        self._begin("read_record")
        return self.inner.read_record(flags)

    def record_waits(self) -> bool:
        """See ``RecordReceiver``."""
        return self.inner.record_waits()

    def install(self, keys: TrafficKeys) -> None:
        """See ``RecordReceiver``."""
        self._begin("install")
        self.inner.install(keys)

    def sequence_number(self) -> int:
        """See ``RecordReceiver``."""
        self._begin("sequence_number")
        return self.inner.sequence_number()

    def pending(self) -> int:
        """See ``RecordReceiver``."""
        return self.inner.pending()
