"""``dramatiq-durable check``: each finding is provoked, and what it says mends it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner, Result

from dramatiq_durable import embedded
from dramatiq_durable.check import Finding, check, server_findings
from dramatiq_durable.cli import main
from dramatiq_durable.database import Database
from dramatiq_durable.migrate import migrate
from dramatiq_durable.roles import grant_login, names_of
from tests.support import unique_name
from tests.support.postgres import Cluster
from tests.support.scratch import Scratch, scratch


@pytest.fixture
def made(cluster: Cluster) -> Iterator[Scratch]:
    """A migrated database whose server's own settings are those of the test run."""
    with scratch(cluster) as made:
        migrate(made.url)
        yield made


def findings(url: str) -> list[Finding]:
    """Those of the namespace: the tests' server may be as fast and careless as it likes."""
    careless = {"fsync", "full_page_writes", "synchronous_commit", "max_connections"}
    return [finding for finding in check(url) if finding.name not in careless]


def one(url: str) -> Finding:
    (finding,) = findings(url)
    return finding


def run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--url", url, "check", *arguments])


def mended(made: Scratch, fix: str) -> None:
    """Do what a finding says, and find nothing any more."""
    for statement in fix.split("; "):
        if not statement.startswith(("and ", "dramatiq-durable")):
            made.execute(statement)
    migrate(made.url)
    assert findings(made.url) == []


def test_nothing_is_wrong_with_a_fresh_namespace(made: Scratch) -> None:
    assert findings(made.url) == []


# --- the server -----------------------------------------------------------------------------------------

GOOD = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "autovacuum": "on",
    "track_counts": "on",
    "max_connections": "100",
    "default_transaction_isolation": "read committed",
    "transaction_read_only": "off",
}


def test_a_good_server_gives_no_findings() -> None:
    assert list(server_findings(140000, GOOD)) == []
    assert list(server_findings(180004, GOOD)) == []


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("fsync", "off", "error"),
        ("full_page_writes", "off", "error"),
        ("synchronous_commit", "off", "error"),
        ("autovacuum", "off", "error"),
        ("track_counts", "off", "error"),
        ("default_transaction_isolation", "serializable", "error"),
        ("max_connections", "20", "warning"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: str, level: str) -> None:
    (finding,) = server_findings(150000, {**GOOD, name: value})
    assert (finding.name, finding.level) == (name, level)
    assert f"{name} is {value}" in finding.text
    assert finding.fix


def test_an_old_server_is_named() -> None:
    (finding,) = server_findings(130012, GOOD)
    assert finding.text == "the server is PostgreSQL 13"


def test_a_careless_server_is_found_out_and_mended_by_what_is_said(own_server: embedded.Server) -> None:
    migrate(own_server.url)
    bad = ("full_page_writes", "autovacuum", "track_counts")  # fsync the embedded server does not give away

    def named() -> list[str]:
        return [finding.name for finding in check(own_server.url) if finding.name in bad]

    def reload(*statements: str) -> None:
        with psycopg.connect(own_server.url, autocommit=True) as conn:
            for statement in statements:
                conn.execute(statement.encode())

    reload(*(f"ALTER SYSTEM SET {name} = off" for name in bad))
    own_server.restart()
    assert sorted(named()) == sorted(bad)
    done = run(own_server.url)
    assert done.exit_code == 1
    assert "error: full_page_writes is off: a page that was half written" in done.output
    for finding in check(own_server.url):
        if finding.name in bad:
            reload(*finding.fix.split("; "))
    own_server.restart()
    assert named() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("synchronous_commit", "off"), ("default_transaction_isolation", "'repeatable read'")],
)
def test_a_setting_of_the_database_is_seen(made: Scratch, name: str, value: str) -> None:
    made.execute(f"ALTER DATABASE {made.name} SET {name} = {value}")
    assert name in [finding.name for finding in check(made.url)]


def test_a_read_only_database_is_found(made: Scratch) -> None:
    made.execute(f"ALTER DATABASE {made.name} SET default_transaction_read_only = on")
    assert "read_only" in [finding.name for finding in check(made.url)]


