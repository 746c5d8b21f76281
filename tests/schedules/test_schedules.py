"""Schedules as an application has them: made, looked at, changed, and fired by real workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Any

import dramatiq
import pytest
from dramatiq.encoder import PickleEncoder
from dramatiq.middleware import CurrentMessage

import dramatiq_durable as durable
from dramatiq_durable import schedules
from dramatiq_durable.cron import Cron
from tests.broker.conftest import Record, Rows
from tests.support import wait_until

Start = Callable[..., dramatiq.Worker]

EVERY_SECOND = "* * * * * *"
#: A due time that no test lives to see.
NEVER = "0 0 29 2 *"


def message() -> dramatiq.Message[Any]:
    current = CurrentMessage.get_current_message()
    assert current is not None
    return current


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def report(broker: durable.DurableBroker, record: Record) -> Any:
    """An actor that records its arguments and its message's options."""

    @dramatiq.actor(broker=broker)
    def report(*args: Any, **kwargs: Any) -> None:
        record((args, kwargs, message()))

    return report


@pytest.fixture
def order(broker: durable.DurableBroker, record: Record) -> Any:
    @durable.workflow(broker=broker)
    async def order(name: str = "o") -> str:
        record((name, durable.info()))
        await durable.wait_for_signal("end")
        return name

    return order


def every_ten_minutes() -> str:
    """An expression of ten minutes, with no due time close to now."""
    return f"{(datetime.now(UTC).minute + 5) % 10}-59/10 * * * *"


def since(rows: Rows, ago: timedelta, name: str = "s") -> None:
    """As if no worker had looked after a schedule for so long."""
    rows(
        "UPDATE durable.schedule SET seen_to = clock_timestamp() - %s::interval WHERE name = %s",
        f"{ago.total_seconds()} seconds",
        name,
    )


# --- firing -----------------------------------------------------------------------------------------------


def test_an_actor_every_second(broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start) -> None:
    schedules.create("s", cron=EVERY_SECOND, target=report, args=["a", 1], kwargs={"b": None})
    start_worker(broker)
    record.wait(3)
    arrived = time.time()
    due = []
    for args, kwargs, sent in record.values[:3]:
        assert (args, kwargs) == (("a", 1), {"b": None})
        assert sent.options["schedule"] == "s"
        at = datetime.fromisoformat(sent.options["schedule_due"])
        due.append(at)
        assert 0 <= sent.message_timestamp / 1000 - at.timestamp() < 1
    assert [at - due[0] for at in due] == [timedelta(seconds=n) for n in range(3)]
    assert arrived - due[2].timestamp() < 1
    assert len({sent.message_id for _, _, sent in record.values}) == len(record.values)


def test_a_workflow(broker: durable.DurableBroker, order: Any, record: Record, start_worker: Start) -> None:
    schedules.create(
        "nightly", cron=EVERY_SECOND, target=order.options(memo={"by": "cron"}), args=["x"], overlap="allow"
    )
    start_worker(broker)
    record.wait(2)
    (name, first), (_, second) = record.values[:2]
    assert name == "x"
    assert first.memo == {"by": "cron"}
    times = [datetime.strptime(i.workflow_id, "nightly:%Y-%m-%dT%H:%M:%S%z") for i in (first, second)]
    assert times[1] - times[0] == timedelta(seconds=1)
    assert durable.get_handle(first.workflow_id, broker=broker).status() == "running"


def test_one_at_a_time(
    broker: durable.DurableBroker, order: Any, record: Record, start_worker: Start, rows: Rows
) -> None:
    schedules.create("s", cron=EVERY_SECOND, target=order, overlap="buffer_one")
    start_worker(broker)
    ((_, info),) = record.wait(1)
    waiting = wait_until(lambda: schedules.describe("s", broker=broker).waiting)
    known = wait_until(lambda: (d := schedules.describe("s", broker=broker)).skipped and d)
    assert (known.fired, known.live, known.waiting) == (1, [info.run_id], waiting)
    durable.get_handle(info.workflow_id, broker=broker).signal("end")
    _, (_, after) = record.wait(2)[:2]
    assert after.workflow_id == waiting.strftime("s:%Y-%m-%dT%H:%M:%SZ")


