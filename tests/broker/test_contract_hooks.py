"""The same story on Dramatiq's StubBroker and on ours: middleware must see the same, step by step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from dramatiq import Broker, Message, Worker, pipeline
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import (
    AgeLimit,
    AsyncIO,
    Callbacks,
    CurrentMessage,
    Middleware,
    MiddlewareError,
    Pipelines,
    Retries,
    ShutdownNotifications,
    SkipMessage,
    TimeLimit,
    TimeLimitExceeded,
)
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

#: What a hook is about, beside the message.
HOOKS = ("enqueue", "process_message", "skip_message", "ack", "nack")


class Recorder(Middleware):
    """Writes down every hook of a message, with the message's state at that moment."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def note(self, hook: str, message: Any, **facts: Any) -> None:
        thread = threading.current_thread()
        if getattr(thread, "queue_name", "").endswith(".DQ") or (message.queue_name.endswith(".DQ") and "ack" in hook):
            return  # the StubBroker's workers keep delayed messages in memory: it takes them twice
        if hook.endswith("_enqueue") and getattr(thread, "delay_queue", None) is not None:
            return
        if "_ack" not in hook and "_nack" not in hook:
            # What an ack finds depends on what came after it.
            facts["eta"] = "eta" in message.options and not message.options.get("retries")
        facts["retries"] = message.options.get("retries")
        facts["failed"] = getattr(message, "failed", None)
        self.seen.append((hook, message.actor_name, facts))


def _hook(name: str) -> Any:
    def hook(self: Recorder, broker: Any, message: Any, *arguments: Any, **facts: Any) -> None:
        if name.endswith("_enqueue"):
            facts["delay"] = arguments[0]
        if facts.get("exception") is not None:
            facts["exception"] = repr(facts["exception"])
        self.note(name, message, **facts)

    return hook


for _name in HOOKS:
    for _when in ("before", "after"):
        setattr(Recorder, f"{_when}_{_name}", _hook(f"{_when}_{_name}"))


