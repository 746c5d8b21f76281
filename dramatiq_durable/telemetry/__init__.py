"""Telemetry: the one place from which spans and the fields of logs come.

OpenTelemetry is the application's: whoever sets up an SDK has our spans in it.  Nothing of it is imported before that,
and where it is not, each place that could write a span asks once and goes on.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from .spans import Spans

Level = Literal["off", "info", "debug"]
LEVELS: Final = ("off", "info", "debug")

#: Where a run's first event has the context that it was started in, and the option that has a run's workflow id in what
#: it sends: to activities, and to those who are subscribed to its topics.
TRACE: Final = "trace"
WORKFLOW: Final = "durable_workflow"

#: Where a run's first event has the first run of those that it goes on for, if that was begun in no trace.
FIRST: Final = "first"


def with_trace(facts: str | None, carrier: dict[str, str]) -> str | None:
    """What a run is started with, as JSON, and the context in which it is."""
    if not carrier:
        return facts
    return json.dumps({**json.loads(facts or "{}"), TRACE: carrier}, ensure_ascii=False)


class Telemetry:
    """What a broker tells of what it does.

    Attributes:
      level(str): "off", "info" or "debug".
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        self._spans: Spans | None = None

    def spans(self) -> Spans | None:
        """What writes spans; None while the application has set up no OpenTelemetry SDK, or wants none of them.

        Asked anew each time: a worker may set one up after the broker was made, or after a fork.
        """
        api = sys.modules.get("opentelemetry.trace")
        if api is None or self.level == "off":
            return None
        return self._of(api)

    def _of(self, api: Any) -> Spans | None:
        # What get_tracer_provider() answers, which reads the environment first: that is much, for every message of
        # those who have the API, because some library does, and no SDK.
        provider = getattr(api, "_TRACER_PROVIDER", None)
        if provider is None and hasattr(api, "_TRACER_PROVIDER"):
            return None
        if self._spans is not None and self._spans.provider is provider:
            return self._spans
        if provider is None:
            # A version that keeps it elsewhere; or another thread is about to import it.
            find = getattr(api, "get_tracer_provider", None)
            provider = None if find is None else find()
        if provider is None or isinstance(provider, (api.ProxyTracerProvider, api.NoOpTracerProvider)):
            return None
        from .spans import Spans

        self._spans = Spans(provider, debug=self.level == "debug")
        return self._spans
