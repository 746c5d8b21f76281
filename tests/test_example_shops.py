"""The Django and the FastAPI shop, run as their READMEs say: a server, a worker, requests."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.support import ROOT, wait_until
from tests.support.processes import Processes

TEA = {"email": "kim@example.com", "lines": [{"product": "tea", "quantity": 2}]}
NONSENSE = {"email": "kim@example.com", "lines": [*TEA["lines"], {"product": "tea", "quantity": -2}]}


@pytest.fixture
def port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield client


@pytest.fixture
def rows(database_url: str) -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield lambda query: conn.execute(query.encode()).fetchall()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/orders/0").status_code == 404
    except httpx.TransportError:
        return False


def status(client: httpx.Client, order: int) -> str:
    return str(client.get(f"/orders/{order}").raise_for_status().json()["status"])


@pytest.mark.timeout(240)
def test_the_django_shop(
    run_process: Processes, database_url: str, port: int, client: httpx.Client, rows: Callable[[str], Any]
) -> None:
    where: dict[str, Any] = {"cwd": ROOT / "examples" / "django_shop", "env": {"DRAMATIQ_DURABLE_URL": database_url}}
    manage: tuple[str | Path, ...] = (sys.executable, "-W", "error", "manage.py")
    for command in (("makemigrations", "--check"), ("migrate",), ("check",)):
        done = run_process(*manage, *command, **where)
        assert done.wait(timeout=60) == 0, done.output
    server = run_process(*manage, "runserver", "--noreload", str(port), **where)
    wait_until(lambda: answers(client), timeout=60, message="the server")

    placed = client.post("/orders", json=TEA)
    assert (placed.status_code, placed.json()["status"]) == (201, "placed"), server.output
    assert rows("SELECT actor FROM durable.message") == [("confirm",)]
    assert client.post("/orders", json=NONSENSE).status_code == 400, server.output
    assert rows("SELECT count(*) FROM shop_order") == rows("SELECT count(*) FROM durable.message") == [(1,)]

    worker = run_process.dramatiq("config.worker", "--processes", "1", "--threads", "2", **where)
    order = placed.json()["id"]
    wait_until(lambda: status(client, order) == "confirmed", timeout=60, message="a confirmed order")
    another = client.post("/orders", json=TEA).json()["id"]
    wait_until(lambda: status(client, another) == "confirmed", message="another one")
    wait_until(lambda: rows("SELECT count(*) FROM durable.message") == [(0,)], message="the last ack")
    assert worker.stop() == 0, worker.output
    assert "Traceback" not in worker.output + server.output


@pytest.mark.timeout(240)
def test_the_fastapi_shop(
    run_process: Processes, database_url: str, port: int, client: httpx.Client, rows: Callable[[str], Any]
) -> None:
    where: dict[str, Any] = {"cwd": ROOT / "examples" / "fastapi_shop", "env": {"DRAMATIQ_DURABLE_URL": database_url}}
    server = run_process(sys.executable, "-m", "uvicorn", "shop.main:app", "--port", str(port), **where)
    wait_until(lambda: answers(client), timeout=60, message="the server")

    placed = client.post("/orders", json=TEA)
    assert (placed.status_code, placed.json()["status"]) == (201, "placed"), server.output
    assert client.post("/orders", json=NONSENSE).status_code == 400, server.output
    assert rows("SELECT count(*) FROM orders") == rows("SELECT count(*) FROM durable.run") == [(1,)]
    assert rows("SELECT actor FROM durable.message WHERE kind = 'm'") == [("greet",)]

    worker = run_process.dramatiq("shop.work", "--processes", "1", "--threads", "2", **where)
    order = placed.json()["id"]
    wait_until(lambda: status(client, order) == "confirmed", timeout=60, message="a confirmed order")
    worker.wait_for("Thank you for your order, kim@example.com!")
    assert client.post(f"/orders/{order}/approval").json()["status"] == "approved", server.output
    wait_until(lambda: status(client, order) == "shipped", message="a shipped order")
    wait_until(lambda: rows("SELECT status FROM durable.run") == [("completed",)], message="the run's end")
    assert client.post(f"/orders/{order}/approval").status_code == 409
    assert status(client, order) == "shipped"
    assert worker.stop() == 0, worker.output
    server.stop()
    assert "Traceback" not in worker.output + server.output
