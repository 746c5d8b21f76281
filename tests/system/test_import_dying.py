"""Imports that die: nothing is lost, and nothing is doubled."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.processes import Process, Processes
from tests.system.old_brokers import Old, ours

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("servers")]


class Died(BaseException):
    """The import's process is no more."""


@pytest.mark.parametrize("removed", [False, True])
def test_dying_between_storing_and_removing_loses_and_doubles_nothing(
    old: Old, moved: Any, rows: Any, database_url: str, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """The first batch is stored; the import dies before it is removed, or just after; a worker runs what is here."""
    from dramatiq_durable.importing import rabbitmq, redis
    from dramatiq_durable.importing.importer import Importer

    note = old.actor(print)
    for n in range(9):
        note.send(n)
    source: Any = redis.RedisSource(old.url, old.namespace) if old.kind == "redis" else rabbitmq.RabbitmqSource(old.url)
    box = redis._Queue if old.kind == "redis" else rabbitmq._Box
    settle: Any = box.settle

    def die(self: Any, gone: Any, left: Any) -> None:
        if removed:
            settle(self, gone, left)
        raise Died

    broker = durable.DurableBroker(database_url)
    importer = Importer(broker, source, batch=4, dead_letters=False, actors={})
    with monkeypatch.context() as patch:
        patch.setattr(box, "settle", die)
        patch.setattr(box, "__exit__", lambda self, *error: None)
        with pytest.raises(Died):
            importer.move(importer.count(old.queue))
    source.close()
    broker.close()
    got: list[int] = []
    with ours(database_url, old, got.append):
        wait_until(lambda: rows("SELECT count(*) FROM durable.message") == [(0,)], message="the first batch")
        assert sorted(got) == [0, 1, 2, 3]
        wait_until(lambda: old.kind == "redis" or old.counts()[0] == (5 if removed else 9), message="all are back")
        report = moved()
        assert (report["moved"], report["already_there"]) == (5, 0 if removed else 4)
        wait_until(lambda: rows("SELECT count(*) FROM durable.message") == [(0,)], message="the rest")
    assert sorted(got) == list(range(9))
    assert old.counts() == (0, 0, 0)
    assert rows("SELECT count(*) FROM durable.result") == [(0,)]


def test_killed_again_and_again_it_loses_and_doubles_nothing(
    old: Old, moved: Any, rows: Any, database_url: str, run_process: Processes
) -> None:
    note = old.actor(print)
    total = 3000
    for n in range(total):
        if n % 3:
            note.send(n)
        else:
            note.send_with_options(args=(n,), delay=100)
    runs: Counter[int] = Counter()
    lock = threading.Lock()

    def receive(n: int) -> None:
        with lock:
            runs[n] += 1

    def start() -> Process:
        command = ["--url", database_url, *old.arguments("--batch", "20")]
        return run_process.python("from dramatiq_durable.cli import main; main()", *command)

    with ours(database_url, old, receive):
        for goal in (50, 400, 1000, 1700):
            process = start()
            wait_until(lambda goal=goal: len(runs) >= goal, timeout=60, message=f"{goal} messages")
            process.kill()
        left = moved()
        assert left["moved"] > 0, "it was killed before its end"
        wait_until(lambda: len(runs) == total, timeout=60, message=f"{total} messages, not {len(runs)}")
        wait_until(lambda: rows("SELECT count(*) FROM durable.message") == [(0,)], message="the last ack")
    assert set(runs.values()) == {1}
    assert old.counts() == (0, 0, 0)
    assert rows("SELECT count(*) FROM durable.dead_letter") == [(0,)]
