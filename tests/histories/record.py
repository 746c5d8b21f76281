"""``python -m tests.histories.record [NAME ...]``: record histories from real runs; never one that is there already."""

from __future__ import annotations

import contextlib
import re
import sys
import uuid
from pathlib import Path

import dramatiq

import dramatiq_durable as durable
from dramatiq_durable.testing import Replayer
from dramatiq_durable.workflow.export import export_history
from dramatiq_durable.workflow.info import Info
from tests.support import postgres

from .workflows import Feature, declare

HERE = Path(__file__).parent


def record(broker: durable.DurableBroker, name: str, feature: Feature) -> str:
    """Run a feature's workflow, and return the exported history of the run that it is about."""
    handle = feature.workflow.options(workflow_id=f"histories-{name}").start()
    handle = feature.talk(handle) or handle
    handle = durable.get_handle(run_id=handle.run_id or handle.describe().run_id, broker=broker)
    if feature.fails:
        with contextlib.suppress(durable.DurableError):
            handle.result(timeout=30)
    else:
        handle.result(timeout=30)
    text = exported(broker, handle)
    Replayer([feature.workflow]).replay(text)
    return text


def exported(broker: durable.DurableBroker, handle: durable.WorkflowHandle[object]) -> str:
    """The text of a run's history."""
    described = handle.describe()
    with broker.database.connection() as conn:
        events = broker.procedures.get_history(conn, uuid.UUID(described.run_id).bytes)
    info = Info(
        described.workflow_id,
        described.run_id,
        described.name,
        described.queue_name,
        started_at=described.started_at,
        parent=described.parent,
    )
    text = export_history(info, events, described.status)
    # Where this checkout lies is nobody's business, tracebacks keep the files' names.
    return re.sub(r'File \\"/[^"\\]*/([^/"\\]+)\\"', r'File \\"\1\\"', text)


def main(names: list[str]) -> None:
    directory = postgres.make_directory()
    cluster = postgres.Cluster(directory)
    try:
        with cluster.database(cluster.template()) as url:
            broker = durable.DurableBroker(url)
            features = declare(broker)
            worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
            worker.start()
            try:
                for name in names or sorted(features):
                    path = HERE / f"{name}.json"
                    if path.exists():
                        if names:
                            raise SystemExit(f"{path} is there: a history is never recorded again. Add a feature.")
                        continue
                    path.write_text(record(broker, name, features[name]), encoding="utf-8")
                    print(f"recorded {path.name}")
            finally:
                worker.stop(timeout=5000)
                broker.close()
    finally:
        cluster.close()
        postgres.clear(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
