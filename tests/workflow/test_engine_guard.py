"""I/O, threads and blocking calls are refused inside a workflow, with what to do instead."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import logging
import os
import queue
import random
import secrets
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from time import sleep as bare_sleep
from typing import Any

import pytest

from dramatiq_durable import activity_stub
from dramatiq_durable.errors import ForbiddenInWorkflow
from tests.workflow.test_engine_support import Run, echo, ship


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "time.sleep": (lambda: time.sleep(0.01), "asyncio.sleep"),
    "sleep imported by name": (lambda: bare_sleep(0.01), "asyncio.sleep"),
    "thread": (lambda: threading.Thread(target=print).start(), "create_task"),
    "open": (lambda: os.open(os.devnull, os.O_RDONLY), "activity"),
    "Path.read_text": (lambda: Path(__file__).read_text(), "activity"),
    "listdir": (lambda: list(Path().iterdir()), "activity"),
    "socket": (lambda: socket.socket(), "activity"),
    "getaddrinfo": (lambda: socket.getaddrinfo("localhost", 1), "activity"),
    "create_connection": (lambda: socket.create_connection(("localhost", 1)), "activity"),
    "urlopen": (lambda: urllib.request.urlopen("http://localhost:1"), "activity"),
    "subprocess": (lambda: subprocess.run([sys.executable, "-V"]), "activity"),
    "os.system": (lambda: os.system("true"), "activity"),
    "fork": (lambda: os.fork(), "activity"),
    "input": (lambda: input(), "signal"),
    "os.urandom": (lambda: os.urandom(4), "durable.random"),
    "secrets": (lambda: secrets.token_hex(), "durable.uuid4"),
    "SystemRandom": (lambda: random.SystemRandom().random(), "side_effect"),
    "uuid1": (lambda: uuid.uuid1(), "uuid7"),
    "Event.wait": (lambda: threading.Event().wait(0.01), "asyncio.Event"),
    "Queue.get": (lambda: queue.Queue().get(timeout=0.01), "asyncio.Queue"),
    "open for writing": (lambda: Path("file").write_text("x"), "activity"),
    "tempfile": (lambda: tempfile.mkdtemp(), "activity"),
    "http.client": (lambda: http.client.HTTPConnection("localhost", 1).request("GET", "/"), "activity"),
    "executor": (lambda: concurrent.futures.ThreadPoolExecutor().submit(print), "create_task"),
    "sqlite": (lambda: sqlite3.connect(":memory:"), "activity"),
    "run_in_executor": (lambda: _loop().run_in_executor(None, print), "activity"),
    "call_soon_threadsafe": (lambda: _loop().call_soon_threadsafe(print), "signal"),
    "stop": (lambda: _loop().stop(), "await"),
    "add_reader": (lambda: _loop().add_reader(0, print), "activity"),
    "task factory": (lambda: _loop().set_task_factory(None), "leave"),
    "activity.send": (lambda: echo.send(1), "execute"),
    "activity.send_with_options": (lambda: echo.send_with_options(args=(1,)), "execute"),
    "activity called": (lambda: echo(1), "execute"),
    "workflow.send": (lambda: ship.send("x"), "execute"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, advice = REFUSED[name]

    async def wf() -> str:
        try:
            call()
        except ForbiddenInWorkflow as e:
            return str(e)
        return "allowed"

    message = Run(wf).result
    assert "refused inside a workflow" in message
    assert advice in message


@pytest.mark.parametrize(
    "make",
    [
        lambda: asyncio.to_thread(print),
        lambda: asyncio.open_connection("localhost", 1),
        lambda: asyncio.create_subprocess_shell("true"),
        lambda: asyncio.get_running_loop().getaddrinfo("localhost", 1),
        lambda: ship.astart("x"),
        lambda: echo.asend(1),
        lambda: echo.asend_with_options(args=(1,)),
        lambda: activity_stub("far").asend(1),
    ],
)
def test_refused_when_awaited(make: Callable[[], Any]) -> None:
    async def wf() -> None:
        await make()

    assert Run(wf).failure["type"] == "ForbiddenInWorkflow"


def test_everything_is_allowed_again_between_steps(tmp_path: Path) -> None:
    async def wf() -> None:
        await echo.execute()

    run = Run(wf)
    time.sleep(0)
    (tmp_path / "file").write_text("x")
    thread = threading.Thread(target=bare_sleep, args=(0,))
    thread.start()
    thread.join()
    run.complete(1)


def test_another_thread_is_free_while_a_step_runs() -> None:
    async def wf() -> Any:
        asked.set()
        while not answered.is_set():
            pass
        return "ok"

    def other() -> None:
        asked.wait()
        time.sleep(0)
        with open(os.devnull):
            answered.set()

    asked, answered = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    assert Run(wf).result == "ok"
    thread.join()


def test_imports_tracebacks_and_log_handlers_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "freshly_written_module.py").write_text("VALUE = 42\n")
    handler = logging.FileHandler(tmp_path / "log", delay=True)
    logger = logging.getLogger("test-guard")
    logger.addHandler(handler)
    logger.propagate = False

    async def wf() -> Any:
        import freshly_written_module  # type: ignore[import-not-found]

        logger.error("written by a handler that opens its file only now")
        try:
            raise ValueError
        except ValueError:
            text = traceback.format_exc()
        return [freshly_written_module.VALUE, "ValueError" in text]

    sys.path.insert(0, str(tmp_path))
    try:
        assert Run(wf).result == [42, True]
    finally:
        sys.path.remove(str(tmp_path))
        handler.close()
    assert "only now" in (tmp_path / "log").read_text()