class Story:
    """A broker with actors, what is sent to them, and the queues that are waited for."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.ran: list[Any] = []

    def actor(self, fn: Callable[..., Any], **options: Any) -> Any:
        return dramatiq.actor(fn, broker=self.broker, **options)

    def failing(self, *failures: BaseException | type[BaseException] | None, **options: Any) -> Any:
        """An actor that fails like this, one attempt after the other; the last one goes on."""
        left = list(failures)

        def work() -> str | None:
            self.ran.append("work")
            failure = left.pop(0) if len(left) > 1 else left[0]
            if failure is not None:
                raise failure
            return None

        return self.actor(work, **options)


def succeeds(story: Story) -> None:
    story.failing(None).send()


def returns_a_value(story: Story) -> None:
    story.actor(lambda: 42, actor_name="work").send()


def takes_arguments(story: Story) -> None:
    story.actor(lambda a, *, b: story.ran.append((a, b)), actor_name="work").send([1], b={"x": None})


def is_called_wrongly(story: Story) -> None:
    story.actor(lambda: None, actor_name="work", max_retries=0).send(1, 2, 3)


def fails_and_is_retried(story: Story) -> None:
    story.failing(KeyError("a"), ValueError("b"), None, min_backoff=1, max_backoff=2).send()


def fails_for_good(story: Story) -> None:
    story.failing(KeyError("a"), max_retries=2, min_backoff=1, max_backoff=2).send()


def fails_without_backoff(story: Story) -> None:
    story.failing(KeyError("a"), max_retries=3, min_backoff=0).send()


def may_not_be_retried(story: Story) -> None:
    story.failing(KeyError("a"), max_retries=0).send()


def has_its_options_from_the_message(story: Story) -> None:
    story.failing(KeyError("a"), max_retries=9, min_backoff=60_000).send_with_options(max_retries=1, min_backoff=1)


def asks_for_a_retry(story: Story) -> None:
    story.failing(Retry(delay=5), None).send()


def asks_for_a_retry_that_it_may_not_have(story: Story) -> None:
    story.failing(Retry(delay=5), max_retries=0).send()


def throws_what_was_expected(story: Story) -> None:
    story.failing(KeyError("a"), throws=(KeyError, ValueError)).send()


def throws_something_else(story: Story) -> None:
    story.failing(TypeError("a"), throws=KeyError, max_retries=0).send()


def is_retried_when_a_predicate_says_so(story: Story) -> None:
    def when(retries: int, exception: BaseException) -> bool:
        story.ran.append(("when", retries, repr(exception)))
        return retries < 2

    story.failing(KeyError("a"), retry_when=when, max_retries=0, min_backoff=1, max_backoff=1).send()


def exceeds_a_rate_limit(story: Story) -> None:
    story.failing(RateLimitExceeded("a"), max_retries=1, min_backoff=1, max_backoff=1).send()


def raises_what_is_no_exception(story: Story) -> None:
    story.failing(SystemExit(3), max_retries=1, min_backoff=1, max_backoff=1).send()


def is_too_old(story: Story) -> None:
    work = story.failing(None, max_age=1)
    message = work.message()
    story.broker.enqueue(message.copy(message_timestamp=message.message_timestamp - 1000))


def is_skipped(story: Story) -> None:
    class Skip(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            raise SkipMessage("not today")

    story.broker.add_middleware(Skip())
    story.failing(None).send()


def is_failed_by_a_middleware_before(story: Story) -> None:
    class Fail(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            message.fail()

    story.broker.add_middleware(Fail())
    story.failing(None).send()


def is_failed_by_a_middleware_after(story: Story) -> None:
    class Fail(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            message.fail()

    story.broker.add_middleware(Fail())
    story.failing(None).send()


def meets_a_broken_middleware(story: Story) -> None:
    class Broken(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            raise RuntimeError("before")

        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            raise RuntimeError("after")

        def before_enqueue(self, broker: Any, message: Any, delay: Any) -> None:
            raise RuntimeError("before enqueue")

        def after_ack(self, broker: Any, message: Any) -> None:
            raise RuntimeError("after ack")

    story.broker.add_middleware(Broken())
    story.failing(None).send()


def is_refused_by_a_middleware(story: Story) -> None:
    class Refuse(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            raise MiddlewareError("no")

        def before_enqueue(self, broker: Any, message: Any, delay: Any) -> None:
            if message.args:
                raise MiddlewareError("not this")

    story.broker.add_middleware(Refuse())
    work = story.failing(None, max_retries=0)
    work.send()
    with pytest.raises(MiddlewareError):
        work.send(1)


def is_changed_by_a_middleware_on_its_way(story: Story) -> None:
    class Tag(Middleware):
        def before_enqueue(self, broker: Any, message: Any, delay: Any) -> None:
            message.options["tag"] = "tagged"

        def before_process_message(self, broker: Any, message: Any) -> None:
            story.ran.append(message.options.pop("tag"))

    story.broker.add_middleware(Tag())
    story.failing(KeyError("a"), None, min_backoff=1, max_backoff=1).send_with_options(delay=5)


def has_nobody(story: Story) -> None:
    story.broker.declare_queue("default")
    story.broker.enqueue(Message("default", "nobody", (), {}, {}))


def is_delayed(story: Story) -> None:
    story.failing(None).send_with_options(delay=20)


def has_an_eta_of_none(story: Story) -> None:
    story.broker.enqueue(story.failing(None).message_with_options(eta=None))


def runs_out_of_time(story: Story) -> None:
    def work() -> None:
        try:
            for _ in range(1000):
                time.sleep(0.01)
        except TimeLimitExceeded:
            story.ran.append("over the limit")
            raise

    story.actor(work, time_limit=30, max_retries=1, min_backoff=1, max_backoff=1).send()


def calls_back(story: Story) -> None:
    def good(message: Any, result: Any) -> None:
        story.ran.append((message["actor_name"], result))

    def bad(message: Any, failure: Any) -> None:
        story.ran.append((message["actor_name"], failure["type"]))

    story.actor(good)
    story.actor(bad)
    # The callback comes before the retry.
    story.failing(KeyError("a"), None, min_backoff=200, max_backoff=200, on_success="good", on_failure="bad").send()


def tells_that_its_retries_ran_out(story: Story) -> None:
    def exhausted(message: Any, info: Any) -> None:
        story.ran.append((message["actor_name"], info))

    story.actor(exhausted)
    story.failing(KeyError("a"), max_retries=1, min_backoff=1, max_backoff=1, on_retry_exhausted="exhausted").send()


def passes_on(story: Story) -> None:
    add = story.actor(lambda a, b: a + b, actor_name="add")
    last = story.actor(lambda *values: story.ran.append(values), actor_name="last")
    delayed = add.message_with_options(args=(3,), delay=10)
    ignoring = last.message_with_options(args=("nothing",), pipe_ignore=True)
    pipeline([add.message(1, 2), delayed, ignoring], broker=story.broker).run()


def passes_nothing_on_when_it_fails(story: Story) -> None:
    first = story.failing(KeyError("a"), max_retries=0)
    last = story.actor(lambda *values: story.ran.append(values), actor_name="last")
    pipeline([first.message(), last.message()], broker=story.broker).run()


def sends_while_it_runs(story: Story) -> None:
    quick = story.actor(lambda n: story.ran.append(n), actor_name="quick")
    story.actor(lambda: [quick.send(1), None][1], actor_name="work").send()


def is_a_coroutine(story: Story) -> None:
    async def work() -> None:
        message = CurrentMessage.get_current_message()
        story.ran.append(message is not None and message.actor_name)
        raise KeyError("a")

    story.actor(work, max_retries=1, min_backoff=1, max_backoff=1).send()


def is_a_class(story: Story) -> None:
    class Work(dramatiq.GenericActor):
        class Meta:
            broker = story.broker
            max_retries = 1
            min_backoff = max_backoff = 1

        def perform(self, n: int) -> None:
            story.ran.append(n)
            raise KeyError("a")

    Work.send(5)


def knows_its_message(story: Story) -> None:
    def work() -> None:
        message: Any = CurrentMessage.get_current_message()
        story.ran.append((message.message_id == sent.message_id, message.options.get("retries")))
        if not message.options.get("retries"):
            raise KeyError("a")

    actor = story.actor(work, min_backoff=1, max_backoff=1)
    sent = actor.message()
    story.broker.enqueue(sent)


STORIES = [
    succeeds,
    returns_a_value,
    takes_arguments,
    is_called_wrongly,
    fails_and_is_retried,
    fails_for_good,
    fails_without_backoff,
    may_not_be_retried,
    has_its_options_from_the_message,
    asks_for_a_retry,
    asks_for_a_retry_that_it_may_not_have,
    throws_what_was_expected,
    throws_something_else,
    is_retried_when_a_predicate_says_so,
    exceeds_a_rate_limit,
    raises_what_is_no_exception,
    is_too_old,
    is_skipped,
    is_failed_by_a_middleware_before,
    is_failed_by_a_middleware_after,
    meets_a_broken_middleware,
    is_refused_by_a_middleware,
    is_changed_by_a_middleware_on_its_way,
    has_nobody,
    is_delayed,
    has_an_eta_of_none,
    runs_out_of_time,
    calls_back,
    tells_that_its_retries_ran_out,
    passes_on,
    passes_nothing_on_when_it_fails,
    sends_while_it_runs,
    is_a_coroutine,
    is_a_class,
    knows_its_message,
]


def defaults() -> list[Middleware]:
    return [
        AgeLimit(),
        TimeLimit(interval=10),
        ShutdownNotifications(),
        Callbacks(),
        Pipelines(),
        Retries(),
        CurrentMessage(),
        AsyncIO(),
    ]


def tell(broker: Broker, story: Callable[[Story], None], recorder: Recorder) -> tuple[list[Any], dict[str, list[Any]]]:
    """Run a story with one thread; return what its actors report, and what each message's hooks saw, in order."""
    broker.emit_after("process_boot")
    told = Story(broker)
    story(told)
    worker = Worker(broker, worker_timeout=10, worker_threads=1)
    worker.start()
    try:
        broker.join("default", timeout=10_000, **({"fail_fast": False} if isinstance(broker, StubBroker) else {}))
        worker.join()
    finally:
        worker.stop()
    # By message: with several of them, what happens beside each other has no order.
    by_actor: dict[str, list[Any]] = {}
    for hook, actor, facts in recorder.seen:
        if facts.get("delay") is not None:
            facts["delay"] = "some" if facts["delay"] else 0
        by_actor.setdefault(actor, []).append((hook, facts))
    return told.ran, by_actor


