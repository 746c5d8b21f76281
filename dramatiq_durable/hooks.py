"""Which middleware does something at which of Dramatiq's hooks."""

from __future__ import annotations

from collections.abc import Sequence

from dramatiq import Broker, Middleware


class Hooks(Broker):
    """A broker that tells of what happens only those who listen.

    At most hooks nobody does: to tell all of them all is a tenth of what Dramatiq does for a message.
    """

    _asked: Sequence[Middleware] = ()
    _hearing: dict[str, list[Middleware]]

    def hearing(self, hook: str) -> list[Middleware]:
        """The middleware that has a method of its own for a hook, in order."""
        # Middleware is added at any time, also by who changes the list.
        if self._asked != self.middleware:
            self._asked, self._hearing = list(self.middleware), {}
        found = self._hearing.get(hook)
        if found is None:
            nothing = getattr(Middleware, hook)
            found = [m for m in self.middleware if getattr(getattr(m, hook), "__func__", None) is not nothing]
            self._hearing[hook] = found
        return found
