"""A worker dies, or its connection breaks, at an exact point of a message's life: the exact outcome, every time.

The points: after the claim; after the actor; after everything was decided (the retry, the result, what follows) and
before any of it was sent; before the commit; after the commit and before its answer.
"""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq import group
from dramatiq.results import ResultFailure

from tests.support import wait_until
from tests.support.cutter import Cutter

TABLES = """
CREATE TABLE execution (actor text, retries int, pid int);
CREATE TABLE effect (n int);
CREATE TABLE note (what text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN INSERT INTO public.note VALUES (coalesce(TG_ARGV[0], to_jsonb(NEW) ->> 'actor')); RETURN NULL; END $$;
CREATE TRIGGER note AFTER INSERT ON durable.message FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER note AFTER INSERT OR UPDATE ON durable.result FOR EACH ROW EXECUTE FUNCTION note('result');
CREATE TRIGGER note AFTER INSERT ON durable.dead_letter FOR EACH ROW EXECUTE FUNCTION note('dead_letter');
"""

KINDS = ("work", "flaky", "hopeless", "effect")

#: How often the actor began, and with how many retries behind it.
ONCE = {"work": [0], "flaky": [0, 1], "hopeless": [0], "effect": [0]}
AGAIN = {"work": [0, 0], "flaky": [0, 0, 1], "hopeless": [0, 0], "effect": [0, 0]}
POINTS = {"claim": ONCE, "actor": AGAIN, "decided": AGAIN, "before": AGAIN, "after": ONCE}


class Life:
    """The lives of messages: sends one of each kind, and tells what became of it."""

    def __init__(self, url: str, application: Any, run_process: Any) -> None:
        self.url, self.application, self._run_process = url, application, run_process
        self.conn = psycopg.connect(url, autocommit=True)
        self.conn.execute(TABLES.encode())

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        return self.conn.execute(query.encode(), arguments or None).fetchall()

    def worker(self, *, at: str = "", on: str = "") -> Any:
        return self._run_process(
            *(sys.executable, "-m", "tests.chaos.boundaries"),
            env={"TEST_URL": self.url, "TEST_DIE_AT": at, "TEST_DIE_ON": on},
        )

    def send(self, kind: str) -> Any:
        """Send a message; a worker that is asleep is woken by it."""
        application = self.application
        self.conn.execute("DELETE FROM execution")
        self.conn.execute("DELETE FROM note")
        message = getattr(application, kind).message(*([1] if kind == "work" else []))
        if kind == "work":
            # All that a message can leave behind: its result, the next of a pipeline, the end of a group.
            message = message.copy(options={"pipe_target": application.follow.message().asdict()})
            made = group([message], broker=application.broker)
            made.add_completion_callback(application.done.message())
            made.run()
        else:
            application.broker.enqueue(message)
        return message

    def ended(self) -> bool:
        return self.rows("SELECT count(*) FROM durable.message") == [(0,)]

    def check(self, kind: str, message: Any, executions: list[int]) -> None:
        """It has ended as it should, exactly once, and its actor began exactly so often."""
        wait_until(self.ended, timeout=20, message=f"the end of {kind}")
        assert [r for (r,) in self.rows("SELECT retries FROM execution WHERE actor = %s", kind)] == executions
        followers = ["done", "follow"] if kind == "work" else []
        dead = ["dead_letter"] if kind == "hopeless" else []
        # What was written, and when: each once, and nothing twice.
        results = ["result"] * (1 + len(followers))
        noted = [what for (what,) in self.rows("SELECT what FROM note ORDER BY 1")]
        assert noted == sorted([kind, *followers, *results, *dead])
        others = self.rows("SELECT actor FROM execution WHERE actor <> %s ORDER BY 1", kind)
        assert [actor for (actor,) in others] == followers
        if kind == "work":
            assert self.rows("SELECT value FROM durable.limiter") == [(0,)]
            self.conn.execute("DELETE FROM durable.limiter")
        if kind == "effect":
            assert self.rows("SELECT count(*) FROM effect") == [(1,)]
            self.conn.execute("DELETE FROM effect")
        backend = self.application.backend
        if kind == "hopeless":
            with pytest.raises(ResultFailure, match="ValueError: hopeless"):
                message.get_result(backend=backend)
        else:
            expected = {"work": 2, "flaky": "at last", "effect": "paid"}[kind]
            assert message.get_result(backend=backend) == expected


