"""The lint finds in source code what workflows cannot do, and leaves everything else alone."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dramatiq_durable.cli import main
from dramatiq_durable.workflow.lint import lint_paths

HEAD = """\
import asyncio, datetime, os, random, threading, time, uuid
import dramatiq
import dramatiq_durable as durable
from datetime import datetime as dt
from time import sleep as nap
from somewhere import far_actor

clock = time.time

@dramatiq.actor
def plain(x): ...

@durable.activity(queue_name="q")
def charge(x):
    time.sleep(1)
    return open("x")
"""


def lint(tmp_path: Path, body: str, head: str = HEAD) -> list[tuple[str, str]]:
    file = tmp_path / "flow.py"
    file.write_text(head + textwrap.dedent(body))
    return [(f.what, f.instead) for f in lint_paths([file])]


def in_workflow(tmp_path: Path, *lines: str) -> list[tuple[str, str]]:
    body = "\n".join(f"    {line}" for line in lines)
    return lint(tmp_path, f"@durable.workflow(queue_name='q')\nasync def flow(x):\n{body}\n")


FOUND: dict[str, tuple[str, str]] = {
    "time.time()": ("time.time", "durable.now()"),
    "clock()": ("time.time", "durable.now()"),
    "nap(3)": ("time.sleep", "asyncio.sleep"),
    "dt.now()": ("datetime.datetime.now", "durable.now()"),
    "datetime.datetime.utcnow()": ("utcnow", "durable.now()"),
    "datetime.date.today()": ("date.today", "durable.now()"),
    "make(default=dt.now)": ("now", "durable.now()"),
    "time.perf_counter()": ("perf_counter", "durable.now()"),
    "random.choice([1])": ("random.choice", "durable.random()"),
    "uuid.uuid4()": ("uuid4", "durable.uuid4()"),
    "os.urandom(3)": ("urandom", "side_effect"),
    "open('x').read()": ("`open`", "activity"),
    "os.listdir('.')": ("listdir", "activity"),
    "x.read_text()": ("read_text", "activity"),
    "input()": ("input", "wait_for_signal"),
    "threading.Thread(target=x).start()": ("Thread", "create_task"),
    "threading.Event()": ("Event", "asyncio.Event"),
    "asyncio.Future()": ("asyncio.Future", "create_future"),
    "hash('x')": ("hash", "arguments"),
    "await asyncio.to_thread(x)": ("to_thread", "activity"),
    "await asyncio.open_connection('h', 1)": ("open_connection", "activity"),
    "await asyncio.get_running_loop().run_in_executor(None, x)": ("run_in_executor", "activity"),
    "import requests; requests.get('http://x')": ("requests.get", "activity"),
    "import httpx; await httpx.AsyncClient().get('http://x')": ("httpx.AsyncClient", "activity"),
    "from aiohttp import ClientSession as S; S()": ("aiohttp.ClientSession", "activity"),
    "import subprocess as sp; sp.run([])": ("subprocess.run", "activity"),
    "import numpy as np; np.random.rand()": ("numpy.random.rand", "durable.random()"),
    "import secrets; secrets.token_hex()": ("secrets.token_hex", "side_effect"),
    "import psycopg; psycopg.connect()": ("psycopg.connect", "activity"),
    "charge.send(1)": ("`charge` sends", "charge.execute"),
    "plain.send_with_options(args=(1,))": ("`plain` sends", "plain.execute"),
    "await charge.asend(1)": ("`charge` sends", "charge.execute"),
    "far_actor.send(1)": ("`far_actor` sends", "far_actor.execute"),
    "charge(1)": ("`charge` calls", "charge.execute"),
    "[i for i in {1, 2}]": ("set", "sorted"),
    "list({1, 2} | x)": ("set", "sorted"),
    "print(*set(x))": ("set", "sorted"),
    "s = set(x); s.pop()": ("set", "sorted"),
    "s: set[int] = x; [print(i) for i in s]": ("set", "sorted"),
}


@pytest.mark.parametrize("line", FOUND)
def test_found(tmp_path: Path, line: str) -> None:
    what, instead = FOUND[line]
    found = in_workflow(tmp_path, line)
    assert found, line
    assert what in found[0][0]
    assert instead in found[0][1]


@pytest.mark.parametrize(
    "line",
    [
        "await charge.execute(x)",
        "durable.now()",
        "durable.random().choice([1])",
        "await asyncio.sleep(3)",
        "await asyncio.gather(charge.execute(1), charge.execute(2))",
        "await durable.side_effect(lambda: time.time())",
        "await durable.side_effect(uuid.uuid4)",
        "await durable.local(plain, x)",
        "sorted({1, 2})",
        "1 in {1, 2}; len({1})",
        "os.environ['X']; os.path.join('a', 'b')",
        "dt.fromisoformat(x); dt(2020, 1, 1); datetime.timedelta(days=1)",
        "random.Random(3).random()",
        "time.time()  # durable: allow",
        "gen = x(); gen.send(None)",
        "y: dt = x; isinstance(x, dt)",
        "import httpx; isinstance(x, httpx.HTTPError)",
        "loop = asyncio.get_running_loop(); loop.time()",
    ],
)
def test_left_alone(tmp_path: Path, line: str) -> None:
    assert in_workflow(tmp_path, line) == []


def test_calls_are_followed_inside_the_module(tmp_path: Path) -> None:
    found = lint(
        tmp_path,
        """
        def helper():
            return deeper()

        def deeper():
            return time.time()

        class Price:
            def __init__(self):
                self.at = random.random()

            def total(self):
                return self._add()

            def _add(self):
                return uuid.uuid4()

            def never_called(self):
                return os.listdir()

        def never_called():
            open("x")

        @durable.workflow
        async def flow():
            async def nested():
                nap(1)

            def unused():
                os.system("x")

            async def outside():
                os.remove("x")

            @durable.on_signal("s")
            async def handler(x):
                input()

            def fetch():
                return open("x")

            helper()
            await nested()
            await durable.local(outside)
            await durable.local(fetch)
            return Price().total()

        @durable.workflow
        async def other():
            return [helper() for _ in range(3)]
        """,
    )
    names = sorted(what.split("`")[1] for what, _ in found)
    assert names == ["input", "random.random", "time.sleep", "time.time", "time.time", "uuid.uuid4"]


def test_workflows_are_found_wherever_they_are(tmp_path: Path) -> None:
    found = lint(
        tmp_path,
        """
        from dramatiq_durable import workflow

        def factory():
            @workflow(queue_name="q")
            async def nested():
                time.time()

        class Flows:
            @staticmethod
            @durable.workflow()
            async def method():
                random.random()

        async def function():
            uuid.uuid4()

        declared = workflow(function)

        async def no_workflow():
            time.time()
        """,
    )
    assert sorted(what.split("`")[1] for what, _ in found) == ["random.random", "time.time", "uuid.uuid4"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["workflow", "lint", *arguments])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "flows.py").write_text(HEAD + "@durable.workflow\nasync def order():\n    time.time()\n")
    (package / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = len(HEAD.splitlines()) + 3
    for target in ("shop.flows", str(package / "flows.py")):
        result = run(target)
        assert result.exit_code == 1
        assert f"flows.py:{line}:5: `time.time` reads the clock (workflow order): use `durable.now()`" in result.output
    result = run("shop", "--json")
    assert result.exit_code == 1
    found: list[dict[str, Any]] = json.loads(result.output)
    assert [(Path(f["path"]).name, f["line"]) for f in found] == [("broken.py", 1), ("flows.py", line)]
    assert set(found[1]) == {"path", "line", "column", "workflow", "what", "instead"}
    (package / "broken.py").unlink()
    (package / "flows.py").write_text("x = 1\n")
    assert (run("shop").exit_code, run("shop").output) == (0, "")
    assert json.loads(run("shop", "--json").output) == []
    assert run("no.such.module").exit_code == 2


def test_our_own_examples_pass() -> None:
    root = Path(__file__).parents[2]
    assert lint_paths([root / "examples"]) == []
