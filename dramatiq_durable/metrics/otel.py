"""What was counted, as OpenTelemetry's instruments.

Counters are observable: they are asked when they are exported.  A histogram cannot be: its values are recorded as they
come, which costs a few microseconds each, in a process that has loaded an SDK for metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from opentelemetry.metrics import CallbackOptions, Histogram, Observation, get_meter

from .catalogue import COUNTED, Metric
from .cells import Labels
from .recorder import counted, listen


def instrument() -> None:
    """Make the instruments, once a process, on the meter provider that is set, or will be."""
    meter = get_meter("dramatiq_durable")
    histograms: dict[Metric, Histogram] = {}
    for metric in COUNTED:
        if metric.type == "counter":
            meter.create_observable_counter(
                metric.otel_name, [partial(_observe, metric)], unit=metric.unit, description=metric.meaning
            )
        else:
            histograms[metric] = meter.create_histogram(
                metric.otel_name,
                unit=metric.unit,
                description=metric.meaning,
                explicit_bucket_boundaries_advisory=metric.bounds,
            )

    def told(metric: Metric, labels: Labels) -> Callable[[float], None]:
        return partial(histograms[metric].record, attributes=_attributes(metric, labels))

    listen(told)


def _observe(metric: Metric, options: CallbackOptions) -> Iterable[Observation]:
    return [Observation(value, _attributes(metric, labels)) for labels, value in counted().get(metric, {}).items()]


def _attributes(metric: Metric, labels: Labels) -> dict[str, str]:
    return dict(zip(("namespace", *metric.labels), labels, strict=True))
