"""What is counted in one process: how names are bounded, what a fork begins with, where it is shown."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import dramatiq_durable as durable
from dramatiq_durable.metrics import catalogue, recorder
from dramatiq_durable.metrics.catalogue import CATALOGUE, PREFIX
from dramatiq_durable.metrics.cells import MOST_NAMES, MOST_SERIES, OTHER, Cell, Names
from dramatiq_durable.metrics.gauges import bounded
from dramatiq_durable.metrics.prometheus import register
from dramatiq_durable.metrics.recorder import Recorder
from tests.support import ROOT, unique_name


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder in a process that knows no names yet."""
    monkeypatch.setattr(recorder, "_names", Names())
    return Recorder("fresh")


def test_the_table_in_the_docs_is_the_catalogue() -> None:
    assert catalogue.table() in (ROOT / "docs" / "metrics.md").read_text()


def test_names_keep_the_rules_of_prometheus_and_opentelemetry() -> None:
    assert len({m.name for m in CATALOGUE}) == len({m.otel_name for m in CATALOGUE}) == len(CATALOGUE)
    for m in CATALOGUE:
        assert m.name.startswith(PREFIX)
        assert m.name.endswith("_total") == (m.type == "counter")
        assert (m.type == "histogram") == bool(m.bounds)
        assert list(m.bounds) == sorted(set(m.bounds))
        assert (m.unit == "s") == m.name.endswith("_seconds")
        assert (m.unit == "By") == m.name.endswith("_bytes")
        assert not {"le", "namespace"} & set(m.labels)
        assert m.meaning.endswith(".")


def test_a_histogram_puts_a_value_under_its_bound() -> None:
    cell = Cell((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, float("inf")):
        cell.add(value)
    assert cell.counts == [2, 2, 2]


def test_hostile_names_are_bounded(fresh: Recorder) -> None:
    for n in range(3 * MOST_NAMES):
        fresh.count(catalogue.STARTED, f"x{n}\n{{le=\"\u202e'")
        fresh.observe(catalogue.PROCESSING, 1, f"x{n}", f"x{n}")
    counted = fresh.counted()
    started, processing = counted[catalogue.STARTED], counted[catalogue.PROCESSING]
    # A broker that an earlier test has left behind may have taken a name or two.
    assert MOST_NAMES - 10 < len(started) <= MOST_NAMES + 1
    assert MOST_NAMES - 10 < len(processing) <= MOST_NAMES + 1
    assert started["fresh", OTHER] == 3 * MOST_NAMES - len(started) + 1
    assert processing["fresh", OTHER, OTHER].counts[9] == 3 * MOST_NAMES - len(processing) + 1
    # Nothing else of them is kept.
    assert len(fresh._numbers) + len(fresh._cells) == len(started) + len(processing)


def test_so_are_their_combinations(fresh: Recorder) -> None:
    for n in range(100):
        for m in range(100):
            fresh.count(catalogue.CLOSED, f"x{n}", f"y{m}")
    series = fresh.counted()[catalogue.CLOSED]
    assert len(series) == MOST_SERIES + 1
    assert sum(series.values()) == 10_000


def test_so_are_the_streams_of_the_exporter() -> None:
    rows: list[Any] = [("stream_ready_messages", f"s{n}", None, float(n)) for n in range(1000)]
    rows += [("stream_oldest_ready_seconds", f"s{n}", None, float(n)) for n in range(1000)]
    random.shuffle(rows)
    gauges = {m.name.removeprefix(PREFIX): series for m, series in bounded(rows).items()}
    ready, oldest = gauges["stream_ready_messages"], gauges["stream_oldest_ready_seconds"]
    assert len(ready) == len(oldest) == MOST_NAMES + 1
    assert ready["s999",] == 999
    assert sum(ready.values()) == sum(range(1000))
    assert oldest[OTHER,] == 799


def test_what_a_broker_counted_outlives_it(fresh: Recorder) -> None:
    name = unique_name()
    fresh.count(catalogue.STARTED, name)
    before = recorder.counted()[catalogue.STARTED]["fresh", name]
    recorder.retire(fresh)
    assert recorder.counted()[catalogue.STARTED]["fresh", name] == before == 1


def test_a_broker_may_go_while_something_is_counted(fresh: Recorder) -> None:
    """The garbage collector comes whenever it likes, also on a thread that holds a lock of its metrics."""
    name = unique_name()
    fresh.count(catalogue.STARTED, name)
    done = threading.Event()

    def collect() -> None:
        with fresh._lock:
            recorder.retire(fresh)
        done.set()

    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(5)
    assert recorder.counted()[catalogue.STARTED]["fresh", name] == 1
    assert fresh not in recorder._recorders


@pytest.fixture
def broker(database_url: str) -> Iterator[durable.DurableBroker]:
    broker = durable.DurableBroker(database_url, middleware=[])
    yield broker
    broker.close()


def test_a_registry_of_the_application_shows_it(broker: durable.DurableBroker) -> None:
    stream = unique_name()
    broker.declare_queue(stream)
    for _ in range(3):
        broker.enqueue(dramatiq.Message(stream, "x", (), {}, {}))
    registry = CollectorRegistry()
    register(registry)
    register(registry)
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}
    assert {f for f in families if f.startswith(PREFIX)} == {m.name.removesuffix("_total") for m in catalogue.COUNTED}
    enqueued = families["dramatiq_durable_messages_enqueued"].samples
    assert [(s.labels, s.value) for s in enqueued if s.labels["stream"] == stream] == [
        ({"namespace": "durable", "stream": stream, "kind": "message"}, 3.0)
    ]


