"""Lists of runs stay on their indexes among fifty thousand.  Counted in rows by the server itself, as in test_plans."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.workflow.filters import parse
from dramatiq_durable.workflow.listing import _page
from tests.support.postgres import Cluster

from .api import Session
from .test_plans import FEW, counting

RUNS = 50_000

FILL = f"""
INSERT INTO durable.run (run_id, workflow_id, stream_id, name, started_at, closed_at, status, last_event)
SELECT gen_random_uuid(), 'order-' || n, s.stream_id, CASE WHEN n % 500 = 0 THEN 'rare' ELSE 'wf' || n % 10 END,
       '2026-01-01Z'::timestamptz + n * interval '1 second', CASE WHEN n % 1000 <> 0 THEN now() END,
       CASE WHEN n % 1000 = 0 THEN 'running' WHEN n % 997 = 0 THEN 'failed' ELSE 'completed' END, 1
FROM generate_series(1, {RUNS}) n, durable.stream s;
INSERT INTO durable.run_state (run_id, search, entity)
SELECT r.run_id, jsonb_build_object('region', 'r' || n % 1000, 'tags', jsonb_build_array('t' || n % 700)),
       jsonb_build_object('customer', jsonb_build_object('id', n % 5000))
FROM durable.run r, LATERAL (SELECT substr(r.workflow_id, 7)::int) x (n) WHERE n % 2 = 0;
ANALYZE durable.run, durable.run_state
"""


@pytest.fixture(scope="module")
def many(cluster: Cluster) -> Iterator[str]:
    with cluster.database(cluster.template()) as url:
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("INSERT INTO durable.stream (name) VALUES ('s')")
            for statement in FILL.split(";"):
                conn.execute(statement.encode())
        yield url


@pytest.fixture
def db(many: str) -> Iterator[Session]:
    session = Session(many)
    yield session
    session.close()


#: A condition, how many runs a page of 100 has, and how many rows of runs and of their state it may read for them.
CASES = [
    (None, 100, 102, 102),
    ("status = 'running'", 50, 52, 52),
    ("status = 'failed' and name = 'wf3'", 5, 52, 10),
    ("status != 'completed'", 100, 110, 110),
    ("not status = 'completed'", 100, 110, 110),
    ("name = 'rare'", 100, 102, 102),
    ("name = 'nothing'", 0, 0, 0),
    ("workflow_id = 'order-77'", 1, 1, 1),
    ("workflow_id in ('order-77', 'order-78')", 2, 2, 2),
    ("workflow_id like 'order-777%'", 11, 11, 11),
    ("started_at >= '2026-01-01T10:00:00Z' and started_at < '2026-01-01T10:00:10Z'", 10, 10, 10),
    ("search.region = 'r8'", 50, 50, 50),
    ("search.tags = 't8'", 72, 72, 72),
    ("search.region in ('r8', 'r10')", 100, 100, 100),
    ("search.region = 'r8' and status = 'completed'", 50, 60, 60),
    ("search.region = '2026-01-31'", 0, 0, 0),
    ("entity.customer.id = 78", 10, 10, 10),
    ("search.region = 'r8' and (name = 'wf8' or not entity.customer.id = 3)", 50, 50, 50),
]


@pytest.mark.parametrize(("where", "found", "runs", "states"), CASES, ids=[str(case[0]) for case in CASES])
def test_a_page_reads_little_more_than_it_shows(
    db: Session, many: str, where: str | None, found: int, runs: int, states: int
) -> None:
    broker = durable.DurableBroker(many, middleware=[])
    broker.database.connection = lambda: Here(db)  # type: ignore[method-assign,assignment,return-value]
    condition = None if where is None else parse(where)
    with counting(db, "run", "run_state") as counted:
        page = _page(broker, condition, "-started_at", 100, None)
    assert len(page) == found
    assert counted["run"].seq_scans == counted["run_state"].seq_scans == 0
    # Twice what it shows, for an index on one condition is as good as on another, and what the planner looks up.
    assert counted["run"].rows <= 2 * runs + FEW, counted
    assert counted["run_state"].rows <= 2 * states + FEW, counted
    if page.next is not None:
        with counting(db, "run") as counted:
            _page(broker, condition, "-started_at", 100, page.next)
        assert counted["run"].rows <= 2 * runs + FEW, counted
    broker.close()


@pytest.mark.parametrize("order", ["closed_at", "-closed_at"])
@pytest.mark.parametrize("where", [None, "status = 'completed'"])
def test_by_the_end_a_page_reads_what_it_shows_and_what_runs(
    db: Session, many: str, order: str, where: str | None
) -> None:
    broker = durable.DurableBroker(many, middleware=[])
    broker.database.connection = lambda: Here(db)  # type: ignore[method-assign,assignment,return-value]
    condition, after, running = None if where is None else parse(where), None, RUNS // 1000
    for _ in range(3):
        with counting(db, "run", "run_state") as counted:
            page = _page(broker, condition, order, 100, after)
        assert len(page) == 100
        assert counted["run"].seq_scans == counted["run_state"].seq_scans == 0
        assert counted["run"].rows <= 2 * (102 + running) + FEW, counted
        after = page.next
    broker.close()


class Here:
    """The session's connection, where a broker would take one of its own."""

    def __init__(self, session: Session) -> None:
        self._conn = session.conn

    def __enter__(self) -> psycopg.Connection[tuple[object, ...]]:
        return self._conn

    def __exit__(self, *_: object) -> None: ...
