"""What is counted beside the workers, how hostile names are bounded, and Dramatiq's own metrics beside ours."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

import dramatiq_durable as durable
from dramatiq_durable import schedules
from dramatiq_durable.metrics import catalogue, recorder
from dramatiq_durable.metrics.catalogue import PREFIX, Metric
from dramatiq_durable.metrics.cells import MOST_NAMES, OTHER, Cell, Names
from tests.support import free_port, unique_name, wait_until


@pytest.fixture
def broker(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[durable.DurableBroker]:
    """In a process that knows no names yet."""
    monkeypatch.setattr(recorder, "_names", Names())
    broker = durable.DurableBroker(database_url, middleware=[])
    yield broker
    broker.close()


def counted(broker: durable.DurableBroker, metric: Metric) -> dict[tuple[str, ...], Any]:
    """By the labels, without the namespace."""
    return {labels[1:]: value for labels, value in broker.commit.metrics.counted().get(metric, {}).items()}


def plain(stream: str, n: int = 0, **options: Any) -> dramatiq.Message[Any]:
    return dramatiq.Message(stream, "x", (n,), {}, options)


# --- sending ---------------------------------------------------------------------------------------------------------


def test_each_way_to_send_is_counted(broker: durable.DurableBroker, database_url: str) -> None:
    stream = unique_name()
    broker.declare_queue(stream)
    series = (stream, "message")

    def sent() -> float:
        return float(counted(broker, catalogue.ENQUEUED).get(series, 0))

    for n in range(3):
        broker.enqueue(plain(stream, n))
        assert sent() == n + 1
    commits = counted(broker, catalogue.BATCH)[()]
    broker.enqueue_many([plain(stream) for _ in range(100)])
    assert sent() == 103
    batches = counted(broker, catalogue.BATCH)[()]
    assert (sum(batches.counts) - sum(commits.counts), batches.sum - commits.sum) == (1, 100)
    # Of two with the same key one is stored.
    for _ in range(2):
        broker.enqueue(plain(stream, unique_key="k"))
    assert sent() == 104
    broker.enqueue(plain(stream), delay=60_000)
    assert sent() == 105

    # In the caller's own transaction: when it is sent, whatever becomes of the transaction.
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            broker.enqueue(plain(stream))
            broker.enqueue_many([plain(stream) for _ in range(10)])
            broker.enqueue(plain(stream, unique_key="k"))
        assert sent() == 116
        conn.rollback()
    assert sent() == 116

    # By a schedule, by hand; a run is no message.
    schedules.create(
        "s", cron="0 0 1 1 *", target=durable.activity_stub("x", queue_name=stream), args=(1,), broker=broker
    )
    schedules.trigger("s", broker=broker)
    assert sent() == 117

    # A start, a signal, a cancel are none either.
    handle = durable.workflow_stub("w", queue_name=stream, broker=broker).options(workflow_id="w").start()
    handle.signal("go")
    handle.cancel()
    assert counted(broker, catalogue.ENQUEUED) == {series: 117}


def test_on_a_connection_that_is_awaited(broker: durable.DurableBroker, database_url: str) -> None:
    stream = unique_name()
    broker.declare_queue(stream)

    async def send() -> None:
        async with await psycopg.AsyncConnection.connect(database_url) as conn, durable.using(conn):
            broker.enqueue(plain(stream))
            broker.enqueue(plain(stream, unique_key="k"))
            assert counted(broker, catalogue.ENQUEUED) == {}

    asyncio.run(send())
    assert counted(broker, catalogue.ENQUEUED) == {(stream, "message"): 2}


def test_errors_are_counted_by_their_class(broker: durable.DurableBroker, database_url: str) -> None:
    stream = unique_name()
    broker.declare_queue(stream)
    broker.enqueue(plain(stream))
    with psycopg.connect(database_url, autocommit=True) as conn:
        # The connection that commits; the answer to what is sent next is that it was terminated.
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'dramatiq_durable' AND datname = current_database()"
        )
        broker.enqueue(plain(stream))
    errors = counted(broker, catalogue.ERRORS)
    assert set(errors) <= {("57",), ("none",)}
    assert sum(errors.values()) == 1
    assert counted(broker, catalogue.ENQUEUED) == {(stream, "message"): 2}


# --- names -----------------------------------------------------------------------------------------------------------


def hostile(n: int) -> str:
    return f'x{n}"}}\n{{le="\u202e\\{n}'


def test_ten_thousand_hostile_names_are_a_few_series(broker: durable.DurableBroker, database_url: str) -> None:
    """Actors and workflows that nobody here has declared, in messages that anybody may send."""
    broker.declare_queue("legitimate")
    done: list[int] = []

    @dramatiq.actor(broker=broker, queue_name="legitimate")
    def known(n: int) -> None:
        done.append(n)

    bad = [dramatiq.Message("legitimate", hostile(n), (), {}, {}) for n in range(10_000)]
    broker.enqueue_many([*bad[:5000], known.message(1), *bad[5000:], known.message(2)])
    worker = dramatiq.Worker(broker, worker_threads=4, worker_timeout=50)
    worker.start()
    try:
        with psycopg.connect(database_url, autocommit=True) as conn:
            wait_until(lambda: conn.execute("SELECT count(*) FROM durable.message").fetchone() == (0,), timeout=60)
    finally:
        worker.stop()
    assert sorted(done) == [1, 2]
    assert counted(broker, catalogue.CLAIMED) == {("legitimate", "message"): 10_002}
    assert counted(broker, catalogue.ACKED) == {("legitimate", "message"): 2}
    assert counted(broker, catalogue.DEAD_LETTERED) == {("legitimate", "message"): 10_000}
    assert set(counted(broker, catalogue.PROCESSING)) <= {("legitimate", "known"), ("legitimate", OTHER)}
    assert sum(counted(broker, catalogue.PROCESSING)["legitimate", "known"].counts) == 2
    assert len(broker.commit.metrics.lanes) <= 2
    assert sum(len(series) for series in broker.commit.metrics.counted().values()) < 40


def test_so_are_ten_thousand_streams(broker: durable.DurableBroker) -> None:
    """Whoever names queues by what strangers send him keeps those that he used first."""
    broker.declare_queue("legitimate")
    broker.enqueue(plain("legitimate"))
    for n in range(10_000):
        broker.stream_names[n + 1000] = hostile(n)
        broker.commit.metrics._sends(n + 1000, "m")
        broker.commit.metrics.handed(n + 1000)
    broker.enqueue(plain("legitimate"))
    for metric in (catalogue.ENQUEUED, catalogue.WAIT, catalogue.CLAIMED):
        series = counted(broker, metric)
        assert len(series) <= MOST_NAMES + 2
        others = sum(sum(v.counts) if isinstance(v, Cell) else v for k, v in series.items() if k[0] == OTHER)
        assert others >= 10_000 - MOST_NAMES
    assert counted(broker, catalogue.ENQUEUED)["legitimate", "message"] == 2


# --- Dramatiq's own, and the tools --------------------------------------------------------------------------------

APP = """
import dramatiq
@dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=5)
def fails(): raise ValueError("as planned")
@dramatiq.actor
def works(n): pass
"""


def check_metrics(text: str) -> None:
    """By Prometheus's own tool, where it is there; what it only recommends is not for us to follow."""
    if (promtool := shutil.which("promtool")) is None:
        return
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    said = [line for line in (checked.stdout + checked.stderr).splitlines() if PREFIX in line]
    assert checked.returncode in (0, 3), checked.stderr
    assert said == [], said


