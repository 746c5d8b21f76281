"""A real Prometheus scrapes real workers with failures, and answers every panel's query; promtool tries the alerts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
import yaml

import dramatiq_durable as durable
from dramatiq_durable import escalations, schedules
from dramatiq_durable.watchdog import Watchdog
from tests.dashboards.reading import CASES, RULES, Query, near, queries, rules
from tests.support import ROOT, free_port, wait_until
from tests.support.processes import Processes
from tests.system.conftest import program, running

pytestmark = pytest.mark.system

MODULE = "tests.metrics.application"


def promtool(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [program("prometheus", "promtool"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


# --- the alerts ------------------------------------------------------------------------------------------------------


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    checked = promtool("check", "rules", RULES)
    assert checked.returncode == 0, checked.stderr
    tried = promtool("test", "rules", CASES.name, cwd=CASES.parent)
    assert tried.returncode == 0, tried.stdout + tried.stderr


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
@pytest.mark.parametrize("instead", ["vector(0) > 1", "max by (namespace, stream) ({job='exporter'})"])
def test_the_cases_notice_another_rule(rule: dict[str, Any], instead: str, tmp_path: Path) -> None:
    changed = yaml.safe_load(RULES.read_text())
    for other in changed["groups"][0]["rules"]:
        if other["alert"] == rule["alert"]:
            other["expr"] = instead
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(changed))
    cases = yaml.safe_load(CASES.read_text())
    cases["tests"] = [case for case in cases["tests"] if near(rule, case)]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(cases))
    tried = promtool("test", "rules", "tests.yaml", cwd=tmp_path)
    assert tried.returncode != 0
    assert rule["alert"] in tried.stdout + tried.stderr


def test_what_the_docs_say_sets_it_up(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    for line in re.findall(r"^\$ ((?:sed|promtool) .*)$", page, re.MULTILINE):
        line = line.replace("promtool", program("prometheus", "promtool")).replace("/etc/prometheus", str(tmp_path))
        done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    rules = yaml.safe_load((tmp_path / "dramatiq_durable.yaml").read_text())["groups"][0]["rules"]
    assert {rule["annotations"]["runbook_url"].partition("#")[0] for rule in rules} == {"https://your.wiki/runbook"}
    config, relabelled = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    # In the first job, as in the second.
    (tmp_path / "prometheus.yml").write_text(config.replace("    static_configs", relabelled + "    static_configs"))
    checked = promtool("check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


# --- the panels ------------------------------------------------------------------------------------------------------


class Prometheus:
    """A server that scrapes every second."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
            return True
        return False

    def get(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            body = json.loads(answer.read())
        assert body["status"] == "success", body
        return body["data"]

    def has_data(self, query: Query, begun: float) -> bool:
        """Whether there is a number in what the panel shows of the time since then."""
        text = query.filled(rate="10s", range=f"{int(time.time() - begun) + 1}s")
        if query.instant:
            points = [series["value"] for series in self.get("query", query=text)["result"]]
        else:
            found = self.get("query_range", query=text, start=begun, end=time.time(), step=1)["result"]
            points = [point for series in found for point in series["values"]]
        return any(math.isfinite(float(value)) for _, value in points)


@contextmanager
def prometheus(folder: Path, **targets: int) -> Iterator[Prometheus]:
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for job, port in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    # It is new, and what came up since it began counts all the same.
    (folder / "rules.yaml").write_text(RULES.read_text().replace("count(up offset 15m)", "count(up offset 1s)"))
    port = free_port()
    server = Prometheus(port)
    with running(
        server.ready,
        program("prometheus", "prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        folder=folder,
    ):
        yield server


class Load:
    """Sends work of all kinds, and breaks what can be broken.

    Parameters:
      broker(DurableBroker): that sends.
      sql: asks the database.
      end(Path): a file that ends what waits for it.
    """

    def __init__(self, broker: durable.DurableBroker, sql: Callable[[str], Any], end: Path) -> None:
        self.broker = broker
        self.sql = sql
        self.end = end
        self.round = 0

    def send(self, actor: str, *arguments: Any, delay: int | None = None) -> None:
        self.broker.enqueue(dramatiq.Message("default", actor, arguments, {}, {}), delay=delay)

    def start(self, workflow: str, *arguments: Any) -> durable.WorkflowHandle[Any]:
        stub = durable.workflow_stub(workflow, queue_name="flows", broker=self.broker)
        return stub.options(workflow_id=f"{workflow}-{self.round}").start(*arguments)

    def once(self) -> None:
        """A bit of everything."""
        self.round += 1
        self.broker.enqueue_many([dramatiq.Message("counted", "count", (n,), {}, {}) for n in range(20)])
        self.send("fail")
        self.send("nobody's")
        self.send("count", 1, delay=3_600_000)
        self.start("breaks")
        order = self.start("order", self.round)
        order.signal("go")
        order.update("add", 1)
        if self.round > 2 and (open_ := escalations.list(status="waiting", broker=self.broker)):
            escalations.resolve(open_[0].id, "done", broker=self.broker)


@pytest.mark.timeout(300)
def test_every_panel_has_data(run_process: Processes, database_url: str, tmp_path: Path) -> None:
    broker = durable.DurableBroker(database_url, middleware=[])
    for queue in ("default", "counted", "flows"):
        broker.declare_queue(queue)
    shown = free_port()
    env = {
        "TEST_URL": database_url,
        "dramatiq_prom_port": str(shown),
        "dramatiq_prom_host": "127.0.0.1",
        "dramatiq_prom_db": str(tmp_path / "numbers"),
        "dramatiq_queue_prefetch": "8",
    }

    def start() -> Any:
        worker = run_process.dramatiq(f"{MODULE}:broker", "--processes", "1", "--threads", "4", env=env)
        worker.wait_for("_run_exposition_server' is ready")
        return worker

    login = durable.provision_worker_role(database_url, name="watching", kind="monitor", expires="90 days").url
    exporter = run_process(
        *(sys.executable, "-m", "dramatiq_durable.cli", "--url", login),
        *("exporter", "--listen", "127.0.0.1:0", "--interval", "0.5s"),
    )
    looked = int(exporter.wait_for("listening on").rpartition(":")[2].partition("/")[0])
    begun = time.time()
    with (
        psycopg.connect(database_url, autocommit=True) as conn,
        prometheus(tmp_path, exporter=looked, workers=shown) as server,
    ):

        def sql(query: str) -> Any:
            cursor = conn.execute(query.encode())
            return cursor.fetchall() if cursor.description else None

        load = Load(broker, sql, tmp_path / "end")
        watchdog = Watchdog(broker.database)
        watchdog.look()
        watchdog.close()
        schedules.create("often", cron="* * * * * *", target=durable.activity_stub("double"), args=(1,), broker=broker)

        # A worker that is killed, with a run that the next one cannot replay.
        worker = start()
        drifting = load.start("drifts")
        wait_until(lambda: sql("SELECT 1 FROM durable.event WHERE type = 'ActivityCompleted'"))
        load.send("until", str(load.end))
        worker.wait_for("until begins")
        worker.kill()
        worker = start()
        worker.wait_for("until begins", timeout=60)
        drifting.signal("go")
        # It loses its lease, and then its connections.
        sql("UPDATE durable.message SET lease_token = gen_random_uuid() WHERE actor = 'until'")
        load.end.touch()
        wait_until(lambda: server.get("query", query="dramatiq_durable_messages_stale_total")["result"], timeout=30)
        sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'dramatiq_durable' AND backend_type = 'client backend'")  # fmt: skip

        left = queries()

        def only(*titles: str) -> Callable[[], bool]:
            def answered() -> bool:
                load.once()
                left[:] = [query for query in left if not server.has_data(query, begun)]
                return {query.title for query in left} <= set(titles)

            return answered

        with suppress(AssertionError):
            wait_until(only("Given back", "Given back and refused"), timeout=60)
        # A worker that stops gives back what it has not begun.  Its numbers are shown by the next one.
        slow = tmp_path / "slow"
        broker.enqueue_many([dramatiq.Message("default", "until", (str(slow),), {}, {}) for _ in range(20)])
        held = "SELECT count(*) FROM durable.message WHERE actor = 'until' AND lease_token IS NOT NULL"
        wait_until(lambda: sql(held)[0][0] >= 8, timeout=30)
        worker.signal(15)
        wait_until(lambda: sql(held)[0][0] <= 4, timeout=30)
        slow.touch()
        worker.wait()
        worker = start()
        with suppress(AssertionError):
            wait_until(only(), timeout=30)
        assert not left, "\n".join(f"{query.where}: {query.filled()}" for query in left)

        # The rules that are loaded are evaluated, and say what happened here.
        def firing() -> bool:
            alerts = server.get("alerts")["alerts"]
            return ("DramatiqDurableNondeterminism", "firing") in {
                (a["labels"]["alertname"], a["state"]) for a in alerts
            }

        wait_until(firing, timeout=30)
        (group,) = server.get("rules")["groups"]
        assert {rule["name"] for rule in group["rules"]} == {rule["alert"] for rule in rules()}
        assert {rule["health"] for rule in group["rules"]} == {"ok"}
        texts = [text for rule in group["rules"] for a in rule["alerts"] for text in a["annotations"].values()]
        assert not [text for text in texts if "<" in text or "{{" in text]
    broker.close()
