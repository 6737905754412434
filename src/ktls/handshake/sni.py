"""Server name callbacks that put another context in place (``sslobj.context = other``).

From then on the secrets go to the *other* context's key log, so that one must be tapped first. The documented place to see it is
``SSLContext.sslobject_class``.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

__all__ = ("Switchable", "watch_switches")


class Switchable(ssl.SSLObject):
    """Tells when a server name callback switches the context: from then on secrets go to the other context's key log.

    Only ever used in front of another class, see ``_switchable``.
    """

    #: Weak, so that engine and handshake are no reference cycle.
    ktls_on_switch: weakref.WeakMethod[Callable[[ssl.SSLContext], None]] | None = None

    @property
    def context(self) -> ssl.SSLContext:
        return super().context

    @context.setter
    def context(self, context: ssl.SSLContext) -> None:
        on_switch = self.ktls_on_switch() if self.ktls_on_switch is not None else None
        if on_switch is not None:
            on_switch(context)
        inherited: Any = super(Switchable, type(self)).context
        inherited.__set__(self, context)


#: By the class that a context had.
_switchable_classes: Final[dict[type[ssl.SSLObject], type[ssl.SSLObject]]] = {}


def _switchable(base: type[ssl.SSLObject]) -> type[ssl.SSLObject]:
    """Return ``base``, a user's own class perhaps, with ``Switchable`` in front."""
    if base not in _switchable_classes:
        namespace = {"__module__": base.__module__}
        _switchable_classes[base] = type(base.__name__, (Switchable, base), namespace)
    return _switchable_classes[base]


def watch_switches(context: ssl.SSLContext) -> None:
    """Make the context's next objects switchable, through the documented ``sslobject_class``. Once: it is not stacked."""
    if context.sni_callback is not None and not issubclass(context.sslobject_class, Switchable):
        context.sslobject_class = _switchable(context.sslobject_class)
