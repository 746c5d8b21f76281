"""Which middleware does something at which of Dramatiq's hooks."""

from __future__ import annotations

from dramatiq import Broker, Middleware


class Hooks(Broker):
    """A broker that tells of what happens only those who listen.

    At most hooks nobody does: to tell all of them all is a tenth of what Dramatiq does for a message.
    """

    #: The middleware that was asked, and what it answered, by hook.  One tuple: threads see either the old or the new.
    _listeners: tuple[list[Middleware], dict[str, list[Middleware]]] = ([], {})

    def hearing(self, hook: str) -> list[Middleware]:
        """The middleware that has a method of its own for a hook, in order."""
        asked, known = self._listeners
        # Middleware is added at any time, also by who changes the list.
        if asked != self.middleware:
            asked, known = self._listeners = list(self.middleware), {}
        found = known.get(hook)
        if found is None:
            nothing = getattr(Middleware, hook, None)
            found = known[hook] = [m for m in asked if nothing is None or _own(m, hook) is not nothing]
        return found


def _own(middleware: Middleware, hook: str) -> object:
    return getattr(getattr(middleware, hook, None), "__func__", None)
