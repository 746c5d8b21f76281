"""What `check` says of a database that has scoped workers, and that what it says mends it."""

from __future__ import annotations

from click.testing import CliRunner

from dramatiq_durable.check import Finding
from dramatiq_durable.cli import main
from dramatiq_durable.database import Database
from dramatiq_durable.watchdog import Watchdog
from tests.sql.api import Session
from tests.test_cli_check import findings

from .conftest import Grant, Limited


def names(url: str) -> set[str]:
    return {finding.name for finding in findings(url)}


def found(url: str, name: str) -> Finding:
    return next(finding for finding in findings(url) if finding.name == name)


def look(url: str) -> None:
    database = Database(lambda: url, "durable")
    watchdog = Watchdog(database)
    watchdog.look()
    watchdog.close()
    database.close()


def strict(url: str) -> str:
    return CliRunner().invoke(main, ["--url", url, "check", "--strict"]).output


def test_without_scoped_logins_nothing_is_said(database_url: str) -> None:
    assert names(database_url) == set()
    assert "warning" not in strict(database_url)


def test_without_provisioned_logins_nobody_need_watch(database_url: str, grant: Grant) -> None:
    grant(consume=("s",))
    assert "watchdog" not in names(database_url)


def test_everything_is_mended_by_what_is_said(db: Session, database_url: str, limited: Limited) -> None:
    session = limited(consume=("s",), max_live=5)
    # As servers before 15 have it.
    db.sql("GRANT CREATE ON SCHEMA public TO PUBLIC")
    assert names(database_url) == {"shared_locks", "temporary", "temp_file_limit", "wal", "create", "watchdog"}
    done = CliRunner().invoke(main, ["--url", database_url, "check", "--strict"])
    assert done.exit_code == 1
    assert all(f"REVOKE {what}" in done.output for what in ("EXECUTE ON FUNCTION", "TEMPORARY", "CREATE"))
    session.sql("CREATE TEMP TABLE t (x int)")
    for name in ("shared_locks", "temporary", "temp_file_limit", "wal", "create"):
        for statement in found(database_url, name).fix.removesuffix(", as a superuser").split("; "):
            db.sql(statement)
    assert names(database_url) == {"watchdog"}
    assert "has ever looked" in found(database_url, "watchdog").text
    look(database_url)
    assert findings(database_url) == []
    assert "warning" not in strict(database_url)
    # Administrators who own nothing see nothing of the tables: a namespace's owner has to check it.
    db.sql("UPDATE durable.watchdog SET looked_at = now() - interval '11 seconds'")
    assert "no watchdog has looked for 11 s" in found(database_url, "watchdog").text


def test_a_login_whose_sessions_cannot_be_ended(db: Session, database_url: str, limited: Limited) -> None:
    session = limited()
    look(database_url)
    owner = db.value("SELECT owner::text FROM durable.roles")
    db.sql(f'REVOKE "{session.login}" FROM "{owner}"')
    finding = found(database_url, "watchdog")
    assert session.login in finding.text
    db.sql(finding.fix)
    assert "watchdog" not in names(database_url)


def test_limits_that_bind_nobody(db: Session, database_url: str, grant: Grant) -> None:
    session = grant(consume=("s",))
    db.sql("UPDATE durable.principal SET max_live = 5 WHERE name = %s", session.login)
    assert session.login in found(database_url, "limits").text