# --- the connection --------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_a_finding_without_the_password() -> None:
    done = run("postgresql://me:secret@127.0.0.1:1/x")
    assert done.exit_code == 1
    assert done.output.startswith("error: cannot connect to me@127.0.0.1:1/x: ")
    assert done.output.endswith(". Fix: start the server, or correct DRAMATIQ_DURABLE_URL\n")
    assert done.output.count("\n") == 1
    assert "secret" not in done.output


def test_a_database_that_is_not_there_is_a_finding(made: Scratch) -> None:
    (finding,) = check(made.url.replace(made.name, unique_name("missing")))
    assert finding.name == "connection"
    assert "does not have this database" in finding.text


# --- the schema ------------------------------------------------------------------------------------------


def test_a_missing_namespace_is_found(cluster: Cluster) -> None:
    with cluster.database() as url:
        finding = one(url)
        assert finding == Finding(
            "error", "schema", "the database has no namespace 'durable'", "dramatiq-durable --namespace durable migrate"
        )


def test_a_foreign_schema_is_found(cluster: Cluster) -> None:
    with scratch(cluster) as empty:
        empty.execute("CREATE SCHEMA durable")
        assert "none of ours" in one(empty.url).text


def test_older_and_newer_migrations_are_found(made: Scratch) -> None:
    made.execute("INSERT INTO durable.migration (version, name) VALUES (9999, 'later')")
    assert "newer than this package's" in one(made.url).text
    # Nor does anything else lead to a `migrate`, or to one that would put the old procedures back.
    made.execute("ALTER FUNCTION durable.sweep(uuid) RENAME TO sweep_all")
    made.execute("UPDATE durable.procedures SET checksum = 'new'")
    assert one(made.url).fix == "upgrade dramatiq-durable"
    refused = CliRunner().invoke(main, ["--url", made.url, "migrate"])
    assert (refused.exit_code, "upgrade dramatiq-durable" in refused.output) == (1, True)
    assert made.execute("SELECT checksum FROM durable.procedures") == [("new",)]
    made.execute("ALTER FUNCTION durable.sweep_all(uuid) RENAME TO sweep")
    made.execute("DELETE FROM durable.migration WHERE version > 1")
    assert "at version 1, this package needs" in one(made.url).text


def test_other_procedures_are_found(made: Scratch) -> None:
    made.execute("UPDATE durable.procedures SET checksum = 'old'")
    finding = one(made.url)
    assert finding.name == "procedures"
    mended(made, finding.fix)


@pytest.mark.parametrize("name", ["claim", "schema_version", "open_streams"])
def test_a_missing_procedure_is_found(made: Scratch, name: str) -> None:
    (signature,) = made.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE proname = %s", name)[0]
    made.execute(f"DROP FUNCTION {signature}")
    finding = one(made.url)
    assert finding.text == f"the namespace lacks {name}"
    mended(made, finding.fix)


def test_a_procedure_that_is_open_to_all_is_found(made: Scratch) -> None:
    made.execute("GRANT EXECUTE ON FUNCTION durable.schema_version TO PUBLIC")
    finding = one(made.url)
    assert finding.text == "PUBLIC may execute durable.schema_version()"
    mended(made, finding.fix)


# --- roles and logins --------------------------------------------------------------------------------------


def grant(made: Scratch, login: str, *, admin: bool = False) -> None:
    database = Database(lambda: made.url)
    grant_login(database, login, admin=admin, consume=["default"])
    database.close()


def names(made: Scratch) -> tuple[str, str]:
    with psycopg.connect(made.url) as conn:
        found = names_of(conn, "durable")
    return found.owner, found.worker


def test_a_role_that_is_missing_is_found(made: Scratch) -> None:
    _, worker = names(made)
    made.execute(f'DROP OWNED BY "{worker}"; DROP ROLE "{worker}"')
    finding = one(made.url)
    assert f"role '{worker}' is missing" in finding.text
    mended(made, finding.fix)


