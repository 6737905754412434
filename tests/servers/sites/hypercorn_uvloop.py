"""The site for hypercorn on uvloop's loop."""

import ktls.aio  # isort: split

ktls.aio.install(ktls.aio.new_uvloop_event_loop)

from .on_starlette import app  # noqa: E402  # after the switch, as in a user's module

__all__ = ("app",)
