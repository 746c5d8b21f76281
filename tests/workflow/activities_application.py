"""What the worker processes of the tests of activities run; the tests' own process has the stubs and the workflow."""

from __future__ import annotations

import os
import time

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ["TEST_URL"], reclaim_delay=float(os.environ.get("TEST_RECLAIM", "1")))
broker.add_middleware(dramatiq.middleware.AsyncIO())
dramatiq.set_broker(broker)


def say(what: str) -> None:
    print(what, flush=True)


@dramatiq.actor(queue_name="elsewhere")
def count_up(most: int) -> list[int]:
    info = durable.activity_info()
    assert info is not None
    start = info.heartbeat_details or 0
    say(f"attempt {info.attempt} starts at {start}")
    for n in range(start, most):
        durable.heartbeat(n + 1)
        time.sleep(0.02)
        if info.attempt == 1 and start == 0 and n == most - 2:
            say("hangs")
            time.sleep(1000)
    return [start, most]


@dramatiq.actor(queue_name="elsewhere", max_retries=0)
def hang() -> str:
    say("hangs")
    try:
        while True:
            time.sleep(0.01)
    except durable.ActivityCancelled:
        say("was cancelled")
        raise


@dramatiq.actor(queue_name="elsewhere", notify_shutdown=True)
def stopped() -> str:
    info = durable.activity_info()
    assert info is not None
    say(f"attempt {info.attempt} hangs")
    if os.environ.get("TEST_SECOND"):
        return f"attempt {info.attempt}"
    while True:
        time.sleep(0.01)