@pytest.mark.parametrize("place", ["first", "before retries", "after retries", "last"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_hooks_see_the_same(make_broker: Any, story: Callable[[Story], None], place: str) -> None:
    told = []
    for make in (StubBroker, make_broker):
        recorder = Recorder()
        if place == "first":
            broker = make(middleware=[recorder, *defaults()])
        else:
            broker = make(middleware=defaults())
            before, _, _ = place.partition(" ")
            broker.add_middleware(recorder, **({before: Retries} if before != "last" else {}))
        told.append(tell(broker, story, recorder))
    (stub_ran, stub_seen), (ran, seen) = told
    assert ran == stub_ran
    assert seen.keys() == stub_seen.keys()
    for actor, hooks in seen.items():
        assert hooks == stub_seen[actor]


@pytest.mark.parametrize("outcome", [7, None, KeyError("a")], ids=repr)
def test_a_results_backend_is_called_the_same(make_broker: Any, outcome: Any) -> None:
    """With a back end that is not ours."""
    kept = []
    for make in (StubBroker, make_broker):
        calls: list[tuple[Any, ...]] = []

        class Backend(StubBackend):
            def store_result(self, message: Any, result: Any, ttl: int, calls: list[Any] = calls) -> None:
                calls.append(("result", result, ttl))
                super().store_result(message, result, ttl)

            def store_exception(self, message: Any, exception: Any, ttl: int, calls: list[Any] = calls) -> None:
                calls.append(("exception", repr(exception), ttl))
                super().store_exception(message, exception, ttl)

        def story(told: Story) -> None:
            def work() -> Any:
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

            told.actor(work, store_results=True, max_retries=1, min_backoff=1, max_backoff=1).send()

        recorder = Recorder()
        tell(make(middleware=[*defaults(), Results(backend=Backend()), recorder]), story, recorder)
        kept.append(calls)
    assert kept[0] == kept[1]
    assert len(kept[0]) == 1
