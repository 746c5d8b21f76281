"""A namespace with something of everything, whose names are what somebody hostile would choose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import httpx
import pytest
from dramatiq.middleware import Retries

import dramatiq_durable as durable
from dramatiq_durable import schedules
from dramatiq_durable.cli.target import Target
from dramatiq_durable.ui.app import create_app
from tests.support import wait_until
from tests.test_cli_commands import working

#: What must never come out as it is.
HOSTILE = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>&amp;\u202egnp\u2028\x07{{7*7}}"


class Site:
    """What there is.

    Attributes:
      url(str): the database's.
      runs(dict): run ids, by how the runs stand.
      messages(list): letters that died.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.runs: dict[str, str] = {}
        self.go = threading.Event()


@pytest.fixture
def site(database_url: str) -> Iterator[Site]:
    site = Site(database_url)
    broker = durable.DurableBroker(database_url, middleware=[Retries(max_retries=0)])
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)

    def dies(text: str) -> None:
        raise ValueError(text)

    actor = dramatiq.actor(dies, queue_name="mail", actor_name="dies", broker=broker)

    @durable.activity(queue_name="desk")
    def double(text: str) -> str:
        return text * 2

    @durable.activity(queue_name="desk", retry=durable.RetryPolicy(initial_interval="1 hour"))
    def flaky(text: str) -> str:
        raise RuntimeError(text)

    @durable.workflow(queue_name="desk")
    async def kid(text: str) -> str:
        return text

    @durable.workflow(queue_name="desk")
    async def good(text: str) -> Any:
        await durable.sleep(0.05)
        await kid.options(workflow_id=f"kid of {text}").execute(text)
        got = await durable.wait_for_signal("go")
        return [await double.execute(text), got]

    @durable.workflow(queue_name="desk")
    async def bad(text: str) -> None:
        raise durable.Failure(text)

    @durable.workflow(queue_name="desk")
    async def tries(text: str) -> str:
        return await flaky.execute(text)

    @durable.workflow(queue_name="desk")
    async def ask(text: str) -> Any:
        return await durable.escalate(
            role="clerk", subject=text[:50], type="approval", payload={"text": text}, metadata={"k": text}
        )

    schedules.create(HOSTILE.replace("\x07", ""), cron="0 6 * * *", target=actor, args=[HOSTILE], broker=broker)
    actor.send(HOSTILE)
    actor.send_with_options(args=("later",), delay=3_600_000)
    with working(broker):
        for name, workflow in (("good", good), ("bad", bad), ("tries", tries), ("ask", ask)):
            handle = workflow.options(workflow_id=f"{name} {HOSTILE}").start(HOSTILE)
            site.runs[name] = handle.run_id
            if name == "good":
                handle.signal("go", HOSTILE)
                handle.result(timeout=20)
            elif name == "bad":
                wait_until(lambda handle=handle: handle.status() == "failed")
            else:
                wait_until(lambda handle=handle, name=name: _waits(handle, name))
        wait_until(lambda: broker.get_queue_message_counts("mail")[2] == 1)
        yield site
    dramatiq.broker.global_broker = before


def _waits(handle: durable.WorkflowHandle[Any], name: str) -> bool:
    if name == "ask":
        return any(event.type == "EscalationOpened" for event in handle.history())
    return any(entry.last_failure for entry in handle.describe().pending)


class Client:
    """A browser, as far as it asks and keeps cookies; it follows nothing by itself.

    Parameters:
      app: the application.
      base(str): where it thinks that is.
    """

    def __init__(self, app: Any, base: str) -> None:
        self.app = app
        self._base = base
        self.cookies = httpx.Cookies()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.ask("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.ask("POST", path, **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=self._base, cookies=self.cookies) as client:
                answer = await client.request(method, path, **options)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())


OpenSite = Callable[..., Client]


@pytest.fixture
def opened(database_url: str) -> Iterator[OpenSite]:
    """Opens the pages of the test's database; the arguments are those of `create_app`."""
    targets: list[Target] = []

    def make(url: str = database_url, base: str = "http://localhost", **options: Any) -> Client:
        target = Target(url, None)
        targets.append(target)
        return Client(create_app(target, **options), base)

    yield make
    for target in targets:
        target.close()
