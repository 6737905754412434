"""The site for hypercorn: the first line is the switch. hypercorn loads the application in each worker, before it makes the loop."""

import ktls.aio  # isort: split

ktls.aio.install()

from .on_starlette import app  # noqa: E402  # after the switch, as in a user's module

__all__ = ("app",)