def test_an_activity_with_options_and_a_stub(
    broker: durable.DurableBroker, record: Record, start_worker: Start, rows: Rows
) -> None:
    @durable.activity(broker=broker, priority=3)
    def work(n: int) -> None:
        record((n, message()))

    broker.declare_queue("other")
    schedules.create(
        "s", cron=EVERY_SECOND, target=work.options(queue_name="other", max_retries=7), args=[1], broker=broker
    )
    stub = durable.activity_stub("work", queue_name="other").options(time_limit=1234)
    schedules.create("t", cron=EVERY_SECOND, target=stub, args=[2], broker=broker)
    assert rows("SELECT priority FROM durable.schedule ORDER BY name") == [(3,), (3,)]
    start_worker(broker)
    wait_until(lambda: {n for n, _ in record.values} == {1, 2})
    options = {n: sent.options for n, sent in record.values}
    assert (options[1]["max_retries"], options[2]["time_limit"]) == (7, 1234)


def test_another_encoder(broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start) -> None:
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(PickleEncoder())
    try:
        schedules.create("s", cron=EVERY_SECOND, target=report, args=[{1, 2}, b"\xff"])
        worker = start_worker(broker)
        args, _, sent = record.wait(1)[0]
        assert args == ({1, 2}, b"\xff")
        assert sent.options["schedule"] == "s"
        schedules.delete("s", broker=broker)
        worker.stop()
    finally:
        dramatiq.set_encoder(before)


def test_what_was_due_while_nobody_worked(
    broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start, rows: Rows
) -> None:
    cron = every_ten_minutes()
    schedules.create("s", cron=cron, target=report, catch_up="45m", overlap="allow")
    since(rows, timedelta(hours=2))
    now = datetime.now(UTC)
    expected = [*takewhile(lambda at: at <= now, Cron(cron).after(now - timedelta(minutes=45)))]
    start_worker(broker)
    record.wait(len(expected))
    wait_until(lambda: schedules.describe("s", broker=broker).missed)
    known = schedules.describe("s", broker=broker)
    assert [sent.options["schedule_due"] for _, _, sent in record.values] == [at.isoformat() for at in expected]
    assert (known.fired, known.missed + known.fired) == (len(expected), 12)
    assert known.last_due == expected[-1]


def test_more_than_is_fired_at_once(
    broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start, rows: Rows
) -> None:
    schedules.create("s", cron=EVERY_SECOND, target=report, overlap="allow")
    since(rows, timedelta(seconds=250))
    start_worker(broker, threads=1)
    record.wait(250)
    due = [datetime.fromisoformat(sent.options["schedule_due"]) for _, _, sent in record.values]
    assert due == [due[0] + timedelta(seconds=n) for n in range(len(due))], "in order"


def test_a_paused_stream_catches_up(
    broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start, rows: Rows
) -> None:
    schedules.create("s", cron=EVERY_SECOND, target=report, overlap="allow")
    rows("UPDATE durable.stream SET paused = true")
    start_worker(broker)
    began = datetime.now(UTC)
    wait_until(lambda: datetime.now(UTC) > began + timedelta(seconds=2.1))
    assert record.values == []
    rows("UPDATE durable.stream SET paused = false")
    record.wait(3)
    first = datetime.fromisoformat(record.values[0][2].options["schedule_due"])
    assert first < began + timedelta(seconds=1)


def test_a_schedule_that_a_worker_cannot_fire(
    broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start, rows: Rows, caplog: Any
) -> None:
    """The worker lives on, the schedule says why, and goes on when it can."""
    for name in ("bad", "good"):
        schedules.create(name, cron=EVERY_SECOND, target=report, args=[name])
    rows("UPDATE durable.schedule SET template = 'nonsense' WHERE name = 'bad'")
    start_worker(broker)
    record.wait(1)
    failure = wait_until(lambda: schedules.describe("bad", broker=broker).failure)
    assert "DecodeError" in failure
    assert {args for args, _, _ in record.values} == {("good",)}
    schedules.create("bad", cron=EVERY_SECOND, target=report, args=["bad"], if_exists="update")
    wait_until(lambda: ("bad",) in [args for args, _, _ in record.values])
    assert schedules.describe("bad", broker=broker).failure is None


def test_two_workers_and_many_schedules(
    make_broker: Callable[..., durable.DurableBroker], record: Record, start_worker: Start, rows: Rows
) -> None:
    """Each due time once, whoever fires it."""
    for _ in range(2):
        # Dramatiq's AsyncIO is for one worker in a process.
        broker = make_broker(middleware=[CurrentMessage()])

        @dramatiq.actor(broker=broker, actor_name="report")
        def report(n: int) -> None:
            record((n, message().options["schedule_due"]))

        if not record.values:
            for n in range(20):
                schedules.create(f"s{n}", cron=EVERY_SECOND, target=report, args=[n], overlap="allow", if_exists="keep")
        start_worker(broker)
    record.wait(60)
    for n in range(20):
        schedules.pause(f"s{n}", broker=broker)
    rows.drained()
    assert len(set(record.values)) == len(record.values)
    for n in range(20):
        due = sorted(datetime.fromisoformat(at) for m, at in record.values if m == n)
        assert due == [due[0] + timedelta(seconds=k) for k in range(len(due))]


