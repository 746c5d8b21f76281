"""In which order news reaches a run."""

from __future__ import annotations

from . import events
from .events import Event

#: An event, with its number in the run's inbox; 0 where it does not come from there.
News = tuple[int, Event]

_PRECEDENCE = {
    events.WORKFLOW_STARTED: 0,
    events.WORKFLOW_RESET: 1,
    **dict.fromkeys(events.ESCALATION_ANSWERS, 2),
    **dict.fromkeys(events.MESSAGE_TYPES, 3),
}


def in_order(news: list[News]) -> list[News]:
    """Put news that waits into the order in which the run is given it.

    The start comes before all; answers to escalations before whatever may withdraw those, or let them time out; what is
    said to the code before whatever may end the run, and signals together, so that code that answers the first can see
    the others.  After a reset comes first what the run was reset to.
    """
    ordered = sorted(news, key=lambda item: _PRECEDENCE.get(item[1].type, 4))
    reset = next((n for n, (_, event) in enumerate(ordered) if event.type == events.WORKFLOW_RESET), None)
    if reset is not None:
        # What stands before it in the inbox are the ends of children.
        again = news[next(n for n, (_, event) in enumerate(news) if event.type == events.WORKFLOW_RESET) + 1]
        ordered.remove(again)
        ordered.insert(reset + 1, again)
    last = max((n for n, (_, e) in enumerate(ordered) if e.type == events.SIGNAL_RECEIVED), default=-1)
    return [(key, _held(e, n < last) if e.type == events.SIGNAL_RECEIVED else e) for n, (key, e) in enumerate(ordered)]


def _held(signal: Event, with_next: bool) -> Event:
    facts = {name: value for name, value in (signal.attributes or {}).items() if name != "with_next"}
    if with_next:
        facts["with_next"] = True
    return signal._replace(attributes=facts or None)
