"""Values that cross the database, state that one can look for, and what the lists say of it."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Mood(enum.StrEnum):
    GOOD = "good"


@dataclass
class Line:
    name: str
    price: Decimal
    color: Color = Color.RED


@dataclass
class Order:
    id: uuid.UUID
    at: datetime
    lines: list[Line] = field(default_factory=list)
    notes: dict[str, bytes] = field(default_factory=dict)
    level: Level | None = None


class Point(NamedTuple):
    x: int
    y: int


ORDER = Order(
    uuid.UUID(int=5),
    datetime(2024, 2, 29, 12, tzinfo=UTC),
    [Line("tea", Decimal("1.10"), Color.BLUE)],
    {"n": b"\x00\xff"},
    Level.LOW,
)


def test_values_by_annotation_everywhere(start_worker: StartWorker) -> None:
    @durable.activity
    def act(order: Order, many: list[Order], pair: tuple[int, Decimal]) -> Order:
        assert isinstance(order, Order)
        assert isinstance(many[0].lines[0].price, Decimal)
        assert isinstance(pair, tuple)
        return order

    @durable.workflow
    async def child(order: Order | None, when: date, delta: timedelta) -> dict[str, Order]:
        assert isinstance(when, date)
        assert isinstance(delta, timedelta)
        return {} if order is None else {"o": order}

    @durable.workflow
    async def flow(order: Order) -> Order:
        @durable.on_update("u")
        def u(order: Order, mood: Mood) -> list[Any]:
            assert isinstance(mood, Mood)
            return [order == ORDER, mood]

        @durable.on_query("q")
        def q(p: Point) -> Order:
            assert p == Point(1, 2)
            return order

        assert order == ORDER
        got = await act.execute(order, [order], (1, Decimal("2.5")))
        assert got == ORDER
        kids = await child.execute(got, date(2020, 1, 2), timedelta(days=1))
        assert kids == {"o": ORDER}
        sent = await durable.wait_for_signal("end")
        assert sent == "x"
        return order

    start_worker()
    handle = flow.start(ORDER)
    assert handle.update("u", ORDER, Mood.GOOD, timeout=15) == [True, "good"]
    assert handle.query("q", Point(1, 2))["id"] == str(ORDER.id)
    handle.signal("end", "x")
    assert handle.result(timeout=10) == ORDER


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -0.0,
        1e300,
        2**70,
        "",
        "\u2603 \x00 \U0001f600",
        [],
        {},
        [None, [1, {"a": []}]],
        {"": 1, "a b": None},
    ],
    ids=repr,
)
def test_plain_values_come_back(start_worker: StartWorker, value: Any) -> None:
    @durable.activity
    def echo(v: Any) -> Any:
        return v

    @durable.workflow
    async def flow(v: Any) -> Any:
        return await echo.execute(v)

    start_worker()
    assert repr(flow.start(value).result(timeout=10)) == repr(value)


def test_what_cannot_be_carried_is_an_error_where_it_is_given(start_worker: StartWorker) -> None:
    class Odd:
        pass

    @durable.activity
    def take(v: Any) -> None: ...

    @durable.activity(retry=durable.RetryPolicy(maximum_attempts=1))
    def give() -> Any:
        return Odd()

    @durable.workflow
    async def flow() -> list[str]:
        out = []
        try:
            await take.execute(Odd())
        except durable.NotEncodable:
            out.append("argument")
        try:
            await give.execute()
        except durable.ActivityFailed as e:
            out.append(e.type)
        return out

    @durable.workflow
    async def bad() -> Any:
        return Odd()

    start_worker()
    assert flow.start().result(timeout=10) == ["argument", "NotEncodable"]
    with pytest.raises(durable.WorkflowFailed) as failed:
        bad.start().result(timeout=10)
    assert failed.value.type == "NotEncodable"
    handle = flow.start()
    with pytest.raises(TypeError):
        handle.signal("x", Odd())
    with pytest.raises(TypeError):
        flow.options(memo={"a": Odd()}).start()
    with pytest.raises(TypeError):
        flow.options(workflow_id="x").start(1)


def test_search_attributes_of_every_type(start_worker: StartWorker) -> None:
    at = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)

    @durable.workflow
    async def flow() -> Any:
        before = dict(durable.info().search)
        await durable.upsert_search({"text": "b", "n": 2, "f": 2.5, "yes": False, "at": at, "tags": ["x", "y"]})
        await durable.upsert_search({"gone": None})
        await durable.wait_for_signal("end")
        return [before, sorted(durable.info().search)]

    start_worker()
    handle = flow.options(search={"text": "a", "gone": 1, "kept": "k"}).start()
    wait_until(lambda: handle.describe().search.get("text") == "b" and "gone" not in handle.describe().search)
    found = handle.describe().search
    assert found == {"text": "b", "n": 2, "f": 2.5, "yes": False, "at": at, "tags": ["x", "y"], "kept": "k"}

    def ids(where: str) -> list[str]:
        return [r.workflow_id for r in durable.list_workflows(where)]

    for where in (
        "search.text = 'b'",
        "search.n = 2 and search.f > 2.4",
        "search.n >= 2 and not search.yes = true",
        "search.yes = false",
        "search.at = '2024-05-06T07:08:09+00:00'",
        "search.at > '2024-05-06'",
        "search.text in ('b', 'c')",
        "search.text like 'b%'",
        "search.kept != 'z'",
        "search.gone = null",
        "search.kept != null",
        "(name = 'flow' or name = 'x') and status = 'running'",
        f"workflow_id = '{handle.workflow_id}' and run_id = '{handle.run_id}'",
        "queue_name = 'default' and closed_at = null",
        "started_at > '2020-01-01T00:00:00Z'",
        "parent_id = null",
    ):
        assert ids(where) == [handle.workflow_id], where
    for where in (
        "search.text = 'a'",
        "search.n > 2",
        "search.yes = true",
        "status = 'completed'",
        "search.text = 'it''s'",
    ):
        assert ids(where) == [], where
    with pytest.raises(durable.InvalidFilter) as wrong:
        durable.list_workflows("status = 'running' andd name = 'x'")
    assert wrong.value.position == 19
    handle.signal("end")
    before, after = handle.result(timeout=10)
    assert before == {"text": "a", "gone": 1, "kept": "k"}
    assert after == ["at", "f", "kept", "n", "tags", "text", "yes"]


def test_entities(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        e = durable.entity()
        out: list[Any] = []
        await e.set("user.name", "ann")
        await e.merge("user", {"age": 3})
        await e.append("tags", "b")
        await e.prepend("tags", "a")
        await e.remove("tags", 1)
        await e.increment("count")
        await e.increment("count", 4)
        await e.toggle("on")
        out.append(await e.set_if_not_exists("user.name", "bob"))
        out.append(await e.set_if_not_exists("user.nick", "an"))
        await e.set("tmp", 1)
        await e.delete("tmp")
        out.append(await e.get("user.name"))
        out.append(await e.get("nothing"))
        out.append(await e.get())
        await durable.wait_for_signal("end")
        return out

    start_worker()
    handle = flow.options(workflow_id="e").start()
    want = {"user": {"name": "ann", "age": 3, "nick": "an"}, "tags": ["a"], "count": 5, "on": True}
    wait_until(lambda: handle.describe().entity.get("on") or handle.describe().task_failure)
    assert handle.describe().entity == want
    for where in ("entity.user.name = 'ann'", "entity.count > 4", "entity.on = true", "entity.user.age in (3, 4)"):
        assert [r.workflow_id for r in durable.list_workflows(where)] == ["e"], where
    handle.signal("end")
    out = handle.result(timeout=10)
    assert out[2:] == ["ann", None, want]
    assert "EntityChanged" in [e.type for e in handle.history()]


def test_output_is_followed_from_an_offset(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        for n in range(5):
            await durable.output({"n": n})
            await durable.sleep(0.001)

    start_worker()
    handle = flow.start()
    assert list(handle.follow()) == [(n, {"n": n}) for n in range(5)]
    assert list(handle.follow(3)) == [(3, {"n": 3}), (4, {"n": 4})]
    assert list(handle.follow(9)) == []


def test_topics_reach_actors(start_worker: StartWorker) -> None:
    got: list[Any] = []

    @dramatiq.actor
    def hear(payload: Any) -> None:
        got.append(payload)

    durable.subscribe("orders")(hear)

    @durable.workflow
    async def flow(name: str) -> None:
        for n in range(3):
            await durable.emit("orders", {"of": name, "n": n})

    start_worker()
    flow.start("a").result(timeout=10)
    wait_until(lambda: len(got) == 3)
    assert got == [{"of": "a", "n": n} for n in range(3)]


def test_lists_pages_and_counts(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int) -> None:
        if n % 2:
            raise ValueError("odd")

    start_worker()
    handles = [flow.options(workflow_id=f"w-{n}").start(n) for n in range(6)]
    for n, h in enumerate(handles):
        if n % 2:
            with pytest.raises(durable.WorkflowFailed):
                h.result(timeout=10)
        else:
            h.result(timeout=10)
    page = durable.list_workflows(order="started_at", limit=4)
    assert [r.workflow_id for r in page] == ["w-0", "w-1", "w-2", "w-3"]
    rest = durable.list_workflows(order="started_at", limit=4, after=page.next)
    assert [r.workflow_id for r in rest] == ["w-4", "w-5"]
    assert rest.next is None
    assert [r.workflow_id for r in durable.list_workflows(limit=1)] == ["w-5"]
    assert durable.count_workflows() == 6
    assert durable.count_workflows("status = 'failed'") == 3
    assert durable.count_workflows(group_by="status") == {"completed": 3, "failed": 3}
    first = page[0]
    assert (first.name, first.queue_name, first.status) == ("flow", "default", "completed")


def test_batches(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(kind: str) -> Any:
        return await durable.wait_for_signal("s")

    start_worker()
    make = flow.options
    for n in range(3):
        make(workflow_id=f"s-{n}", search={"kind": "signal"}).start("s")
        make(workflow_id=f"c-{n}", search={"kind": "cancel"}).start("c")
        make(workflow_id=f"t-{n}", search={"kind": "terminate"}).start("t")
    assert durable.batch_signal("search.kind = 'signal'", "s", 5) == 3
    assert durable.batch_cancel("search.kind = 'cancel'") == 3
    assert durable.batch_terminate("search.kind = 'terminate'", "over") == 3
    for n in range(3):
        assert durable.get_handle(f"s-{n}").result(timeout=10) == 5
        with pytest.raises(durable.WorkflowCancelled):
            durable.get_handle(f"c-{n}").result(timeout=10)
        with pytest.raises(durable.WorkflowTerminated, match="over"):
            durable.get_handle(f"t-{n}").result(timeout=10)
    assert durable.batch_reset("search.kind = 'terminate'", 1) == 3
    assert durable.get_handle("t-0").status() == "running"
    assert durable.batch_terminate("status = 'running'", "end") == 3


def test_human_steps(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(timeout: Any) -> Any:
        try:
            return await durable.escalate(
                role="boss", subject="s-1", payload={"a": 1}, type="t", priority=5, timeout=timeout, metadata={"m": 1}
            )
        except durable.Timeout:
            return "timeout"
        except durable.EscalationCancelled:
            return "cancelled"

    start_worker()
    handle = flow.start(None)
    wait_until(lambda: durable.escalations.list(role="boss"))
    (found,) = durable.escalations.list(role="boss", status="waiting", subject="s-1", limit=5)
    assert (found.role, found.subject, found.payload, found.type, found.priority, found.metadata, found.status) == (
        "boss", "s-1", {"a": 1}, "t", 5, {"m": 1}, "waiting",
    )  # fmt: skip
    (pending,) = handle.describe().pending
    assert pending.kind == "escalation"
    durable.escalations.claim(found.id, by="ann", timeout="1 minute")
    with pytest.raises(durable.EscalationConflict) as conflict:
        durable.escalations.claim(found.id, by="bob")
    assert (conflict.value.status, conflict.value.claimed_by) == ("claimed", "ann")
    with pytest.raises(durable.EscalationConflict):
        durable.escalations.resolve(found.id, {"ok": False}, by="bob")
    durable.escalations.release(found.id, by="ann")
    durable.escalations.claim(found.id, by="bob")
    durable.escalations.resolve(found.id, {"ok": True}, by="bob")
    assert handle.result(timeout=10) == {"ok": True}
    with pytest.raises(durable.EscalationConflict) as closed:
        durable.escalations.cancel(found.id)
    assert closed.value.status == "resolved"
    assert flow.start(0.2).result(timeout=10) == "timeout"
    other = flow.start(None)
    wait_until(lambda: durable.escalations.list(role="boss", status="waiting"))
    (row,) = durable.escalations.list(status="waiting")
    durable.escalations.reassign(row.id, role="chief")
    durable.escalations.cancel(row.id)
    assert other.result(timeout=10) == "cancelled"
    stats = durable.escalations.stats()
    assert (stats.waiting, stats.claimed, stats.resolved, stats.cancelled, stats.timed_out) == (0, 0, 1, 1, 1)
    assert durable.escalations.stats(role="chief").cancelled == 1
    assert durable.escalations.get(found.id).status == "resolved"