# --- by hand ----------------------------------------------------------------------------------------------


def test_trigger(broker: durable.DurableBroker, report: Any, order: Any, record: Record, start_worker: Start) -> None:
    schedules.create("s", cron=NEVER, target=report, paused=True)
    schedules.create("w", cron=NEVER, target=order, args=["by hand"])
    message_id = schedules.trigger("s", broker=broker)
    run_id = schedules.trigger("w", broker=broker)
    assert durable.get_handle(f"w:{run_id}", broker=broker).describe().run_id == run_id
    start_worker(broker)
    record.wait(2)
    (sent,) = [value[2] for value in record.values if len(value) == 3]
    assert sent.message_id == message_id
    assert abs(datetime.fromisoformat(sent.options["schedule_due"]) - datetime.now(UTC)) < timedelta(minutes=1)
    known = schedules.describe("w", broker=broker)
    assert (known.fired, known.live, known.last_due) == (1, [run_id], None)


def test_backfill(broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start) -> None:
    schedules.create("s", cron="0 6 * * *", target=report, timezone="Europe/Berlin")
    start, end = datetime(2026, 3, 28, 5, tzinfo=UTC), datetime(2026, 3, 30, 4, tzinfo=UTC)
    expected = [start, datetime(2026, 3, 29, 4, tzinfo=UTC), end]
    assert schedules.backfill("s", start, end, broker=broker) == expected, "both ends are part of it"
    assert schedules.backfill("s", start, end, broker=broker) == [], "they are still live"
    start_worker(broker)
    record.wait(3)
    assert [sent.options["schedule_due"] for _, _, sent in record.values] == [at.isoformat() for at in expected]
    broker.join("default", timeout=10_000)
    assert schedules.backfill("s", start, start, broker=broker) == [start], "it is over, and wanted again"
    assert schedules.describe("s", broker=broker).fired == 4


def test_a_backfill_leaves_to_the_schedule_what_it_will_fire_itself(
    broker: durable.DurableBroker, report: Any, rows: Rows
) -> None:
    schedules.create("s", cron=every_ten_minutes(), target=report)
    since(rows, timedelta(minutes=30))
    now = datetime.now(UTC)
    fired = schedules.backfill("s", now - timedelta(hours=1), now + timedelta(hours=5), broker=broker)
    assert len(fired) == 3
    assert max(fired) <= now - timedelta(minutes=30)
    # While it is paused it will not.
    schedules.pause("s", broker=broker)
    rest = schedules.backfill("s", now - timedelta(hours=1), now + timedelta(hours=5), broker=broker)
    assert len(rest) == 3
    assert min(rest) > max(fired)
    assert max(rest) <= datetime.now(UTC)


def test_a_backfill_of_many(broker: durable.DurableBroker, report: Any, rows: Rows) -> None:
    schedules.create("s", cron="* * * * *", target=report, paused=True)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    fired = schedules.backfill("s", start, start + timedelta(minutes=1199), broker=broker)
    assert fired == [start + timedelta(minutes=n) for n in range(1200)]
    assert rows.count() == 1200
    with pytest.raises(ValueError, match=r"more than 10,000 due times: backfill shorter intervals"):
        schedules.backfill("s", start, start + timedelta(days=7), broker=broker)


# --- changes ----------------------------------------------------------------------------------------------


def test_pause_and_resume(broker: durable.DurableBroker, report: Any, record: Record, start_worker: Start) -> None:
    schedules.create("s", cron=EVERY_SECOND, target=report, overlap="allow")
    start_worker(broker)
    record.wait(1)
    schedules.pause("s", broker=broker)
    broker.join("default", timeout=10_000)
    known = schedules.describe("s", broker=broker)
    assert (known.paused, known.next_due) == (True, [])
    count = len(record.values)
    paused = datetime.now(UTC)
    wait_until(lambda: datetime.now(UTC) > paused + timedelta(seconds=2.1))
    assert len(record.values) == count
    schedules.resume("s", broker=broker)
    resumed = datetime.now(UTC)
    record.wait(count + 1)
    assert datetime.fromisoformat(record.values[count][2].options["schedule_due"]) > resumed - timedelta(seconds=1)


