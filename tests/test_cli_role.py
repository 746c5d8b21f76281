"""``dramatiq-durable role``: what it does, what it shows, and to whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from dramatiq_durable.cli import main
from tests.support.postgres import Cluster
from tests.support.scratch import Scratch, scratch


@pytest.fixture
def made(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as made:
        yield made


def attempt(made: Scratch | str, *arguments: str) -> Result:
    url = made if isinstance(made, str) else made.url
    return CliRunner().invoke(main, ["--url", url, "role", *arguments], catch_exceptions=False)


def run(made: Scratch | str, *arguments: str) -> Result:
    done = attempt(made, *arguments)
    assert done.exit_code == 0, done.output
    return done


def as_json(made: Scratch, *arguments: str) -> Any:
    done = run(made, *arguments, "--json")
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_a_role_from_its_making_to_its_end(made: Scratch) -> None:
    first = as_json(made, "provision", "billing", "--stream", "a,b", "--produce", "c", "--expires", "30 days")
    assert set(first) == {"role", "password", "url"}
    assert made.execute("SELECT session_user::text", url=first["url"]) == [(first["role"],)]
    second = as_json(made, "rotate", "billing", "--overlap", "2h")
    assert second["role"] != first["role"]
    rows = as_json(made, "list")
    assert [(r["name"], r["kind"]) for r in rows if r["kind"] != "administrator"] == [("billing", "worker")] * 2
    assert [r["state"] for r in rows if r["name"] == "billing"] == ["live", "live"]
    shown = as_json(made, "show", "billing")
    assert (shown["consume"], shown["produce"], shown["max_live"]) == (["a", "b"], ["c"], 100_000)
    assert [login["login"] for login in shown["logins"]] == [first["role"], second["role"]]
    assert [event["action"] for event in shown["events"]] == ["rotated", "login", "login", "provisioned"]
    done = as_json(made, "revoke", "billing", "--yes")
    assert f"dropped the role {first['role']}" in done
    assert [r["kind"] for r in as_json(made, "list")] == ["administrator"]
    # What was done to it stays to be seen.
    assert as_json(made, "show", "billing")["events"][0]["action"] == "revoked"
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(second["url"])


def test_the_password_is_shown_once_and_only_on_stdout(made: Scratch) -> None:
    done = run(made, "provision", "billing", "--stream", "a")
    credential = dict(line.split() for line in done.stdout.splitlines() if line.strip())
    assert set(credential) == {"role", "password", "url"}
    assert credential["password"] in credential["url"]
    assert "shown once" in done.stderr
    assert credential["password"] not in done.stderr
    for arguments in (("list",), ("show", "billing"), ("list", "--json"), ("show", "billing", "--json")):
        output = run(made, *arguments).output
        assert credential["password"] not in output
        assert credential["role"] in output


def test_tables_for_people(made: Scratch) -> None:
    run(made, "provision", "pay", "--stream", "payments", "--kind", "activity", "--max-transaction", "none")
    run(made, "provision", "watch", "--kind", "monitor", "--expires", "2090-01-31")
    login, _ = made.login()
    run(made, "grant", login, "--consume", "x")
    output = run(made, "list").output
    for text in (
        "pay",
        "activity",
        "payments",
        "live",
        "monitor",
        "2090-01-31",
        "administrator",
        "every stream",
        login,
    ):
        assert text in output
    shown = run(made, "show", "pay").output
    for text in ("max statement", "30s", "provisioned", "kind activity", "payments"):
        assert text in shown
    assert "max transaction " not in shown
    assert "granted" in run(made, "show", login).output


def test_every_limit_can_be_given(made: Scratch) -> None:
    run(
        made, "provision", "p", "--produce", "out", "--kind", "producer", "--connection-limit", "3", "--max-live", "10",
        "--max-statement", "2s", "--max-transaction", "1m", "--expires", "2090-01-31T12:00Z",
    )  # fmt: skip
    shown = as_json(made, "show", "p")
    assert (shown["kind"], shown["max_live"], shown["max_statement"], shown["max_transaction"]) == (
        "producer",
        10,
        2,
        60,
    )
    (login,) = shown["logins"]
    assert login["connection_limit"] == 3
    assert login["expires_at"] == "2090-01-31T12:00:00+00:00"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("provision", "x"), "at least one stream"),
        (("provision", "", "--stream", "a"), "1 to 200 characters"),
        (("provision", "x", "--stream", "a", "--expires", "soon"), "expires: 'soon'"),
        (("provision", "x", "--stream", "a", "--connection-limit", "0"), "connection_limit is a whole number"),
        (("rotate", "x"), "there is no worker role 'x'"),
        (("rotate", "x", "--overlap", "long"), "overlap: 'long'"),
        (("revoke", "x", "--yes"), "there is no worker role 'x'"),
        (("show", "x"), "there is no role 'x'"),
    ],
)
def test_a_mistake_is_one_line(made: Scratch, arguments: tuple[str, ...], said: str) -> None:
    done = attempt(made, *arguments)
    assert done.exit_code == 1
    assert said in done.output
    assert done.output.count("\n") == 1


def test_a_mistake_on_the_command_line_is_a_mistake_in_its_use(made: Scratch) -> None:
    for arguments, said in (
        (("provision", "x", "--kind", "admin"), "'admin' is not one of"),
        (("provision", "x", "--stream", "a", "--expires", "2090-13-01"), "--expires 2090-13-01"),
        (("revoke", "x"), "add --yes"),
    ):
        done = attempt(made, *arguments)
        assert done.exit_code == 2
        assert said in done.output


def test_twice_is_refused(made: Scratch) -> None:
    run(made, "provision", "x", "--stream", "a")
    assert "there is a role 'x' already" in attempt(made, "provision", "x", "--stream", "a").output
    run(made, "revoke", "x", "--yes")
    assert attempt(made, "revoke", "x", "--yes").exit_code == 1


def test_rotating_with_no_overlap(made: Scratch) -> None:
    run(made, "provision", "x", "--stream", "a")
    second = as_json(made, "rotate", "x", "--overlap", "0")
    assert made.worker_roles() == [second["role"]]


def test_only_administrators_see_roles(made: Scratch) -> None:
    url = as_json(made, "provision", "x", "--stream", "a")["url"]
    for arguments in (("list",), ("show", "x"), ("provision", "y", "--stream", "a"), ("revoke", "x", "--yes")):
        assert attempt(url, *arguments).exit_code == 1
    assert len(made.worker_roles()) == 1


def test_a_grant_as_json(made: Scratch) -> None:
    login, _ = made.login()
    assert f"{login} may consume x" in as_json(made, "grant", login, "--consume", "x")
