from __future__ import annotations

from ..sockets.fixtures import net

__all__ = ("net",)
