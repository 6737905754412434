"""A cork before a transport: what is held back goes out together with what follows, as one write and so as one TLS record.

uvicorn writes the head of a response as soon as the application starts it, and the body when that comes. Each write becomes a record of its own, and
a record costs about 21,000 instructions whatever its size. ASGI allows a server to keep the head until the body is there; but an
application may take its time over the first piece (server-sent events), and the client would wait. So what is held is kept no longer than until the event
loop's next turn: long enough for an application that goes straight on, never noticeable for one that doesn't.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

__all__ = ("Cork",)


@final
class Cork:
    """Stands in for ``transport``: all calls reach it, in order, but writes made inside ``holding`` wait for the next write.

    Held bytes go out with the next write, before a close, or in the event loop's next turn, whichever comes first. An abort drops them.
    """

    __slots__ = ("_flush", "_held", "_holding", "transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self._held = b""
        self._holding = False
        self._flush: asyncio.Handle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    @property
    def held(self) -> int:
        """How many bytes are waiting."""
        return len(self._held)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold back what is written inside."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def write(self, data: bytes) -> None:
        """Write ``data``, behind what was held and together with it."""
        if self._holding:
            self._held += data
            if self._flush is None:
                self._flush = asyncio.get_running_loop().call_soon(self.flush)
        elif not data:
            pass  # writes nothing, and is no reason to let go
        elif self._held:
            self.transport.writelines((self._take(), data))
        else:
            self.transport.write(data)

    def writelines(self, list_of_data: Iterable[bytes]) -> None:
        """Write all of ``list_of_data``, in the same way."""
        if self._holding:
            self.write(b"".join(list_of_data))
        elif self._held:
            self.transport.writelines((self._take(), *list_of_data))
        else:
            self.transport.writelines(list_of_data)

    def write_eof(self) -> None:
        """Write what was held, and end our direction."""
        self.flush()
        self.transport.write_eof()

    def flush(self) -> None:
        """Write what was held."""
        if self._held:
            self.transport.write(self._take())
        else:
            self._take()

    def close(self) -> None:
        """Write what was held, and close."""
        self.flush()
        self.transport.close()

    def abort(self) -> None:
        """Close at once, and drop what was held."""
        self._take()
        self.transport.abort()

    def _take(self) -> bytes:
        held, self._held = self._held, b""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        return held