def test_dramatiqs_own_metrics_are_beside_ours(
    run_process: Any, database_url: str, broker: durable.DurableBroker, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "watched.py").write_text(
        "import dramatiq\n"
        "from dramatiq.middleware.prometheus import Prometheus\n"
        "dramatiq.get_broker().add_middleware(Prometheus())\n"
        "import shop\n"
    )
    port = free_port()
    worker = run_process.dramatiq(
        *("dramatiq_durable.app", "--processes", "2", "--threads", "2", "--path", str(tmp_path)),
        env={
            "DRAMATIQ_DURABLE_URL": database_url,
            "DRAMATIQ_DURABLE_IMPORT": "watched",
            "dramatiq_prom_port": str(port),
            "dramatiq_prom_host": "127.0.0.1",
            "dramatiq_prom_db": str(tmp_path / "metrics"),
        },
    )
    broker.declare_queue("default")
    broker.enqueue_many([dramatiq.Message("default", "works", (n,), {}, {}) for n in range(50)])
    for _ in range(4):
        broker.enqueue(dramatiq.Message("default", "fails", (), {}, {}))

    def scraped() -> dict[str, float]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        found: dict[str, float] = {"": 0.0}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        texts.append(text)
        return found

    texts: list[str] = []
    worker.wait_for("_run_exposition_server' is ready")
    wait_until(lambda: scraped().get(f"{PREFIX}messages_dead_lettered_total") == 4, timeout=60)
    wait_until(lambda: scraped().get("dramatiq_messages_total") == 58, timeout=30)
    found = wait_until(lambda: (f := scraped()).get(f"{PREFIX}messages_acked_total") == 50 and f, timeout=30)
    assert found["dramatiq_message_rejects_total"] == 4
    assert found["dramatiq_message_errors_total"] == 8
    assert found[f"{PREFIX}messages_claimed_total"] - found.get(f"{PREFIX}messages_released_total", 0) == 58
    assert found[f"{PREFIX}messages_retried_total"] == 4
    assert found[f"{PREFIX}message_processing_seconds_count"] == found["dramatiq_message_duration_milliseconds_count"]
    assert worker.stop() == 0
    check_metrics("".join(re.findall(rf"(?m)^(?:# \w+ )?{PREFIX}.*\n", texts[-1])))


def test_the_exporters_answer_keeps_prometheus_rules(run_process: Any, database_url: str) -> None:
    command = ["-m", "dramatiq_durable.cli", "--url", database_url, "exporter", "--listen", "127.0.0.1:0"]
    exporter = run_process(sys.executable, *command)
    port = int(exporter.wait_for("listening on").rpartition(":")[2].partition("/")[0])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        check_metrics(answer.read().decode())


# --- OpenTelemetry -------------------------------------------------------------------------------------------------

OTEL = """
import sys
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
import dramatiq, dramatiq_durable as durable
broker = durable.DurableBroker(sys.argv[1], middleware=[])
broker.declare_queue("default")
broker.enqueue(dramatiq.Message("default", "x", (), {}, {}))
data = reader.get_metrics_data()
print("instruments", 0 if data is None else sum(len(s.metrics) for r in data.resource_metrics for s in r.scope_metrics))
from dramatiq_durable.metrics.recorder import counted
print("counted", len(counted()))
"""


@pytest.mark.parametrize("level", ["off", "info", "debug"])
def test_where_telemetry_is_off_opentelemetry_has_no_metrics(run_process: Any, database_url: str, level: str) -> None:
    process = run_process.python(OTEL, database_url, env={"DRAMATIQ_DURABLE_TELEMETRY": level})
    assert process.wait() == 0, process.output
    found = dict(line.split() for line in process.output.splitlines())
    assert (int(found["instruments"]) > 0) == (level != "off")
    # Prometheus has them all the same.
    assert int(found["counted"]) >= 4
