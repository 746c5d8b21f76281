"""The application of the boundary tests: its worker kills itself at the point that the environment names."""

from __future__ import annotations

import os
import signal
from typing import Any

import dramatiq
import psycopg
from dramatiq.middleware import CurrentMessage, GroupCallbacks
from dramatiq.results import Results

import dramatiq_durable as durable
from dramatiq_durable import claimer, group_commit
from dramatiq_durable.activity import _Transaction
from dramatiq_durable.operations import Ack, Bury, Reschedule, parts_of
from dramatiq_durable.rate_limits import PostgresBackend as LimiterBackend
from dramatiq_durable.results import PostgresBackend
from dramatiq_durable.settings import Settings

URL = os.environ["TEST_URL"]
#: Where to die, and at a message of which actor.
AT, ON = os.environ.get("TEST_DIE_AT", ""), os.environ.get("TEST_DIE_ON", "")

broker = durable.DurableBroker(
    URL,
    # Nobody else lives while somebody waits for the death of another: half a second is safe.
    reclaim_delay=0.5,
    reclaim_count=10_000,
    settings=Settings(prepared_statements=False, poll_interval=0.2),
)
dramatiq.set_broker(broker)
backend = PostgresBackend(broker)
broker.add_middleware(CurrentMessage())
broker.add_middleware(Results(backend=backend, store_results=True))
broker.add_middleware(GroupCallbacks(LimiterBackend(broker)))
conn = psycopg.connect(URL, autocommit=True)
_executed: set[bytes] = set()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def execute(name: str) -> int:
    """Record that this message's actor has begun; answers how many retries it has behind it."""
    message = CurrentMessage.get_current_message()
    assert message is not None
    retries = int(message.options.get("retries", 0))
    conn.execute("INSERT INTO execution VALUES (%s, %s, %s)", [name, retries, os.getpid()])
    if name == ON:
        _executed.add(message.key)  # type: ignore[attr-defined]
        if AT == "actor":
            die()
    return retries


@dramatiq.actor
def work(n: int) -> int:
    execute("work")
    return n + 1


@dramatiq.actor(min_backoff=1, max_backoff=2)
def flaky() -> str:
    if not execute("flaky"):
        raise KeyError("the first time")
    return "at last"


@dramatiq.actor(max_retries=0)
def hopeless() -> None:
    execute("hopeless")
    raise ValueError("hopeless")


@dramatiq.actor
def effect() -> str:
    with durable.transaction() as own:
        own.execute("INSERT INTO effect VALUES (1)")
        execute("effect")
    return "paid"


@dramatiq.actor
def follow(n: int) -> None:
    execute("follow")


@dramatiq.actor
def done() -> None:
    execute("done")


# --- the points -----------------------------------------------------------------------------------------------

if AT == "claim":
    hand_over = claimer.Claimer._hand_over

    def hand_over_or_die(self: Any) -> None:
        if any(row[8] == ON for row in self._coming):
            die()
        hand_over(self)

    claimer.Claimer._hand_over = hand_over_or_die  # type: ignore[method-assign]

elif AT == "decided":
    settle = broker.settler.settle

    def settle_or_die(delivery: Any, *, failed: bool) -> None:
        if delivery.actor_name == ON:
            # The hooks have run: the retry, the result and the followers are decided, in memory.
            assert delivery.retry is not None or delivery.left is not None
            die()
        settle(delivery, failed=failed)

    broker.settler.settle = settle_or_die  # type: ignore[method-assign]

elif AT in ("before", "after"):
    execute_batch = group_commit.GroupCommit._execute
    commit = _Transaction.commit

    def execute_or_die(self: Any, conn: Any, batch: list[Any]) -> None:
        ends = any(isinstance(o, (Ack, Bury, Reschedule)) and o.message_id in _executed for o in parts_of(batch))
        if ends and AT == "before":
            die()
        execute_batch(self, conn, batch)
        if ends:
            die()

    def commit_or_die(self: Any, operations: Any) -> bool:
        if ON == "effect" and AT == "before":
            die()
        recorded = commit(self, operations)
        if ON == "effect":
            die()
        return recorded

    group_commit.GroupCommit._execute = execute_or_die  # type: ignore[method-assign]
    _Transaction.commit = commit_or_die  # type: ignore[method-assign]


def main() -> None:
    """Dramatiq's worker in this very process, so that it is this process that dies; SIGTERM ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    broker.emit_after("process_boot")
    worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=1)
    worker.start()
    signal.sigwait([signal.SIGTERM])
    worker.stop()
    broker.close()


if __name__ == "__main__":
    main()