@pytest.fixture
def application(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The application's module as a client has it, on this test's database."""
    import importlib

    before = dramatiq.broker.global_broker
    monkeypatch.setenv("TEST_URL", database_url)
    sys.modules.pop("tests.chaos.boundaries", None)
    module = importlib.import_module("tests.chaos.boundaries")
    yield module
    module.conn.close()
    module.broker.close()
    sys.modules.pop("tests.chaos.boundaries", None)
    dramatiq.broker.global_broker = before


@pytest.fixture
def life(database_url: str, application: Any, run_process: Any) -> Iterator[Life]:
    life = Life(database_url, application, run_process)
    yield life
    life.conn.close()


@pytest.fixture
def cutter(database_url: str) -> Iterator[Cutter]:
    cutter = Cutter(database_url)
    yield cutter
    cutter.close()


def die_at(life: Life, point: str, kinds: Sequence[str]) -> None:
    """The next worker goes on with the message, and dies at the next kind's; the last one lives."""
    worker = life.worker(at=point, on=kinds[0])
    for kind, following in zip(kinds, [*kinds[1:], ""], strict=True):
        message = life.send(kind)
        assert worker.wait() == -signal.SIGKILL, worker.output
        # After its commit nothing is left for anybody else but what follows the message, or its retry.
        left = 0 if point == "after" and kind != "flaky" else 1
        assert life.rows("SELECT count(*) FROM durable.message WHERE actor = %s", kind) == [(left,)]
        worker = life.worker(at=point if following else "", on=following)
        life.check(kind, message, POINTS[point][kind])
    # The dead are forgotten, and the last one says good-bye.
    wait_until(lambda: life.rows("SELECT pid FROM durable.worker") == [(worker.pid,)])
    assert worker.stop() == 0
    assert life.rows("SELECT count(*) FROM durable.worker") == [(0,)]


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_dies(life: Life, point: str) -> None:
    die_at(life, point, KINDS if point == "after" else KINDS[:2])


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS)
def test_a_worker_dies_with_every_kind_of_message(life: Life, point: str) -> None:
    die_at(life, point, KINDS * 5)


def kill_groups(life: Life, *, groups: int, kills: int) -> None:
    """Groups of four, whose members are pipelines' firsts, while two workers are killed again and again."""
    application = life.application
    workers = [life.worker(), life.worker()]
    for _ in range(groups):
        members = [
            application.work.message(n).copy(options={"pipe_target": application.follow.message().asdict()})
            for n in range(4)
        ]
        made = group(members, broker=application.broker)
        made.add_completion_callback(application.done.message())
        made.run()
    for turn in range(kills):
        (before,) = life.rows("SELECT count(*) FROM execution")
        wait_until(lambda b=before: life.ended() or life.rows("SELECT count(*) FROM execution") > [b], timeout=30)  # type: ignore[misc]
        workers[turn % 2].kill()
        workers[turn % 2] = life.worker()
    wait_until(life.ended, timeout=60)
    # However often an actor ran: every message was sent once, every result stored once, every group counted out.
    assert life.rows("SELECT what, count(*) FROM note GROUP BY 1 ORDER BY 1") == [
        ("done", groups),
        ("follow", 4 * groups),
        ("result", 9 * groups),
        ("work", 4 * groups),
    ]
    assert life.rows("SELECT DISTINCT value FROM durable.limiter") == [(0,)]
    assert life.rows("SELECT count(*) FROM durable.dead_letter") == [(0,)]
    for worker in workers:
        worker.kill()


def test_groups_whose_workers_are_killed(life: Life) -> None:
    kill_groups(life, groups=40, kills=3)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_many_groups_whose_workers_are_killed(life: Life) -> None:
    kill_groups(life, groups=1000, kills=20)


