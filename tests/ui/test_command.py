"""``dramatiq-durable ui`` as a process."""

from __future__ import annotations

import re
import socket
import sys

import httpx
import pytest

from tests.support.processes import Process, Processes
from tests.test_cli_commands import refused


def start(run_process: Processes, url: str, *arguments: str, **env: str) -> tuple[Process, str]:
    """Start it; return it, and where it listens."""
    process = run_process(sys.executable, "-m", "dramatiq_durable.cli", "--url", url, "ui", *arguments, env=env)
    said = process.wait_for("listening on")
    found = re.search(r"listening on (http://\S+)/", said)
    assert found
    return process, found[1]


def test_it_answers_until_it_is_stopped(database_url: str, run_process: Processes) -> None:
    process, address = start(run_process, database_url, "--listen", "127.0.0.1:0")
    answer = httpx.get(f"{address}/runs")
    assert answer.status_code == 200
    assert "server" not in answer.headers
    assert "read-only" in answer.text
    assert httpx.get(f"{address}/style.css").headers["content-type"].startswith("text/css")
    assert httpx.get(f"{address}/icon.svg").headers["content-type"].startswith("image/svg")
    assert httpx.get(f"{address}/runs", headers={"Host": "evil.example"}).status_code == 421
    assert process.stop() == 0


def test_where_others_can_reach_it_a_token_is_made(database_url: str, run_process: Processes) -> None:
    process, address = start(run_process, database_url, "--listen", "0.0.0.0:0", "--allow-actions")
    token = re.search(r"the token is (\S+)", process.output)
    assert token
    assert len(token[1]) >= 32
    address = address.replace("0.0.0.0", "127.0.0.1")
    with httpx.Client(base_url=address, headers={"Origin": address}, follow_redirects=True) as client:
        form = re.search(r'name="form_token" value="(\w+)"', client.get("/runs").text)
        assert form
        page = client.post("/login", data={"token": token[1], "form_token": form[1]})
        assert page.url.path == "/runs"
        assert "actions are allowed" in page.text
    assert process.stop() == 0


@pytest.mark.parametrize("token", ["short", "a-token-of-some-length"])
def test_the_token_of_the_environment(database_url: str, run_process: Processes, token: str) -> None:
    env = {"DRAMATIQ_DURABLE_UI_TOKEN": token}
    if token == "short":
        process = run_process(sys.executable, "-m", "dramatiq_durable.cli", "--url", database_url, "ui", env=env)
        assert process.wait() == 2
        assert "DRAMATIQ_DURABLE_UI_TOKEN: the token is too short" in process.output
    else:
        process, address = start(run_process, database_url, "--listen", "127.0.0.1:0", **env)
        assert httpx.get(f"{address}/runs").headers["location"] == "/login?next=%2Fruns"
        assert token not in process.output
        assert "no setting" not in process.output


def test_without_the_extra_it_says_what_to_install(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn is missing: pip install 'dramatiq-durable[ui]'" in refused(database_url, "ui")


def test_an_address_that_is_taken(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}" in refused(database_url, "ui", "--listen", address)
