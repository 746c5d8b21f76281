"""Clocks, random numbers and uuids are durable inside a workflow, and what they were everywhere else."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import datetime as datetime_module
import logging
import pickle
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from random import choice, randint
from time import monotonic
from time import time as now_in_seconds
from typing import Any
from uuid import uuid4

import pytest

import dramatiq_durable as durable
from tests.workflow.test_engine_asyncio import check
from tests.workflow.test_engine_support import Run, echo

START = 1_700_000_000.001
"""When ``Run`` applies its first event."""

NOW = datetime.fromtimestamp(START, UTC)


@dataclasses.dataclass
class Order:
    id: uuid.UUID = dataclasses.field(default_factory=uuid4)
    at: float = dataclasses.field(default_factory=time.time)
    day: date = dataclasses.field(default_factory=date.today)
    moment: datetime = dataclasses.field(default_factory=datetime.now)


class Stamp(datetime):
    """A class that somebody derived."""


CLOCKS: dict[str, tuple[Callable[[], Any], Any]] = {
    "time": (time.time, START),
    "time by name": (now_in_seconds, START),
    "time_ns": (time.time_ns, 1_700_000_000_001_000_000),
    "monotonic": (lambda: time.monotonic() - START, 0.0),
    "monotonic by name": (lambda: monotonic() - START, 0.0),
    "perf_counter": (lambda: time.perf_counter() - START, 0.0),
    "clock_gettime": (lambda: time.clock_gettime(time.CLOCK_REALTIME), START),
    "gmtime": (lambda: time.gmtime()[:6], (2023, 11, 14, 22, 13, 20)),
    "localtime": (lambda: time.mktime(time.localtime()), 1_700_000_000.0),
    "ctime": (lambda: time.ctime() == time.ctime(1_700_000_000), True),
    "asctime": (lambda: time.asctime() == time.asctime(time.localtime(1_700_000_000)), True),
    "strftime": (lambda: time.strftime("%Y") + time.strftime("-%Y", time.gmtime(0)), "2023-1970"),
    "now": (lambda: datetime.now() == NOW.astimezone().replace(tzinfo=None), True),
    "now in UTC": (lambda: datetime.now(UTC) == NOW, True),
    "now by keyword": (lambda: datetime.now(tz=timezone(timedelta(hours=2))) == NOW, True),
    "now of the module": (lambda: datetime_module.datetime.now(UTC) == NOW, True),
    "now of a derived class": (lambda: (type(Stamp.now(UTC)).__name__, Stamp.now(UTC) == NOW), ("Stamp", True)),
    "utcnow": (lambda: getattr(datetime, "utcnow")() == NOW.replace(tzinfo=None), True),  # noqa: B009
    "today": (lambda: datetime.today() == NOW.astimezone().replace(tzinfo=None), True),
    "date.today": (lambda: date.today() == NOW.astimezone().date(), True),
    "default factories": (lambda: (Order().at, Order().day == date.today()), (START, True)),
}


@pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")
@pytest.mark.parametrize("name", CLOCKS)
def test_clocks_are_historys(name: str) -> None:
    read, expected = CLOCKS[name]

    async def wf() -> Any:
        return str(read())

    assert Run(wf).result == str(expected)


def test_clocks_go_on_with_the_events() -> None:
    async def wf() -> Any:
        began, at = time.monotonic(), datetime.now(UTC)
        await durable.sleep(90)
        return [round(time.monotonic() - began, 3), (datetime.now(UTC) - at).total_seconds()]

    run = Run(wf).finish()
    assert run.result == [90, 90]
    check(run)


@pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")
def test_outside_the_clocks_are_real() -> None:
    Run(_noop)
    before = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True, check=True)
    for name in ("time", "time by name"):
        assert abs(CLOCKS[name][0]() - float(before.stdout)) < 60
    assert abs(datetime.now().timestamp() - time.time()) < 5
    assert abs(datetime.now(UTC).timestamp() - time.time()) < 5
    assert abs(getattr(datetime, "utcnow")().replace(tzinfo=UTC).timestamp() - time.time()) < 5  # noqa: B009
    assert datetime.today().date() == date.today()
    assert type(Stamp.now()) is Stamp
    assert time.monotonic() <= time.monotonic()
    assert time.localtime(0)[:1] == time.localtime(0.5)[:1]
    with pytest.raises(TypeError):
        datetime.now("UTC")  # type: ignore[arg-type]


async def _noop() -> None: ...


def test_other_threads_have_the_real_clock_during_a_step() -> None:
    asked, answered = threading.Event(), threading.Event()
    seen: list[float] = []

    async def wf() -> Any:
        asked.set()
        while not answered.is_set():
            pass
        return time.time()

    def other() -> None:
        asked.wait()
        seen.append(time.time())
        seen.append(datetime.now().timestamp())
        answered.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert Run(wf).result == START
    thread.join()
    assert all(at > START + 86_400 for at in seen)


def test_log_records_have_the_real_time(caplog: pytest.LogCaptureFixture) -> None:
    async def wf() -> None:
        logging.getLogger("of.the.workflow").warning("hello")

    Run(wf)
    assert caplog.records[0].created > START + 86_400


def test_what_took_a_functions_place_is_used_like_it() -> None:
    class Timer:
        clock = time.perf_counter
        draw = random.random

    Run(_noop)
    assert Timer().clock() > 0
    assert 0 <= Timer().draw() < 1
    assert copy.deepcopy(time.time) is not None
    assert sorted(random.sample(range(10), 10)) == list(range(10))
    assert pickle.loads(pickle.dumps(datetime.now())) <= datetime.now()
    assert uuid.uuid4().version == 4
    assert asyncio.run(asyncio.wait_for(asyncio.sleep(0, 1), 1)) == 1


def drawn() -> list[Any]:
    pool = list(range(20))
    random.shuffle(pool)
    own = random.Random()
    return [
        random.random(),
        randint(1, 1000),
        choice(pool),
        random.uniform(1, 2),
        random.sample(pool, 3),
        own.random(),
        random.Random(7).random(),
        str(uuid4()),
        str(uuid.uuid4()),
        str(Order().id),
        random.randbytes(3).hex(),
    ]


def test_random_numbers_are_the_runs_own() -> None:
    async def wf() -> Any:
        first = drawn()
        await echo.execute(1)
        return [first, drawn()]

    results = []
    for run_id in ("a", "a", "b"):
        random.seed(len(results))
        run = Run(wf, run_id=run_id)
        run.execution.evict()
        run.execution = run.replayed()
        results.append(run.finish().result)
        check(run)
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]
    assert results[0] != results[2]
    assert results[2][0][6] == random.Random(7).random()
    assert uuid.UUID(results[0][0][7]).version == 4


def test_what_a_module_draws_while_it_is_imported_is_none_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "draws_at_import.py").write_text(
        "import random, time, uuid, os\nVALUES = [time.time(), random.random(), uuid.uuid4(), os.urandom(3)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    async def wf() -> Any:
        import draws_at_import  # type: ignore[import-not-found]

        return [random.random(), draws_at_import.VALUES[0] > START + 86_400]

    first = Run(wf).result
    assert first[1] is True
    assert Run(wf).result == first


def test_a_workflow_does_not_disturb_the_numbers_of_others() -> None:
    async def wf() -> Any:
        random.seed(3)
        return random.random()

    random.seed(1)
    expected = [random.random(), random.random()]
    random.seed(1)
    got = [random.random()]
    Run(wf)
    assert [*got, random.random()] == expected


def test_the_guard_costs_others_next_to_nothing() -> None:
    """Not a benchmark: a bound that a look at every frame or a lock would break."""
    Run(_noop)
    began = time.perf_counter()
    for _ in range(100_000):
        time.monotonic()
        random.random()
    assert time.perf_counter() - began < 1.0