@pytest.mark.parametrize("answer", [False, True], ids=["lost request", "lost answer"])
def test_the_connection_breaks_around_the_commit(life: Life, cutter: Cutter, run_process: Any, answer: bool) -> None:
    """Nobody died: no actor runs a second time, whether the commit was made or not."""
    worker = run_process.dramatiq(
        "tests.chaos.boundaries:broker", *("--processes", "1", "--threads", "1"), env={"TEST_URL": cutter.url}
    )
    wait_until(lambda: life.rows("SELECT count(*) FROM durable.worker WHERE waiting_until > now()") == [(1,)])
    for kind, call in zip(KINDS, (b".leave(", b".reschedule(", b".bury(", b".ack("), strict=True):
        cutter.arm(call, answer=answer)
        message = life.send(kind)
        assert cutter.cut.wait(20)
        if kind != "effect":
            life.check(kind, message, ONCE[kind])
        else:
            # Its statements are sent one by one, and the cut is before the commit: it is rolled back, and run again.
            life.check(kind, message, AGAIN[kind])
    assert len(life.rows("SELECT DISTINCT pid FROM execution")) == 1
    assert worker.stop() == 0


CLIENT = """
import os, signal, sys
import dramatiq, dramatiq_durable as durable
from dramatiq_durable import group_commit

broker = durable.DurableBroker(os.environ["TEST_URL"])
broker.declare_queue("default")
options = {"unique_key": "key", "unique_conflict": "fail"} if sys.argv[2] == "keyed" else {}
message = dramatiq.Message("default", "work", (1,), {}, options, sys.argv[1])
execute = group_commit.GroupCommit._execute

def execute_and_die(self, conn, batch):
    execute(self, conn, batch)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "die":
    group_commit.GroupCommit._execute = execute_and_die
broker.enqueue(message)
broker.close()
"""


@pytest.mark.parametrize("kind", ["plain", "keyed"])
def test_a_client_dies_after_its_commit_and_repeats(life: Life, run_process: Any, kind: str) -> None:
    id = str(uuid.uuid4())
    for turn in ("die", "live", "live"):
        client = run_process.python(CLIENT, id, kind, turn, env={"TEST_URL": life.url})
        assert client.wait() == (-signal.SIGKILL if turn == "die" else 0), client.output
        assert life.rows("SELECT message_id::text FROM durable.message") == [(id,)]
    assert life.rows("SELECT what FROM note") == [("work",)]


@pytest.mark.parametrize("answer", [False, True], ids=["lost request", "lost answer"])
@pytest.mark.parametrize("kind", ["plain", "keyed", "group"])
def test_a_clients_connection_breaks_around_its_commit(
    life: Life, cutter: Cutter, application: Any, monkeypatch: pytest.MonkeyPatch, kind: str, answer: bool
) -> None:
    """Stored once, whatever became of it by the time that the client finds out."""
    done: Callable[[], None] = lambda: None  # noqa: E731
    broker = application.durable.DurableBroker(
        cutter.url, middleware=[], settings=application.Settings(prepared_statements=False)
    )
    broker.declare_queue("default")
    options = {
        "plain": {},
        "keyed": {"unique_key": "key", "unique_conflict": "fail"},
        "group": {"group_completion_uuid": str(uuid.uuid4()), "group_completion_callbacks": []},
    }[kind]
    first = dramatiq.Message("default", "work", (0,), {}, {})
    broker.enqueue(first)
    cutter.arm(b".enqueue_message(" if kind == "plain" else b".enqueue_keyed(", answer=answer)
    outcome = broker.procedures.batch_outcome
    if answer:

        def done() -> None:
            # Somebody has done the work before the client asks.
            life.conn.execute("DELETE FROM durable.message")

    def asked(*arguments: Any) -> Any:
        done()
        return outcome(*arguments)

    monkeypatch.setattr(broker.commit.procedures, "batch_outcome", asked)
    message = dramatiq.Message("default", "work", (1,), {}, options)
    assert broker.enqueue(message).message_id == message.message_id
    assert cutter.cut.is_set()
    assert life.rows("SELECT what FROM note") == [("work",), ("work",)]
    assert life.rows("SELECT count(*) FROM durable.message") == [(0 if answer else 2,)]
    broker.close()