def test_delete(broker: durable.DurableBroker, report: Any, rows: Rows) -> None:
    schedules.create("s", cron=NEVER, target=report)
    schedules.trigger("s", broker=broker)
    schedules.delete("s", broker=broker)
    assert schedules.list(broker=broker) == []
    assert rows.count() == 1, "what it fired goes on"
    for call in (schedules.pause, schedules.resume, schedules.delete, schedules.trigger, schedules.describe):
        with pytest.raises(
            durable.ScheduleNotFound, match=r"there is no schedule 's': schedules.list\(\) has the names"
        ):
            call("s", broker=broker)


def test_deployments_make_it_again_and_again(broker: durable.DurableBroker, report: Any, rows: Rows) -> None:
    def deploy(if_exists: Any = "update", **options: Any) -> None:
        schedules.create("s", **{"cron": NEVER, "target": report, "args": [1], "if_exists": if_exists, **options})

    deploy()
    schedules.pause("s", broker=broker)
    before = rows("SELECT * FROM durable.schedule")
    deploy()
    deploy("keep", cron="0 0 * * *")
    assert rows("SELECT * FROM durable.schedule") == before, "the same definition has the same bytes"
    with pytest.raises(
        durable.ScheduleExists, match="a schedule 's' already: choose another name, or say if_exists='upd"
    ):
        deploy("fail")
    deploy(cron="0 0 * * *", overlap="allow", catch_up=timedelta(minutes=5), timezone="Europe/Berlin")
    known = schedules.describe("s", broker=broker)
    assert (known.cron, known.overlap, known.catch_up, known.timezone, known.paused) == (
        *("0 0 * * *", "allow", timedelta(minutes=5), "Europe/Berlin"),
        True,
    )


def test_list_and_describe(broker: durable.DurableBroker, report: Any, order: Any) -> None:
    schedules.create("b", cron="0 12 1 1 *", target=report, timezone="Asia/Tokyo", catch_up=90)
    schedules.create("a", cron=NEVER, target=order, paused=True, overlap="buffer_one")
    first, second = schedules.list(broker=broker)
    assert (first, second) == (schedules.describe("a", broker=broker), schedules.describe("b", broker=broker))
    year = datetime.now(UTC).year
    assert [at.replace(year=2000) for at in second.next_due] == [datetime(2000, 1, 1, 3, tzinfo=UTC)] * 5
    assert second.next_due[0].year in (year, year + 1)
    assert (first.kind, first.target, first.paused, first.next_due) == ("workflow", "order", True, [])
    assert (second.kind, second.target, second.queue_name) == ("actor", "report", "default")
    assert (second.catch_up, second.overlap, second.fired) == (timedelta(seconds=90), "skip", 0)


def test_a_due_time_that_nobody_has_dealt_with_is_the_next(
    broker: durable.DurableBroker, report: Any, rows: Rows
) -> None:
    schedules.create("s", cron="* * * * *", target=report)
    since(rows, timedelta(minutes=10))
    assert schedules.describe("s", broker=broker).next_due[0] < datetime.now(UTC) - timedelta(minutes=8)
    since(rows, timedelta(hours=10))
    assert schedules.describe("s", broker=broker).next_due[0] > datetime.now(UTC) - timedelta(minutes=61)


def test_the_twins(broker: durable.DurableBroker, report: Any) -> None:
    async def everything() -> None:
        await schedules.acreate("s", cron=NEVER, target=report)
        await schedules.apause("s", broker=broker)
        assert (await schedules.adescribe("s", broker=broker)).paused
        await schedules.aresume("s", broker=broker)
        assert [s.paused for s in await schedules.alist(broker=broker)] == [False]
        assert await schedules.atrigger("s", broker=broker)
        start = datetime(2024, 2, 29, tzinfo=UTC)
        assert await schedules.abackfill("s", start, start, broker=broker) == [start]
        await schedules.adelete("s", broker=broker)

    asyncio.run(everything())
    assert schedules.list(broker=broker) == []


def test_the_global_broker(broker: durable.DurableBroker, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dramatiq.broker, "global_broker", broker)
    schedules.create("s", cron=NEVER, target=durable.activity_stub("report"))
    assert [s.name for s in schedules.list()] == ["s"]


# --- queues do not see ticks -------------------------------------------------------------------------------


