"""An HTTP protocol for uvicorn that sends files through the kernel.

uvicorn app:app --loop ktls.aio:new_event_loop --http ktls.asgi:PathSendProtocol --ssl-certfile cert.pem --ssl-keyfile key.pem

Applications find ``http.response.pathsend`` and ``http.response.zerocopysend`` in their scope, and frameworks that know the first use it by themselves: Starlette's
``FileResponse`` and ``StaticFiles`` do, for whole files (for ranges they send body messages, which work as ever). On a connection in the kernel the file then
goes out by ``sendfile``; on all others, plain ones included, the same application works, by the loop's own ``sendfile`` or by reading and writing.

Middleware must pass the messages on: Starlette's ``GZipMiddleware`` and ``BaseHTTPMiddleware`` do that for ``pathsend``, the latter not for ``zerocopysend``.

``PathSendProtocol`` uses httptools where that is installed and h11 otherwise, as uvicorn does; ``H11PathSendProtocol`` always uses h11.
"""

from .on_h11 import H11PathSendProtocol

try:
    from .on_httptools import HttpToolsPathSendProtocol as PathSendProtocol
except ModuleNotFoundError as _error:
    if _error.name != "httptools":
        raise
    from .on_h11 import (  # type: ignore[assignment]  # either is a protocol for uvicorn
        H11PathSendProtocol as PathSendProtocol,
    )

__all__ = ("H11PathSendProtocol", "PathSendProtocol")
