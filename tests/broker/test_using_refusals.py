"""using() where it cannot be: a clear error, and the caller's transaction is not harmed by it."""

from __future__ import annotations

import contextvars
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest
import sqlalchemy

import dramatiq_durable as durable
from dramatiq_durable.database import Database
from dramatiq_durable.migrate import migrate
from dramatiq_durable.roles import grant_login
from tests.support.callers import AWAITED, BLOCKING, AsyncCaller, Caller, django_connection
from tests.support.postgres import Cluster
from tests.support.scratch import Scratch, scratch

from .conftest import Rows


@pytest.fixture
def close() -> Iterator[Callable[[Any], Any]]:
    """Has things closed at the end of the test, before the databases go."""
    things: list[Any] = []

    def later(thing: Any) -> Any:
        things.append(thing)
        return thing

    yield later
    for thing in things:
        thing.close()


@pytest.fixture
def take(broker: durable.DurableBroker) -> Any:
    @dramatiq.actor(broker=broker)
    def take(value: Any = None) -> None: ...

    return take


@pytest.fixture(params=["nothing", "foreign schema", "namespace"])
def elsewhere(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """Another database: without our namespace, with somebody else's of the same name, or with one of ours."""
    with cluster.database(cluster.template() if request.param == "namespace" else "template0") as url:
        if request.param == "foreign schema":
            with psycopg.connect(url) as conn:
                conn.execute("CREATE SCHEMA durable; CREATE FUNCTION durable.enqueue_messages() RETURNS int RETURN 1")
        if request.param == "namespace":
            with psycopg.connect(url) as conn:
                # The clones of the tests' template are twins; two that were migrated are not.
                conn.execute("UPDATE durable.identity SET id = gen_random_uuid()")
        yield url


@pytest.mark.parametrize("kind", BLOCKING)
def test_a_connection_to_another_database(close: Any, elsewhere: str, kind: str, take: Any, rows: Rows) -> None:
    caller = close(Caller(kind, elsewhere))
    with caller.transaction():
        caller.execute("CREATE TABLE shop (n int)")
        with durable.using(caller.connection):
            for _ in range(2):
                with pytest.raises(durable.NotConfigured, match="and not to the broker's"):
                    take.send()
        caller.execute("INSERT INTO shop VALUES (1)")
    with psycopg.connect(elsewhere) as conn:
        assert conn.execute("SELECT n FROM shop").fetchall() == [(1,)]
    assert rows.count() == 0


@pytest.mark.parametrize("kind", AWAITED)
def test_an_awaited_connection_to_another_database(elsewhere: str, kind: str, take: Any) -> None:
    import asyncio

    async def main() -> None:
        caller = await AsyncCaller.open(kind, elsewhere)
        try:
            async with caller.transaction():
                await caller.execute("CREATE TABLE shop (n int)")
                with pytest.raises(durable.NotConfigured, match="and not to the broker's"):
                    async with durable.using(caller.connection):
                        take.send()
                await caller.execute("INSERT INTO shop VALUES (1)")
        finally:
            await caller.close()

    asyncio.run(main())
    with psycopg.connect(elsewhere) as conn:
        assert conn.execute("SELECT n FROM shop").fetchall() == [(1,)]


def test_a_namespace_that_was_made_anew_is_known_again(
    empty_database_url: str, make_broker: Any, close: Callable[[Any], Any]
) -> None:
    migrate(empty_database_url)
    broker = make_broker(empty_database_url)

    @dramatiq.actor(broker=broker)
    def take() -> None: ...

    conn = close(psycopg.connect(empty_database_url))
    with conn.transaction(), durable.using(conn):
        take.send()
    with psycopg.connect(empty_database_url, autocommit=True) as other:
        other.execute("UPDATE durable.identity SET id = gen_random_uuid()")
    fresh = close(psycopg.connect(empty_database_url))
    with fresh.transaction(), durable.using(fresh):
        take.send()
    assert fresh.execute("SELECT count(*) FROM durable.message").fetchone() == (2,)


# --- who may -------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as database:
        yield database


@pytest.mark.parametrize("granted", ["nothing", "membership", "another stream", "consume"])
def test_a_login_without_the_grant(shared: Scratch, make_broker: Any, close: Any, granted: str) -> None:
    broker = make_broker(shared.url)

    @dramatiq.actor(broker=broker, queue_name="mine")
    def take() -> None: ...

    take.send()
    login, url = shared.login()
    shared.execute(f"CREATE TABLE shop (n int); GRANT ALL ON shop TO {login}")
    database = close(Database(lambda: shared.url))
    if granted == "membership":
        worker = shared.execute("SELECT worker::text FROM durable.roles")[0][0]
        shared.execute(f'GRANT "{worker}" TO {login}')
    elif granted == "another stream":
        grant_login(database, login, produce=["other"])
    elif granted == "consume":
        grant_login(database, login, consume=["mine"])
    conn = close(psycopg.connect(url))
    with conn.transaction():
        conn.execute("INSERT INTO shop VALUES (1)")
        with durable.using(conn), pytest.raises(durable.NotPermitted) as refused:
            take.send()
        assert "role grant" in str(refused.value)
        # Which login it is, is said where it has no grant at all.
        assert (f"role grant {login} " in str(refused.value)) == (granted in ("nothing", "membership"))
    assert shared.execute("SELECT n FROM shop") == [(1,)]
    grant_login(database, login, produce=["mine"])
    with conn.transaction(), durable.using(conn):
        take.send()
    assert shared.execute("SELECT count(*) FROM durable.message") == [(2,)]


def test_a_login_whose_grants_were_taken_meanwhile(shared: Scratch, make_broker: Any, close: Any) -> None:
    broker = make_broker(shared.url)

    @dramatiq.actor(broker=broker, queue_name="mine")
    def take() -> None: ...

    login, url = shared.login()
    grant_login(close(Database(lambda: shared.url)), login, produce=["mine"])
    conn = close(psycopg.connect(url))
    with conn.transaction(), durable.using(conn):
        take.send()
    shared.execute("DELETE FROM durable.login WHERE login = %s", login)
    with pytest.raises(durable.NotPermitted), conn.transaction(), durable.using(conn):
        take.send()


# --- what cannot be sent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKING)
def test_what_cannot_be_sent_harms_nothing(close: Any, database_url: str, kind: str, take: Any, rows: Rows) -> None:
    rows("CREATE TABLE shop (n int)")
    caller = close(Caller(kind, database_url))
    with caller.transaction():
        caller.execute("INSERT INTO shop VALUES (1)")
        with durable.using(caller.connection):
            with pytest.raises(durable.NotEncodable):
                take.send(object())
            with pytest.raises(durable.PayloadTooLarge):
                take.send("x" * 16 * 1024 * 1024)
            with pytest.raises(ValueError, match="a delay is between"):
                take.send_with_options(delay=-1)
            with pytest.raises(dramatiq.errors.QueueNotFound):
                take.broker.enqueue(take.message().copy(queue_name="nothing"))
            with pytest.raises(durable.NotEncodable):
                take.broker.enqueue_many([take.message(1), take.message(object())])
    assert rows("SELECT n FROM shop") == [(1,)]
    assert rows.count() == 0


@pytest.mark.parametrize("kind", BLOCKING)
def test_a_transaction_that_has_failed(close: Any, database_url: str, kind: str, take: Any) -> None:
    caller = close(Caller(kind, database_url))

    def fail() -> None:
        with caller.transaction(), durable.using(caller.connection):
            with pytest.raises(Exception, match="division by zero"):
                caller.execute("SELECT 1/0")
            take.send()

    with pytest.raises(durable.DurableError, match="has failed already: roll it back"):
        fail()
    with caller.transaction(), durable.using(caller.connection):
        take.send()


def test_a_lock_in_the_way(close: Any, database_url: str, broker: durable.DurableBroker) -> None:
    """Two transactions start the same workflow id: the second does not wait for the first one's end."""

    @durable.workflow(broker=broker)
    async def order() -> None: ...

    order.options(workflow_id="before").start()
    one, other = close(psycopg.connect(database_url)), close(psycopg.connect(database_url))
    with one.transaction():
        with durable.using(one):
            order.options(workflow_id="same").start()
        with pytest.raises(durable.DatabaseUnavailable, match="roll it back and try again"):
            with other.transaction(), durable.using(other):
                order.options(workflow_id="same").start()


# --- connections that are no help ----------------------------------------------------------------------------


def test_psycopg_in_autocommit_mode(close: Any, database_url: str, take: Any, rows: Rows) -> None:
    conn = close(psycopg.connect(database_url, autocommit=True))
    with durable.using(conn):
        with pytest.raises(durable.DurableError, match=r"conn\.transaction\(\)"):
            take.send()
        with conn.transaction():
            take.send()
    assert rows.count() == 1


def test_sqlalchemy_in_autocommit_mode(close: Any, database_url: str, take: Any, rows: Rows) -> None:
    for driver, connect in (("psycopg", psycopg.connect), ("psycopg2", __import__("psycopg2").connect)):
        engine = sqlalchemy.create_engine(
            f"postgresql+{driver}://", creator=lambda connect=connect: connect(database_url)
        )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn, durable.using(conn):
            with pytest.raises(durable.DurableError, match="AUTOCOMMIT"):
                take.send()
        engine.dispose()
    assert rows.count() == 0


def test_django_outside_of_atomic(close: Any, database_url: str, take: Any, rows: Rows) -> None:
    connection = close(django_connection(database_url))
    with durable.using(connection), pytest.raises(durable.DurableError, match="atomic"):
        take.send()
    assert rows.count() == 0


@pytest.mark.parametrize("kind", [kind for kind in BLOCKING if kind.startswith(("psycopg", "sqlalchemy connection"))])
def test_a_closed_connection(database_url: str, kind: str, take: Any) -> None:
    caller = Caller(kind, database_url)
    caller.close()
    with durable.using(caller.connection), pytest.raises(durable.DurableError, match="closed"):
        take.send()


def test_another_kind_of_database(close: Any, take: Any, database_url: str) -> None:
    from django.db.backends.sqlite3.base import DatabaseWrapper

    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as conn, durable.using(conn), pytest.raises(durable.NotConfigured, match="sqlite"):
        take.send()
    engine.dispose()
    django_connection(database_url)
    wrapper = close(DatabaseWrapper({"NAME": ":memory:", "OPTIONS": {}, "TIME_ZONE": None}))
    with durable.using(wrapper), pytest.raises(durable.NotConfigured, match="SQLite"):
        take.send()


def test_what_is_no_connection(database_url: str, close: Any) -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    for thing in (database_url, engine, sqlalchemy.orm.sessionmaker(engine), close(sqlite3.connect(":memory:")), None):
        with pytest.raises(TypeError, match=r"a psycopg 3 Connection or .*not a (builtins|sqlalchemy|sqlite3)\."):
            durable.using(thing)
    engine.dispose()


def test_with_and_async_with(database_url: str, close: Any) -> None:
    import asyncio

    async def main() -> None:
        caller = await AsyncCaller.open("psycopg", database_url)
        with pytest.raises(TypeError, match="write `async with"), durable.using(caller.connection):
            pass
        await caller.close()
        with pytest.raises(TypeError, match="write `with"):
            async with durable.using(close(psycopg.connect(database_url))):
                pass

    asyncio.run(main())


def test_scoped_sessions_are_sessions(database_url: str, take: Any, rows: Rows) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database_url))
    session = sqlalchemy.orm.scoped_session(sqlalchemy.orm.sessionmaker(engine))
    with session.begin(), durable.using(session):
        take.send()
    session.remove()
    engine.dispose()
    assert rows.count() == 1