PROGRAM = """
import json, os, sys
import dramatiq, dramatiq_durable as durable
broker = durable.DurableBroker(sys.argv[1], middleware=[])
broker.declare_queue("default")
def send(count):
    for _ in range(count):
        broker.enqueue(dramatiq.Message("default", "x", (), {}, {}))
"""


def run(run_process: Callable[..., Any], code: str, url: str, **env: str) -> str:
    process = run_process.python(PROGRAM + code, url, env=env)  # type: ignore[attr-defined]
    assert process.wait() == 0, process.output
    return str(process.output)


@pytest.mark.parametrize("early", ["", "import prometheus_client\n"], ids=["", "imported before"])
def test_forks_each_count_their_own(run_process: Any, database_url: str, tmp_path: Path, early: str) -> None:
    """Also where prometheus_client was imported, and chose its value class, before the directory was set."""
    code = f"""
{early}os.environ["PROMETHEUS_MULTIPROC_DIR"] = {str(tmp_path)!r}
send(3)
if os.fork() == 0:
    send(2)
    broker.close()
    os._exit(0)
os.wait()
send(1)
broker.close()
from dramatiq_durable.metrics.recorder import counted
"""
    run(run_process, code, database_url)
    samples = [
        (s.labels, s.value)
        for family in MultiProcessCollector(CollectorRegistry(), str(tmp_path)).collect()
        for s in family.samples
        if s.name == catalogue.ENQUEUED.name
    ]
    assert samples == [({"namespace": "durable", "stream": "default", "kind": "message"}, 6.0)]
    assert len(list(tmp_path.glob("counter_*.db"))) == 2


def test_a_process_with_the_id_of_another_goes_on_from_it(tmp_path: Path) -> None:
    from dramatiq_durable.metrics.multiprocess import Files

    mine = Recorder(unique_name())
    mine.count(catalogue.STARTED, "a")
    for _ in range(2):
        files = Files(str(tmp_path))
        files.write()
        files.close()
    (value,) = [
        s.value
        for family in MultiProcessCollector(CollectorRegistry(), str(tmp_path)).collect()
        for s in family.samples
        if s.name == catalogue.STARTED.name and s.labels["namespace"] == mine.namespace
    ]
    assert value == 2


def test_without_anybody_to_show_it_to_nothing_is_imported(run_process: Any, database_url: str) -> None:
    code = "send(1)\nprint([m for m in sys.modules if m.startswith(('prometheus_client', 'opentelemetry'))])"
    assert "[]" in run(run_process, code, database_url)


def test_opentelemetry_has_the_same(run_process: Any, database_url: str) -> None:
    code = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))

@dramatiq.actor(broker=broker)
def x(): pass
from dramatiq_durable.metrics.cells import Cell
from dramatiq_durable.metrics.recorder import counted
from dramatiq_durable.metrics.catalogue import COUNTED
worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=50)
worker.start()
send(5)
broker.join("default")
worker.stop()
(resource,) = reader.get_metrics_data().resource_metrics
(scope,) = resource.scope_metrics
mine = counted()
by_name = {metric.name: metric for metric in scope.metrics}
assert set(by_name) == {m.otel_name for m in mine}, set(by_name) ^ {m.otel_name for m in mine}
for m, series in mine.items():
    metric = by_name[m.otel_name]
    assert (metric.unit, metric.description) == (m.unit, m.meaning)
    points = {tuple(p.attributes[k] for k in ("namespace", *m.labels)): p for p in metric.data.data_points}
    assert set(points) == set(series), (m.name, set(points), set(series))
    for labels, value in series.items():
        if isinstance(value, Cell):
            assert list(points[labels].bucket_counts) == value.counts, m.name
            assert abs(points[labels].sum - value.sum) < 1e-6
        else:
            assert points[labels].value == value
print("the same", len(mine))
"""
    assert "the same" in run(run_process, code, database_url)
