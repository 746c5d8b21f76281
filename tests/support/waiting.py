"""What runs wait for, and whether anything is left that will bring it: nobody else finds out about a lost one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

#: How what a command asked for ends, by the type of its event.
_ENDS = {
    "ActivityScheduled": [
        "ActivityCompleted", "ActivityFailed", "ActivityTimedOut", "ActivityCancelled", "ActivityCancelConfirmed",
    ],
    "TimerStarted": ["TimerFired", "TimerCancelled"],
    "ChildStarted": [
        "ChildCompleted", "ChildFailed", "ChildCancelled", "ChildTimedOut", "ChildTerminated", "ChildStartFailed",
    ],
    "EscalationOpened": [
        "EscalationResolved", "EscalationCancelled", "EscalationTimedOut", "EscalationWithdrawn",
    ],
    "SignalSent": ["MessageDelivered", "MessageFailed"],
    "CancelSent": ["MessageDelivered", "MessageFailed"],
}  # fmt: skip

#: A run whose inbox nobody will look into: what is put there comes with a task, which goes with the step that takes it.
_UNHEARD = """
SELECT r.run_id::text, 'nobody looks into its inbox', i.type, i.seq, i.name
FROM {schema}.run r JOIN {schema}.inbox i USING (run_id)
WHERE r.status = 'running' AND NOT EXISTS (
    SELECT 1 FROM {schema}.message m WHERE m.run_id = r.run_id AND (m.kind IN ('s', 't') OR m.seq = -1))
"""

#: What was asked for, has not ended, and has nothing left that will end it.
_UNANSWERED = """
WITH ends (type, ends) AS (SELECT * FROM unnest(%s::text[], %s::text[]) e (type, ends))
SELECT r.run_id::text, 'nothing is left that will end it', e.type, e.seq, e.name
FROM {schema}.run r JOIN {schema}.event e USING (run_id) JOIN ends USING (type),
     LATERAL (SELECT overlay(md5(r.run_id::text || ':' || e.seq) PLACING '8' FROM 13)::uuid AS id) c
WHERE r.status = 'running'
  AND NOT EXISTS (SELECT 1 FROM {schema}.event x WHERE x.run_id = r.run_id AND x.type = 'WorkflowReset')
  AND NOT EXISTS (SELECT 1 FROM {schema}.inbox x WHERE x.run_id = r.run_id AND x.type = 'WorkflowReset')
  AND NOT EXISTS (SELECT 1 FROM {schema}.event x
                  WHERE x.run_id = r.run_id AND x.seq = e.seq AND x.type = ANY (string_to_array(ends.ends, ' ')))
  AND NOT EXISTS (SELECT 1 FROM {schema}.inbox x
                  WHERE x.run_id = r.run_id AND x.seq = e.seq AND x.type = ANY (string_to_array(ends.ends, ' ')))
  AND NOT CASE e.type
      WHEN 'ChildStarted' THEN
          EXISTS (SELECT 1 FROM {schema}.run x
                  WHERE x.parent_run_id = r.run_id AND x.parent_seq = e.seq AND x.status = 'running')
          OR EXISTS (SELECT 1 FROM {schema}.follower f JOIN {schema}.run x USING (run_id)
                     WHERE f.follower_run_id = r.run_id AND f.seq = e.seq AND x.status = 'running')
      WHEN 'EscalationOpened' THEN
          EXISTS (SELECT 1 FROM {schema}.escalation x WHERE x.escalation_id = c.id AND x.status = 'open')
          AND (e.attributes ->> 'ms' IS NULL OR EXISTS (SELECT 1 FROM {schema}.message m WHERE m.message_id = c.id))
      ELSE EXISTS (SELECT 1 FROM {schema}.message m WHERE m.message_id = c.id AND m.run_id = r.run_id)
      END
"""


def lost(conn: psycopg.Connection[Any], schema: str = "durable") -> list[tuple[Any, ...]]:
    """What will never reach the runs that wait for it, as rows (run id, what is wrong, type, number, name).

    Nothing is, at any moment: what wakes a run changes in one transaction with what it is about.  Runs whose
    interceptors have their code wait before it begins are an exception: updates wait in their inboxes.  What a run that
    was reset asks for again is not looked at.

    Parameters:
      conn: of a superuser, or the owner of the namespace.
    """
    types = (list(_ENDS), [" ".join(ends) for ends in _ENDS.values()])
    with conn.transaction():
        # Both look at one moment.
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        unheard = conn.execute(_UNHEARD.format(schema=schema).encode()).fetchall()
        return unheard + conn.execute(_UNANSWERED.format(schema=schema).encode(), types).fetchall()


def assert_nothing_is_lost(url: str) -> None:
    """Fail where something will never reach a run that waits for it: see `lost`.

    Parameters:
      url: the database, as a superuser or the owner of the namespace.
    """
    with psycopg.connect(url, autocommit=True) as conn:
        assert lost(conn) == []


@contextmanager
def nothing_lost(url: str) -> Iterator[None]:
    """Look all the time whether something is lost, and fail at the end if it was: what comes later may wake the run by
    chance."""
    ended, found = threading.Event(), []

    def look() -> None:
        while not found and not ended.wait(0.05):
            # The server may be killed meanwhile.
            with suppress(psycopg.OperationalError), psycopg.connect(url, autocommit=True) as conn:
                while not found and not ended.wait(0.05):
                    found.extend(lost(conn))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        assert found == []
