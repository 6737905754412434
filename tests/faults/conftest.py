from __future__ import annotations

from .cancelling import collected_net, policy

__all__ = ("collected_net", "policy")
