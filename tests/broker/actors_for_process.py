"""Actors for tests that run the real `dramatiq` command; what runs is printed, and written where asked."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ["TEST_URL"], reclaim_delay=os.environ.get("TEST_RECLAIM_DELAY", "30s"))
dramatiq.set_broker(broker)


def say(text: str) -> None:
    # In one piece: other processes write there too.
    os.write(1, f"{text}\n".encode())


@dramatiq.actor
def quick(n: int) -> None:
    say(f"quick {n}")


@dramatiq.actor(queue_name="other")
def other(n: int) -> None:
    say(f"other {n}")


@dramatiq.actor
def until(path: str) -> None:
    """Runs until the file is there."""
    say("until begins")
    while not Path(path).exists():
        time.sleep(0.01)
    say("until ends")