@pytest.mark.administrator
def test_join_and_flush(broker: durable.DurableBroker, report: Any, rows: Rows) -> None:
    schedules.create("s", cron=NEVER, target=report)
    schedules.trigger("s", broker=broker)
    broker.flush("default")
    broker.join("default", timeout=1000)
    assert rows("SELECT kind::text FROM durable.message") == [("c",)]


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"cron": "61 * * * *"}, durable.InvalidSchedule, "the minute '61' is wrong"),
        ({"timezone": "Europe/Bonn"}, durable.InvalidSchedule, "is no time zone"),
        ({"overlap": "queue"}, durable.InvalidSchedule, "overlap is one of 'skip', 'buffer_one', 'allow', not 'queue'"),
        ({"if_exists": "replace"}, durable.InvalidSchedule, "if_exists is one of"),
        ({"paused": "no"}, durable.InvalidSchedule, "paused is one of"),
        ({"catch_up": "soon"}, durable.InvalidSchedule, "catch_up: 'soon' is not a duration"),
        ({"catch_up": 0}, durable.InvalidSchedule, "catch_up is at least 10 seconds, not 0"),
        ({"name": ""}, durable.InvalidName, "a schedule's name"),
        ({"name": "x" * 151}, durable.InvalidName, "1 to 150 characters of text, not 151"),
        ({"name": "a\0b"}, durable.InvalidName, "a schedule's name"),
        ({"target": "report"}, TypeError, "target is an actor, an activity, a workflow or an activity_stub"),
        ({"target": print}, TypeError, "target is an actor"),
        ({"args": "abc"}, TypeError, "args is a list or a tuple"),
        ({"kwargs": [1]}, TypeError, "kwargs is a dict"),
        ({"args": [1, 2, 3]}, TypeError, r"typed\(\): too many positional arguments"),
        ({"kwargs": {"c": 1}}, TypeError, r"typed\(\): got an unexpected keyword argument 'c'"),
        ({"args": [object()]}, durable.NotEncodable, "argument 1 is of type object"),
        ({"args": ["x" * 17_000_000]}, durable.PayloadTooLarge, "more than 16777216"),
    ],
)
def test_bad_options(
    broker: durable.DurableBroker, rows: Rows, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    @dramatiq.actor(broker=broker)
    def typed(a: Any = None, b: int = 2) -> None:
        pass

    with pytest.raises(error, match=said):
        schedules.create(**{"name": "s", "cron": NEVER, "target": typed, "broker": broker, **options})
    assert rows("SELECT count(*) FROM durable.schedule") == [(0,)]


def test_bad_options_of_targets(broker: durable.DurableBroker, order: Any) -> None:
    @durable.activity(broker=broker)
    def work() -> None:
        pass

    for target in (work.options(delay=5), durable.activity_stub("x").options(delay=5)):
        with pytest.raises(durable.InvalidSchedule, match="the target has a delay"):
            schedules.create("s", cron=NEVER, target=target, broker=broker)
    for options in ({"workflow_id": "x"}, {"id_conflict": "use_existing"}, {"id_reuse": "reject"}, {"delay": 5}):
        with pytest.raises(durable.InvalidSchedule, match=f"the target has the option '{next(iter(options))}'"):
            schedules.create("s", cron=NEVER, target=order.options(**options))
    with pytest.raises(TypeError, match="too many positional"):
        schedules.create("s", cron=NEVER, target=order, args=[1, 2])


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [
        (datetime(2026, 1, 1), datetime(2026, 1, 2, tzinfo=UTC), "start is a datetime with a time zone"),
        (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2), "end is a datetime with a time zone"),
        ("2026-01-01", datetime(2026, 1, 2, tzinfo=UTC), "start is a datetime"),
        (datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC), "is later than end"),
    ],
)
def test_bad_times_of_a_backfill(
    broker: durable.DurableBroker, report: Any, rows: Rows, start: Any, end: Any, said: str
) -> None:
    schedules.create("s", cron="0 0 * * *", target=report)
    with pytest.raises(ValueError, match=said):
        schedules.backfill("s", start, end, broker=broker)
    assert rows.count() == 1  # the tick


def test_a_broker_of_another_kind() -> None:
    from dramatiq.brokers.stub import StubBroker

    with pytest.raises(durable.NotConfigured, match="needs a DurableBroker"):
        schedules.list(broker=StubBroker())


def test_inside_a_workflow(broker: durable.DurableBroker, report: Any, start_worker: Start) -> None:
    @durable.workflow(broker=broker)
    async def forbidden() -> str:
        try:
            schedules.create("s", cron=NEVER, target=report)
        except durable.ForbiddenInWorkflow as e:
            return str(e)
        return "made"

    start_worker(broker)
    assert "Make it an activity" in forbidden.start().result(timeout=10)
