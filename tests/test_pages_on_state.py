"""What the pages on finding runs, topics and output show runs; and the commands of topics."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from dramatiq_durable.cli import main
from tests.support.processes import Processes
from tests.test_examples import blocks

BEFORE = """
import time, dramatiq, dramatiq_durable as durable

broker = durable.DurableBroker()
dramatiq.set_broker(broker)


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def work():
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
    worker.start()
    return worker
"""


def test_what_the_page_on_finding_runs_shows(run_process: Processes, database_url: str) -> None:
    (code,) = blocks("docs/finding.md")
    definitions, _, calls = code.partition("durable.list_workflows(")
    found, counted, told = ("durable.list_workflows(" + calls).strip().splitlines()
    program = f"""{BEFORE}
{definitions}
worker = work()
wait_until(lambda: {found})
(run,) = {found}
assert (run.workflow_id, run.search) == ("order-o-1", {{"vip": True, "state": "new", "region": "eu"}})
assert {counted.split("#")[0]} == {counted.split("#")[1]}
assert {told} == 0
assert durable.batch_signal("search.vip = true", "item", None) == 1
assert handle.result(timeout=10) == {{"order": "o-1", "items": [{{"sku": "tea", "cents": 500}}], "cents": 500}}
assert {counted.split("#")[0]} == {{"paid": 1}}
worker.stop()
broker.close()
"""
    process = run_process.python(program, env={"DRAMATIQ_DURABLE_URL": database_url})
    assert process.wait(timeout=60) == 0, process.output


def test_what_the_page_on_topics_and_output_shows(run_process: Processes, database_url: str) -> None:
    topics, output = blocks("docs/topics.md")
    definition, _, calls = output.partition("handle = ")
    program = f"""{BEFORE}
{topics}
{definition}
worker = work()
order.options(workflow_id="order-o-1").start("o-1", 500)
wait_until(lambda: durable.count_workflows("status = 'completed'") == 1)
broker.join("mail", timeout=20_000)
handle = {calls}
worker.stop()
broker.close()
"""
    process = run_process.python(program, env={"DRAMATIQ_DURABLE_URL": database_url})
    assert process.wait(timeout=60) == 0, process.output
    said = process.output.splitlines()
    assert said[0].startswith("order-o-1: 500 cents, ")
    assert said[1:] == [f"{n} {{'part': {n + 1}, 'of': 3}}" for n in range(3)]


def test_the_commands_of_topics(database_url: str) -> None:
    def run(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, ["--url", database_url, "topic", *arguments], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    named = ("--actor", "send_receipt", "--queue", "mail")
    assert "nobody is subscribed" in run("list").output
    assert run("subscribe", "order-paid", *named).output == "send_receipt is subscribed to order-paid\n"
    assert run("subscribe", "order-paid", *named).output == "send_receipt is subscribed to order-paid already\n"
    (row,) = json.loads(run("list", "--json").stdout)
    assert {k: v for k, v in row.items() if k != "created_at"} == {
        "topic": "order-paid", "actor": "send_receipt", "queue_name": "mail", "everywhere": True, "waiting": 0
    }  # fmt: skip
    shown = run("list").output
    assert "order-paid" in shown
    assert "send_receipt" in shown
    assert "no longer" in run("unsubscribe", "order-paid", *named).output
    assert "is not subscribed" in run("unsubscribe", "order-paid", *named, code=1).output
    assert "no queue name" in run("subscribe", "t", "--actor", "a", "--queue", "no queue", code=1).output
