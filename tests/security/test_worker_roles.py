"""Roles that are provisioned: their passwords, names, ends and limits, and what revoking does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
from psycopg import sql

import dramatiq_durable as durable
from dramatiq_durable import embedded
from dramatiq_durable.database import Database
from dramatiq_durable.migrate import migrate
from dramatiq_durable.roles import grant_login
from dramatiq_durable.worker_logins import credential_url, stem_of
from dramatiq_durable.worker_roles import check_worker_name, list_roles, provision, revoke
from tests.sql.api import Session
from tests.support import unique_name, wait_until
from tests.support.postgres import Cluster, with_database
from tests.support.scratch import Scratch, scratch

from .scene import refusal


@pytest.fixture
def made(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as made:
        yield made


@pytest.fixture
def sessions() -> Iterator[Callable[[str], Session]]:
    opened: list[Session] = []

    def open_session(url: str) -> Session:
        opened.append(Session(url))
        return opened[-1]

    yield open_session
    for session in opened:
        session.close()


def make(made: Scratch | str, name: str = "billing", **options: Any) -> durable.Credential:
    url = made if isinstance(made, str) else made.url
    return durable.provision_worker_role(url, name=name, **({"streams": ["mine"]} | options))


def role(made: Scratch, name: str = "billing") -> durable.WorkerRole:
    (found,) = (r for r in durable.list_worker_roles(url=made.url) if r.name == name)
    return found


def snapshot(made: Scratch) -> list[Any]:
    tables = ("principal", "login", "stream", "stream_grant", "role_event")
    return [made.execute(f"SELECT * FROM durable.{table} ORDER BY 1") for table in tables] + [made.worker_roles()]


# --- what is made -------------------------------------------------------------------------------------------


def test_a_role_can_do_its_streams_work_and_has_no_powers(made: Scratch, sessions: Callable[[str], Session]) -> None:
    made_ = make(made, streams=["mine"], produce=["mine", "out"], connection_limit=7)
    facts = made.execute(
        "SELECT rolcanlogin, rolinherit, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls, "
        "rolconnlimit, rolvaliduntil = 'infinity', "
        "(SELECT array_agg(m.roleid::regrole::text) FROM pg_auth_members m WHERE m.member = r.oid) "
        "FROM pg_roles r WHERE rolname = %s",
        made_.role,
    )[0]
    ((worker, owner),) = made.execute("SELECT worker::text, owner::text FROM durable.roles")
    assert facts == (True, True, False, False, False, False, False, 7, True, [f'"{worker}"'])
    session = sessions(made_.url)
    mine, out = session.stream("mine"), session.stream("out")
    assert session.enqueue([mine, out], b"1", b"2") == [1, 1]
    worker_ = session.register(mine)
    assert worker_.ack(worker_.one()) == []
    assert refusal(lambda: session.stream("theirs"))[1] == "DD001"
    for statement in (f'SET ROLE "{owner}"', "SELECT * FROM durable.login", "CREATE TABLE durable.t (x int)"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.sql(statement)
    found = role(made)
    assert (found.kind, found.streams, found.produce) == ("worker", ("mine",), ("mine", "out"))
    assert (found.max_live, found.max_statement, found.max_transaction) == (100_000, 30, 10)
    assert [(login.role, login.expires_at, login.connection_limit) for login in found.logins] == [(made_.role, None, 7)]
    assert made.execute("SHOW statement_timeout", url=made_.url) == [("30s",)]
    assert made.execute("SHOW idle_in_transaction_session_timeout", url=made_.url) == [("10s",)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("worker", {"streams": ["a"]}),
        ("activity", {"streams": ["a"], "produce": ["b"]}),
        ("workflow", {"streams": ["a"]}),
        ("producer", {"streams": [], "produce": ["b"]}),
        ("monitor", {"streams": []}),
    ],
)
def test_every_kind(made: Scratch, kind: str, options: dict[str, Any]) -> None:
    make(made, kind=kind, **options)
    found = role(made)
    assert found.kind == kind
    assert found.max_live == (None if kind == "monitor" else 100_000)


def test_the_password_is_a_scram_verifiers(made: Scratch) -> None:
    credential = make(made)
    ((stored,),) = made.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", credential.role)
    kind, rounds_salt, keys = str(stored).split("$")
    rounds, salt = rounds_salt.split(":")
    assert kind == "SCRAM-SHA-256"
    salted = hashlib.pbkdf2_hmac("sha256", credential.password.encode(), base64.b64decode(salt), int(rounds))
    key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    assert keys.split(":")[0] == base64.b64encode(key).decode()
    assert len(credential.password) >= 43


def test_a_credential_does_not_show_its_password(made: Scratch) -> None:
    credential = make(made)
    for text in (repr(credential), str(credential), f"{credential}", repr([credential])):
        assert credential.role in text
        assert credential.password not in text
        assert "postgresql://" not in text
    assert credential.password in credential.url


@pytest.fixture
def strict(instance_directory: Path) -> Iterator[tuple[str, Path]]:
    """A server that logs every statement and asks logins other than the superuser for passwords."""
    with embedded.acquire(instance_directory) as server:
        data = instance_directory / "data"
        with psycopg.connect(server.url, autocommit=True) as conn:
            hba = Path(str(conn.execute("SHOW hba_file").fetchone()[0]))  # type: ignore[index]
            hba.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
            for setting, value in (
                ("log_statement", "all"),
                ("log_min_duration_statement", "0"),
                ("log_connections", "on"),
            ):
                conn.execute(f"ALTER SYSTEM SET {setting} = '{value}'".encode())
            conn.execute("SELECT pg_reload_conf()")
            wait_until(lambda: conn.execute("SHOW log_statement").fetchone() == ("all",))
        migrate(server.url)
        yield server.url, data.parent


def test_no_password_is_in_any_log_and_only_the_right_one_lets_in(strict: tuple[str, Path]) -> None:
    url, directory = strict
    first = make(url, expires="1 hour", connection_limit=2)
    second = durable.rotate_worker_role("billing", "1h", url=url)
    for credential in (first, second):
        with psycopg.connect(credential.url) as conn:
            assert conn.execute("SELECT session_user::text").fetchone() == (credential.role,)
        wrong = credential.url.replace(credential.password, "x" * 43)
        with pytest.raises(psycopg.OperationalError, match="authentication failed"):
            psycopg.connect(wrong)
    with psycopg.connect(second.url), psycopg.connect(second.url):
        with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
            psycopg.connect(second.url)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("CHECKPOINT")
        conn.execute(f"ALTER ROLE {first.role} VALID UNTIL '2020-01-01'".encode())
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        psycopg.connect(first.url)
    durable.revoke_worker_role("billing", url=url)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(second.url)
    seen = b""
    for path in directory.rglob("*"):
        if path.is_file():
            seen += (content := path.read_bytes()) if "log" in path.name else b""
            content = path.read_bytes()
            for credential in (first, second):
                assert credential.password.encode() not in content, path
    assert b"CREATE ROLE" in seen, "the log was not read"


def test_a_login_ends_when_it_was_said_to(made: Scratch, sessions: Callable[[str], Session]) -> None:
    until = datetime.now(UTC) + timedelta(days=3)
    make(made, "dated", expires=until)
    credential = make(made, "short", expires="1 second")
    assert role(made, "dated").logins[0].expires_at == until
    ((valid, login),) = made.execute(
        "SELECT r.rolvaliduntil, l.expires_at FROM pg_roles r JOIN durable.login l ON l.login = r.rolname "
        "WHERE l.login = %s",
        credential.role,
    )
    assert valid == login
    session = sessions(credential.url)
    wait_until(lambda: refusal(lambda: session.stream("mine"))[1] == "DD001", message="the end of the login")
    assert role(made, "short").logins[0].state == "expired"


def test_a_connection_limit_is_kept(made: Scratch, sessions: Callable[[str], Session]) -> None:
    credential = make(made, connection_limit=2)
    sessions(credential.url), sessions(credential.url)
    with pytest.raises(psycopg.OperationalError, match="too many connections"):
        sessions(credential.url)
    assert role(made).logins[0].sessions == 2


# --- names ----------------------------------------------------------------------------------------------------


def test_names_that_are_cut_off_or_alike_get_roles_of_their_own(made: Scratch) -> None:
    long = "a" * 150
    names = [
        long + "1",
        long + "2",
        "a b",
        "a_b",
        "A B",
        "ä",
        "ö",
        "日本",
        "'; DROP ROLE x --",
        '"',
        "%s",
        "{owner}",
        "\\",
    ]
    roles = {make(made, name).role for name in names}
    assert len(roles) == len(names)
    assert all(len(r.encode()) <= 63 for r in roles)
    assert {r.name for r in durable.list_worker_roles(url=made.url)} == set(names)
    for name in names:
        durable.revoke_worker_role(name, url=made.url)
    assert made.worker_roles() == []


def test_two_namespaces_and_two_databases_do_not_share_roles() -> None:
    places = [("a", "b", "c"), ("a", "b_c", ""), ("a_b", "c", ""), ("ab", "c", ""), ("a", "bc", "")]
    assert len({stem_of(*place) for place in places}) == len(places)


#: What names are made of: letters of all sorts, quotes, controls, what cannot be printed, halves of surrogate pairs.
PIECES = [
    "a", "Z", "0", "_", "-", ".", " ", "  ", "'", '"', "\\", "%", "$", ";", "--", "/*", "\n", "\t", "\0", "\x1b[2J",
    "ä", "ß", "日本", "\U0001f600", "\u202e", "\u200b", "\ud800", "dd_", "_owner", "pg_", "public", "x" * 40, "é" * 30,
    "{schema}",
]  # fmt: skip


def test_a_thousand_fuzzed_names(made: Scratch) -> None:
    """Each is refused at once, or makes a role of its own; and what is refused makes nothing."""
    rng = random.Random("names")
    database = Database(lambda: made.url)
    given: dict[str, str] = {}
    stems: dict[str, str] = {}
    real = 0
    for n in range(1000):
        name = "".join(rng.choices(PIECES, k=rng.randint(0, 6)))
        try:
            check_worker_name(name)
        except durable.InvalidName:
            with pytest.raises(durable.InvalidName) as raised:
                make(made, name)
            assert str(raised.value).isprintable()
            continue
        stem = stem_of(made.name, "durable", name)
        assert stems.setdefault(stem, name) == name
        assert stem.isascii()
        if n % 6 or name in given:
            continue
        real += 1
        given[name] = provision(
            database, name=name, streams=["s"], produce=[], kind="worker", expires=None, connection_limit=None,
            max_live=None, max_statement=30, max_transaction=10,
        ).role  # fmt: skip
    assert real > 20
    assert len(set(given.values())) == len(given)
    assert sorted(made.worker_roles()) == sorted(given.values())
    assert {r.name: r.logins[0].role for r in list_roles(database)} == given
    for name in given:
        revoke(database, name)
    database.close()
    assert made.worker_roles() == []
    assert made.execute("SELECT count(*) FROM durable.principal") == [(1,)]


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"name": ""}, durable.InvalidName, "1 to 200 characters"),
        ({"name": "x" * 201}, durable.InvalidName, "1 to 200 characters"),
        ({"name": " x"}, durable.InvalidName, "no blank"),
        ({"name": "a\nb"}, durable.InvalidName, "can be printed"),
        ({"name": None}, durable.InvalidName, "NoneType"),
        ({"kind": "admin"}, durable.InvalidRole, "kind is one of worker, activity"),
        ({"streams": []}, durable.InvalidRole, "at least one stream"),
        ({"streams": "mine"}, durable.InvalidRole, "write \\['mine'\\]"),
        ({"kind": "producer"}, durable.InvalidRole, "consumes no stream"),
        ({"kind": "producer", "streams": []}, durable.InvalidRole, "sends to at least one"),
        ({"kind": "monitor"}, durable.InvalidRole, "consumes no stream"),
        ({"kind": "monitor", "streams": [], "produce": ["x"]}, durable.InvalidRole, "sends to no stream"),
        ({"streams": ["a b"]}, durable.InvalidName, "no queue name"),
        ({"produce": [""]}, durable.InvalidName, "1 to 200"),
        ({"expires": "soon"}, durable.InvalidRole, "expires: 'soon'"),
        ({"expires": -1}, durable.InvalidRole, "negative"),
        ({"expires": 0}, durable.InvalidRole, "between a second"),
        ({"expires": "200000 days"}, durable.InvalidRole, "a hundred years"),
        ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, durable.InvalidRole, "is over already"),
        ({"expires": datetime(9999, 1, 1, tzinfo=UTC)}, durable.InvalidRole, "more than a hundred years"),
        ({"expires": datetime(2090, 1, 1)}, durable.InvalidRole, "no time zone"),
        ({"connection_limit": 0}, durable.InvalidRole, "connection_limit is a whole number"),
        ({"connection_limit": True}, durable.InvalidRole, "connection_limit is a whole number"),
        ({"max_live": 2**31}, durable.InvalidRole, "max_live is a whole number"),
        ({"max_statement": 0}, durable.InvalidRole, "max_statement is between"),
        ({"max_transaction": "long"}, durable.InvalidRole, "max_transaction: 'long'"),
        ({"namespace": "No"}, durable.InvalidName, "cannot be a namespace"),
        ({"namespace": "other"}, durable.NotConfigured, "has no namespace 'other'"),
    ],
)
def test_what_makes_no_sense_is_refused_and_makes_nothing(
    made: Scratch, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    before = snapshot(made)
    with pytest.raises(error, match=said):
        make(made, **({"name": "billing"} | options))
    assert snapshot(made) == before


def test_a_name_is_given_once(made: Scratch) -> None:
    make(made)
    (admin,) = made.execute("SELECT name FROM durable.principal WHERE is_admin")[0]
    before = snapshot(made)
    for name in ("billing", str(admin)):
        with pytest.raises(durable.RoleExists, match="choose another name"):
            make(made, name)
    assert snapshot(made) == before


def test_of_two_at_once_one_makes_it(made: Scratch) -> None:
    outcomes: list[Any] = []

    def attempt() -> None:
        try:
            outcomes.append(make(made).role)
        except durable.RoleExists:
            outcomes.append(None)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(o is None for o in outcomes) == [False, True, True, True]
    assert len(made.worker_roles()) == 1


def test_nobody_is_unknown(made: Scratch) -> None:
    before = snapshot(made)
    for call in (durable.rotate_worker_role, durable.revoke_worker_role):
        with pytest.raises(durable.RoleNotFound, match="there is no worker role 'nobody'"):
            call("nobody", url=made.url)
    with pytest.raises(durable.InvalidRole, match="overlap"):
        durable.rotate_worker_role("nobody", "soon", url=made.url)
    assert snapshot(made) == before


def test_without_a_url_it_is_the_environments_or_the_global_brokers(
    made: Scratch, clean_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_environment()
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    with pytest.raises(durable.NotConfigured, match="DRAMATIQ_DURABLE_URL"):
        durable.provision_worker_role(name="billing", streams=["a"])
    clean_environment(URL=made.url)
    durable.provision_worker_role(name="billing", streams=["a"])
    durable.rotate_worker_role("billing")
    assert len(durable.list_worker_roles()) == 1
    durable.revoke_worker_role("billing")
    clean_environment()
    broker = durable.DurableBroker(made.url)
    monkeypatch.setattr(dramatiq.broker, "global_broker", broker)
    durable.provision_worker_role(name="shipping", streams=["a"])
    assert [role.name for role in durable.list_worker_roles()] == ["shipping"]
    durable.revoke_worker_role("shipping")
    broker.close()


# --- who may provision ------------------------------------------------------------------------------------------


@pytest.fixture
def humble(cluster: Cluster) -> Iterator[tuple[Scratch, str, str]]:
    """A database that a mere CREATEROLE login has migrated."""
    with scratch(cluster) as made:
        login, url = made.login("CREATEROLE")
        made.execute(f'GRANT CREATE ON DATABASE "{made.name}" TO {login}')
        migrate(url)
        yield made, login, url


def test_a_login_that_may_create_roles_and_migrated_is_enough(
    humble: tuple[Scratch, str, str], sessions: Callable[[str], Session]
) -> None:
    made, _, url = humble
    credential = make(url, expires="1 day", connection_limit=9)
    session = sessions(credential.url)
    assert session.stream("mine")
    second = durable.rotate_worker_role("billing", "1h", url=url)
    assert sessions(second.url).stream("mine") == session.stream("mine")
    (found,) = durable.list_worker_roles(url=url)
    assert [login.sessions for login in found.logins] == [1, 1]
    done = durable.revoke_worker_role("billing", url=url)
    assert "2 sessions were ended" in done
    assert made.worker_roles() == []


def test_a_login_that_may_create_roles_and_did_not_migrate_is_told_what_it_lacks(
    humble: tuple[Scratch, str, str],
) -> None:
    made, _, url = humble
    make(url)
    other, other_url = made.login("CREATEROLE")
    calls: list[Callable[[], Any]] = [
        lambda: make(other_url, "another"),
        lambda: durable.rotate_worker_role("billing", url=other_url),
        lambda: durable.revoke_worker_role("billing", url=other_url),
    ]
    before = snapshot(made)
    ((owner,),) = made.execute("SELECT owner::text FROM durable.roles")
    for call in calls:
        with pytest.raises(durable.NotPermitted) as raised:
            call()
        assert f'GRANT "{owner}" TO "{other}"' in str(raised.value)
        assert f"role grant {other} --admin" in str(raised.value)
        assert "CREATEROLE" not in str(raised.value)
    grant = Database(lambda: url)
    made.execute(f'GRANT "{owner}" TO {other}')
    with pytest.raises(durable.NotPermitted, match=f"role grant {other} --admin"):
        make(other_url, "another")
    grant_login(grant, other, admin=True)
    grant.close()
    make(other_url, "another")
    # Roles belong to their makers where the server is new enough.
    if int(str(made.execute("SHOW server_version_num")[0][0])) >= 160000:
        with pytest.raises(durable.NotPermitted, match="WITH ADMIN OPTION"):
            durable.revoke_worker_role("billing", url=other_url)
    durable.revoke_worker_role("another", url=other_url)
    durable.revoke_worker_role("billing", url=url)
    assert before != snapshot(made)


def test_an_administrator_who_may_not_create_roles_is_told(made: Scratch) -> None:
    login, url = made.login()
    with pytest.raises(durable.NotPermitted, match=f'ALTER ROLE "{login}" CREATEROLE'):
        make(url)
    database = Database(lambda: made.url)
    grant_login(database, login, admin=True)
    database.close()
    with pytest.raises(durable.NotPermitted, match=f'ALTER ROLE "{login}" CREATEROLE'):
        make(url)
    assert durable.list_worker_roles(url=url) == []


def test_a_scoped_worker_cannot_make_or_change_roles(made: Scratch) -> None:
    credential = make(made)
    before = snapshot(made)
    for call in (
        lambda: make(credential.url, "more"),
        lambda: durable.rotate_worker_role("billing", url=credential.url),
        lambda: durable.revoke_worker_role("billing", url=credential.url),
        lambda: durable.list_worker_roles(url=credential.url),
    ):
        with pytest.raises(durable.NotPermitted):
            call()
    assert snapshot(made) == before


def test_a_namespace_without_roles_of_its_own_has_no_scoped_workers(cluster: Cluster) -> None:
    with scratch(cluster) as made:
        login, url = made.login()
        made.execute(f'GRANT CREATE ON DATABASE "{made.name}" TO {login}')
        migrate(url)
        with pytest.raises(durable.NotConfigured, match="no roles of its own"):
            make(url)


def test_a_database_that_lets_nobody_in_is_said(made: Scratch) -> None:
    made.execute(f'REVOKE CONNECT ON DATABASE "{made.name}" FROM PUBLIC')
    before = snapshot(made)
    with pytest.raises(durable.NotConfigured, match="GRANT CONNECT ON DATABASE"):
        make(made)
    assert snapshot(made) == before


# --- rotation ---------------------------------------------------------------------------------------------------


def test_the_old_login_lives_on_beside_the_new_one(made: Scratch, sessions: Callable[[str], Session]) -> None:
    first = make(made, produce=["mine"], expires="30 days", connection_limit=4, max_statement="7s")
    old = sessions(first.url)
    stream = old.stream("mine")
    old.enqueue(stream, b"1", b"2", b"3")
    worker = old.register(stream)
    (held,) = worker.claim(1)
    second = durable.rotate_worker_role("billing", "1 hour", url=made.url)
    assert second.role != first.role
    assert second.password != first.password
    # What the old one's worker holds is its own, and it goes on.
    assert worker.ack(held) == []
    (kept,) = worker.claim(1)
    new = sessions(second.url)
    other = new.register(stream)
    (taken,) = other.claim(1)
    assert taken.message_id not in (held.message_id, kept.message_id)
    # The token of one is not the other's.
    assert refusal(lambda: other.over(old).claim())[1] == "DD002"
    assert other.ack(kept) == [1]
    found = role(made)
    assert [login.role for login in found.logins] == [first.role, second.role]
    ends = [login.expires_at for login in found.logins]
    assert ends[0] is not None
    assert ends[1] is not None
    assert timedelta(minutes=59) < ends[0] - datetime.now(UTC) < timedelta(minutes=61)
    assert timedelta(days=29) < ends[1] - datetime.now(UTC) < timedelta(days=31)
    assert {login.connection_limit for login in found.logins} == {4}
    assert made.execute("SHOW statement_timeout", url=second.url) == [("7s",)]
    assert made.execute("SELECT rolvaliduntil FROM pg_roles WHERE rolname = %s", first.role) == [(ends[0],)]
    # Its time is over: it is refused; the next rotation drops it.
    made.execute("UPDATE durable.login SET expires_at = clock_timestamp() WHERE login = %s", first.role)
    assert refusal(lambda: old.stream("mine"))[1] == "DD001"
    assert refusal(worker.claim)[1] == "DD002"
    third = durable.rotate_worker_role("billing", url=made.url)
    assert made.worker_roles() == sorted([second.role, third.role])
    with pytest.raises(psycopg.OperationalError):
        old.sql("SELECT 1")
    assert other.ack(taken) == []


def test_rotating_without_overlap_ends_the_old_one_at_once(made: Scratch, sessions: Callable[[str], Session]) -> None:
    first = make(made, produce=["mine"])
    old = sessions(first.url)
    stream = old.stream("mine")
    old.enqueue(stream, b"1")
    held = old.register(stream).one()
    second = durable.rotate_worker_role("billing", 0, url=made.url)
    with pytest.raises(psycopg.OperationalError):
        old.sql("SELECT 1")
    assert made.worker_roles() == [second.role]
    assert sessions(second.url).register(stream).one().message_id == held.message_id


# --- revoking ---------------------------------------------------------------------------------------------------


def test_revoking_ends_sessions_within_a_second_and_hands_on_what_they_held(
    made: Scratch, sessions: Callable[[str], Session]
) -> None:
    credential = make(made, produce=["mine"])
    second = durable.rotate_worker_role("billing", url=made.url)
    admin = sessions(made.url)
    live = [sessions(credential.url), sessions(second.url), sessions(second.url)]
    stream = live[0].stream("mine")
    live[0].enqueue(stream, b"1", b"2", b"3", b"4")
    held = [*live[0].register(stream).claim(1), *live[1].register(stream).claim(1)]
    # One in a transaction that holds locks, one in the middle of a statement.
    live[1].begin()
    locked = live[1].register(stream)
    held += locked.claim(1)
    failures: list[str | None] = []
    ended: list[datetime] = []

    def sleep() -> None:
        try:
            live[2].sql("SELECT pg_sleep(30)")
        except psycopg.Error as e:
            failures.append(e.sqlstate)
            ended.append(datetime.now(UTC))

    thread = threading.Thread(target=sleep)
    thread.start()
    wait_until(
        lambda: admin.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND pid = %s", live[2].pid)
    )
    done = durable.revoke_worker_role("billing", url=made.url)
    thread.join()
    assert failures == ["57P01"]
    # From the loss of its rights on.
    ((revoked,),) = made.execute("SELECT at FROM durable.role_event WHERE action = 'revoked'")
    assert isinstance(revoked, datetime)
    assert ended[0] - revoked < timedelta(seconds=1)
    for session in live:
        with pytest.raises(psycopg.OperationalError):
            session.sql("SELECT 1")
    for gone in (credential, second):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(gone.url)
    # At once, without waiting for any reclaim_delay; and nobody is dead of it.
    taken = admin.register(stream, delay=60_000).claim()
    assert {c.message_id for c in held} <= {c.message_id for c in taken}
    assert len(taken) == 4
    assert made.execute("SELECT max(deaths) FROM durable.message") == [(0,)]
    assert made.worker_roles() == []
    assert made.execute("SELECT count(*) FROM durable.worker WHERE login LIKE 'dd_%'") == [(0,)]
    assert durable.list_worker_roles(url=made.url) == []
    assert "3 sessions were ended" in done
    # The name is free again, and no role's name comes twice.
    assert make(made).role not in (credential.role, second.role)


def test_what_an_interrupted_revocation_left_the_next_one_ends(
    made: Scratch, sessions: Callable[[str], Session]
) -> None:
    credential = make(made, produce=["mine"])
    session = sessions(credential.url)
    stream = session.stream("mine")
    session.enqueue(stream, b"1")
    worker = session.register(stream)
    worker.one()
    made.execute("SELECT durable.disable_worker('billing')")
    # Its sessions live, and may do nothing.
    assert refusal(lambda: session.stream("mine"))[1] == "DD001"
    assert refusal(worker.claim)[1] == "DD002"
    assert refusal(lambda: session.enqueue_one(stream)) == ("answer", -1)
    durable.revoke_worker_role("billing", url=made.url)
    assert made.worker_roles() == []


def test_only_what_was_provisioned_is_revoked(made: Scratch) -> None:
    login, _ = made.login()
    database = Database(lambda: made.url)
    grant_login(database, login, consume=["mine"])
    database.close()
    (admin,) = made.execute("SELECT name FROM durable.principal WHERE is_admin")[0]
    before = snapshot(made)
    for name in (login, str(admin)):
        for call in (durable.rotate_worker_role, durable.revoke_worker_role):
            with pytest.raises(durable.NotPermitted, match="was not provisioned"):
                call(name, url=made.url)
    assert snapshot(made) == before
    assert made.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", login) == [(True,)]


def test_a_role_that_somebody_made_anew_is_left_alone(made: Scratch) -> None:
    credential = make(made)
    made.execute(f'DROP ROLE "{credential.role}"')
    made.execute(f'CREATE ROLE "{credential.role}" LOGIN')
    made.logins.append(credential.role)
    before = snapshot(made)
    for call in (durable.rotate_worker_role, durable.revoke_worker_role):
        with pytest.raises(durable.NotPermitted, match="none that was provisioned here"):
            call("billing", url=made.url)
    assert snapshot(made) == before
    assert made.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", credential.role) == [(True,)]


def test_a_copy_of_the_database_has_no_power_over_the_roles(made: Scratch, cluster: Cluster) -> None:
    credential = make(made)
    with cluster.database(made.name) as copy:
        for call in (durable.rotate_worker_role, durable.revoke_worker_role):
            with pytest.raises(durable.NotPermitted, match="this database is a copy"):
                call("billing", url=copy)
    assert made.worker_roles() == [credential.role]


def test_a_role_that_somebody_dropped_is_forgotten(made: Scratch) -> None:
    credential = make(made)
    made.execute(f'DROP ROLE "{credential.role}"')
    assert role(made).logins[0].state == "missing"
    durable.revoke_worker_role("billing", url=made.url)
    assert durable.list_worker_roles(url=made.url) == []


def test_a_role_that_something_depends_on_is_left_without_rights(made: Scratch) -> None:
    credential = make(made)
    made.execute("CREATE TABLE public.orders (x int)")
    made.execute(f'GRANT SELECT ON public.orders TO "{credential.role}"')
    done = durable.revoke_worker_role("billing", url=made.url)
    assert any("privileges for table orders" in line and credential.role in line for line in done)
    assert made.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", credential.role) == [(False,)]
    members = "SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = %s"
    assert made.execute(members, credential.role) == [(0,)]
    assert durable.list_worker_roles(url=made.url) == []
    again = make(made)
    assert again.role != credential.role
    made.execute("DROP TABLE public.orders")


def test_a_worker_is_granted_nothing_by_hand(made: Scratch) -> None:
    credential = make(made)
    plain, _ = made.login()
    make(made, plain)
    database = Database(lambda: made.url)
    before = snapshot(made)
    for login in (credential.role, plain):
        with pytest.raises(durable.NotPermitted, match="belongs to a worker that was provisioned"):
            grant_login(database, login, consume=["theirs"])
    database.close()
    assert snapshot(made) == before


# --- what is written down -----------------------------------------------------------------------------------------


def test_everything_that_is_done_is_written_down_and_no_secret(made: Scratch) -> None:
    login, _ = made.login()
    database = Database(lambda: made.url)
    grant_login(database, login, consume=["mine"], produce=["out"])
    database.close()
    first = make(made, produce=["out"], expires="1 day")
    second = durable.rotate_worker_role("billing", "2h", url=made.url)
    durable.revoke_worker_role("billing", url=made.url)
    rows = made.execute(
        "SELECT by::text, action, principal, login::text, details::text FROM durable.role_event ORDER BY role_event_id"
    )
    ((superuser,),) = made.execute("SELECT session_user::text")
    assert {row[0] for row in rows} == {superuser}
    assert [row[1:4] for row in rows] == [
        ("granted", login, login),
        ("provisioned", "billing", None),
        ("login", "billing", first.role),
        ("login", "billing", second.role),
        ("rotated", "billing", second.role),
        ("revoked", "billing", None),
    ]
    assert '"kind":"worker"' in str(rows[1][4]).replace(" ", "")
    for secret in (first.password, second.password, "SCRAM"):
        assert secret not in repr(rows)
        assert secret not in repr([made.execute(f"SELECT * FROM durable.{t}") for t in ("login", "principal")])


def test_what_was_refused_is_not_written_down(made: Scratch) -> None:
    with pytest.raises(durable.NotPermitted):
        durable.revoke_worker_role(str(made.execute("SELECT name FROM durable.principal")[0][0]), url=made.url)
    assert made.execute("SELECT count(*) FROM durable.role_event") == [(0,)]


# --- the URL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgresql://u:p@h:5433/db", "postgresql://r:s%2Fe@h:5433/data%20base"),
        ("postgresql://u@h/db?sslmode=verify-full&sslkey=k&sslcert=c&application_name=x",
         "postgresql://r:s%2Fe@h/data%20base?sslmode=verify-full"),
        ("postgresql://u@/db?host=/run/pg&port=5433", "postgresql://r:s%2Fe@/data%20base?host=%2Frun%2Fpg&port=5433"),
        ("postgresql://u@a:1,b:2/db", "postgresql://r:s%2Fe@/data%20base?host=a%2Cb&port=1%2C2"),
        ("postgresql://u@[::1]:5433/db", "postgresql://r:s%2Fe@[::1]:5433/data%20base"),
        ("postgresql://u@h/db?passfile=/x&connect_timeout=10", "postgresql://r:s%2Fe@h/data%20base"),
        ("postgresql://u@h/db?connect_timeout=3", "postgresql://r:s%2Fe@h/data%20base?connect_timeout=3"),
    ],
)  # fmt: skip
def test_a_workers_url_has_its_own_secret_and_no_other(given: str, expected: str) -> None:
    assert credential_url(given, "data base", "r", "s/e") == expected
    assert psycopg.conninfo.conninfo_to_dict(expected)["password"] == "s/e"


def test_a_database_with_an_odd_name(cluster: Cluster, sessions: Callable[[str], Session]) -> None:
    name = unique_name("odd") + " ä'\"%"
    cluster.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    from urllib.parse import quote

    url = with_database(cluster.url, quote(name))
    try:
        migrate(url, "x")
        credential = durable.provision_worker_role(url, name="w", streams=["mine"], namespace="x")
        with psycopg.connect(credential.url) as conn:
            assert conn.execute("SELECT count(*) FROM x.open_streams('{mine}')").fetchone() == (1,)
        durable.rotate_worker_role("w", url=url, namespace="x")
        durable.revoke_worker_role("w", url=url, namespace="x")
    finally:
        cluster.drop(name)