def test_an_owner_that_can_log_in_is_found(made: Scratch) -> None:
    owner, _ = names(made)
    made.execute(f'ALTER ROLE "{owner}" LOGIN')
    found = {finding.name: finding for finding in findings(made.url)}
    assert set(found) == {"roles", "owner"}
    mended(made, found["roles"].fix)


def test_a_login_without_grants_is_told_how_to_get_them(made: Scratch) -> None:
    login, url = made.login()
    finding = one(url)
    assert finding.text == f"the login '{login}' has no grants in the namespace 'durable'"
    assert f"role grant {login}" in finding.fix
    # A member of the role that has no grants of its own yet is told the same.
    _, worker = names(made)
    made.execute(f'GRANT "{worker}" TO {login}')
    assert one(url).text == finding.text
    grant(made, login)
    assert findings(url) == []


def test_a_login_whose_grants_ran_out_is_told(made: Scratch) -> None:
    login, url = made.login()
    grant(made, login)
    made.execute("UPDATE durable.login SET expires_at = now() - interval '1 second' WHERE login = %s", login)
    assert one(url).name == "grants"


def test_a_login_that_lost_its_role_is_found(made: Scratch) -> None:
    login, _ = made.login()
    grant(made, login, admin=True)
    owner = names(made)[0]
    made.execute(f'SET ROLE "{owner}"; REVOKE "{owner.removesuffix("owner")}admin" FROM {login}')
    finding = one(made.url)
    assert f"'{login}' has grants, and is no member of" in finding.text
    mended(made, finding.fix)


def test_grants_of_a_login_that_is_gone_are_found(made: Scratch) -> None:
    made.execute(
        "INSERT INTO durable.login (login, principal_id) SELECT 'it''s gone', min(principal_id) FROM durable.principal"
    )
    finding = one(made.url)
    assert '"it\'s gone" has grants, and there is no such login' in finding.text
    mended(made, finding.fix)


def test_a_scoped_login_that_is_more_than_that_is_found(made: Scratch) -> None:
    login, _ = made.login()
    grant(made, login)
    made.execute(f'GRANT "{names(made)[0]}" TO {login}')
    found = {finding.name: finding for finding in findings(made.url)}
    assert f"'{login}' is a superuser or a member of" in found["login"].text


def test_a_namespace_without_roles_of_its_own_is_a_warning_to_others(cluster: Cluster) -> None:
    with scratch(cluster) as empty:
        login, url = empty.login()
        empty.execute(f"GRANT CREATE ON DATABASE {empty.name} TO {login}")
        migrate(url)
        assert findings(url) == []
        finding = one(empty.url)
        assert (finding.level, finding.name) == ("warning", "owner")


def test_shared_locks_are_a_warning_as_soon_as_there_are_scoped_workers(made: Scratch) -> None:
    administrator, _ = made.login()
    grant(made, administrator, admin=True)
    assert findings(made.url) == []
    login, url = made.login()
    grant(made, login)
    for finding in findings(made.url):
        if finding.name in ("temporary", "temp_file_limit", "wal", "create"):
            made.execute(finding.fix.removesuffix(", as a superuser"))
    finding = one(made.url)
    assert (finding.level, finding.name) == ("warning", "shared_locks")
    assert "pg_catalog.pg_advisory_lock(bigint)" in finding.fix
    assert "pg_catalog.lo_create(oid)" in finding.fix

    careless = any(other.level == "error" for other in check(made.url))  # the tests' server itself
    assert run(made.url).exit_code == int(careless)
    strict = run(made.url, "--strict")
    assert strict.exit_code == 1
    assert "warning: PUBLIC may execute" in strict.output

    mended(made, finding.fix)
    for statement in ("SELECT pg_advisory_lock(1)", "SELECT pg_try_advisory_xact_lock(1, 2)", "SELECT lo_create(0)"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            made.execute(statement, url=url)


def test_json_has_every_finding(made: Scratch) -> None:
    made.execute("UPDATE durable.procedures SET checksum = 'old'")
    done = run(made.url, "--json")
    assert done.exit_code == 1
    found = {finding["name"]: finding for finding in json.loads(done.output)}
    assert found["procedures"]["level"] == "error"
    assert set(found["procedures"]) == {"level", "name", "text", "fix"}
