"""Actors for tests of the command line's options; what happens is printed.

``TEST_MIDDLEWARE`` names what is added to the default middleware: "prometheus", "forking".
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.middleware import AsyncIO, Middleware, Shutdown, TimeLimitExceeded, default_middleware
from dramatiq.middleware.prometheus import Prometheus

import dramatiq_durable as durable


def say(text: str) -> None:
    # In one piece: other processes write there too.
    os.write(1, f"{text}\n".encode())


def forked() -> int:
    """A process beside the workers, which has a broker too: it sends."""
    say(f"forked {os.getpid()}")
    quick.send("from the fork")
    while True:
        time.sleep(60)


def fork_of_middleware() -> int:
    say("a middleware's fork")
    return 0


class Forking(Middleware):
    @property
    def forks(self) -> list[Any]:
        return [fork_of_middleware]


CHOICES: dict[str, type[Middleware]] = {"prometheus": Prometheus, "forking": Forking}
chosen = [CHOICES[name]() for name in os.environ.get("TEST_MIDDLEWARE", "").split()]
broker = durable.DurableBroker(
    os.environ["TEST_URL"], middleware=[*chosen, *(make() for make in default_middleware), AsyncIO()]
)
dramatiq.set_broker(broker)


@dramatiq.actor
def quick(text: str) -> None:
    say(f"quick {text} in {os.getpid()}")


@dramatiq.actor
def passes_on(text: str) -> None:
    quick.send(text)


@dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
def fail() -> None:
    raise RuntimeError("as told")


@dramatiq.actor(max_retries=0)
def nap(seconds: float) -> None:
    """Sleeps; many of these at once are for greenlets."""
    time.sleep(seconds)
    say("napped")


@dramatiq.actor(time_limit=300, max_retries=0)
def limited() -> None:
    try:
        time.sleep(30)
    except TimeLimitExceeded:
        say("over the limit")
        raise


@dramatiq.actor(notify_shutdown=True, max_retries=0)
def notified(path: str) -> None:
    try:
        say("notified begins")
        for _ in range(300):
            time.sleep(0.1)
    except Shutdown:
        say("notified of the shutdown")
        raise


@dramatiq.actor
def until(path: str) -> None:
    """Runs until the file is there."""
    say("until begins")
    while not Path(path).exists():
        time.sleep(0.01)
    say("until ends")


@dramatiq.actor
def threads() -> None:
    say(f"thread is a {type(threading.current_thread()).__name__}, {time.sleep.__module__}")


@dramatiq.actor
async def coroutine() -> None:
    say("coroutine ran")