# --- blocks that are over ------------------------------------------------------------------------------------


def test_a_context_that_outlives_the_block(close: Any, database_url: str, take: Any, rows: Rows) -> None:
    conn = close(psycopg.connect(database_url))
    with conn.transaction(), durable.using(conn):
        take.send()
        context = contextvars.copy_context()
    with pytest.raises(durable.DurableError, match="has ended"):
        context.run(take.send)
    assert rows.count() == 1


def test_a_block_that_is_left_in_another_context(close: Any, database_url: str) -> None:
    conn = close(psycopg.connect(database_url))
    block = durable.using(conn)
    contextvars.copy_context().run(block.__enter__)
    with pytest.raises(durable.DurableError, match="in another context"):
        block.__exit__(None, None, None)


def test_a_connection_with_habits_of_its_own(close: Any, database_url: str, take: Any, rows: Rows) -> None:
    conn: Any = close(
        psycopg.connect(database_url, row_factory=psycopg.rows.dict_row, cursor_factory=psycopg.RawCursor)
    )
    conn.execute("SET search_path = pg_temp; SET bytea_output = 'escape'; SET client_encoding = 'LATIN1'")
    conn.commit()
    with conn.transaction(), durable.using(conn):
        take.send("\N{SNOWMAN}")
    with conn.pipeline(), conn.transaction(), durable.using(conn):
        take.send()
    assert rows.count() == 2
