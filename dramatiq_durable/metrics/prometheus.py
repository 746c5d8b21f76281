"""For an application that shows its metrics with prometheus_client: ``prometheus.register()``, and ours are among them.

In multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``) nothing needs to be registered: every process writes its own into
the directory, once a second, and prometheus_client's `MultiProcessCollector` has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .catalogue import COUNTED
from .cells import Cell
from .recorder import counted


class Counted(Collector):
    """What this process has counted.  In multiprocess mode, nothing: the files have it."""

    def collect(self) -> Iterator[Metric]:
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            return
        found = counted()
        for metric in COUNTED:
            names = ("namespace", *metric.labels)
            family: CounterMetricFamily | HistogramMetricFamily
            if metric.type == "counter":
                family = CounterMetricFamily(metric.name, metric.meaning, labels=names)
                for labels, number in found.get(metric, {}).items():
                    family.add_metric(labels, number)
            else:
                family = HistogramMetricFamily(metric.name, metric.meaning, labels=names)
                for labels, cell in found.get(metric, {}).items():
                    family.add_metric(labels, _buckets(cell), cell.sum)
            yield family

    def describe(self) -> list[Metric]:
        return []


def _buckets(cell: Cell) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip((*cell.bounds, float("inf")), cell.counts, strict=True):
        total += count
        buckets.append((floatToGoString(bound), float(total)))
    return buckets


def register(registry: CollectorRegistry = REGISTRY) -> None:
    """Show what this process counts in a registry of prometheus_client, once."""
    if registry not in _registered:
        _registered.append(registry)
        registry.register(Counted())


_registered: list[CollectorRegistry] = []
