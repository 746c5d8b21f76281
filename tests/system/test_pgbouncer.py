"""Everything works through PgBouncer in transaction mode, where nothing belongs to a session."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import dramatiq
import psycopg
import pytest
from psycopg import sql

import dramatiq_durable as durable
from dramatiq_durable import embedded
from dramatiq_durable.settings import Settings
from tests.support import wait_until

pytestmark = pytest.mark.system


#: Where PgBouncer looks a login up: a worker's is in no file of its own, and comes and goes.
USERS = """
    CREATE SCHEMA pgbouncer;
    CREATE FUNCTION pgbouncer.find(name text) RETURNS TABLE (usename name, passwd text) LANGUAGE sql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS 'SELECT usename, passwd FROM pg_catalog.pg_shadow WHERE usename = name';
    REVOKE ALL ON FUNCTION pgbouncer.find FROM PUBLIC;
"""


@pytest.fixture
def pooled_url(own_server: embedded.Server, instance_directory: Path) -> Iterator[str]:
    """The URL of a PgBouncer in transaction mode, two server connections a login wide, before a migrated database.

    It knows the logins' verifiers, and lets nobody in without a password but the superuser.
    """
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    assert Path(program).exists(), "install pgbouncer"
    durable.migrate.migrate(own_server.url)
    folder = instance_directory / "pgbouncer"
    folder.mkdir(mode=0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = parse_qs(urlsplit(own_server.url).query)["host"][0]
    with psycopg.connect(own_server.url, autocommit=True) as conn:
        conn.execute(USERS)
    (folder / "users.txt").write_text('"postgres" "the superuser"\n')
    (folder / "pgbouncer.ini").write_text(
        f"""[databases]
* = host={host} port=5432
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users.txt
auth_user = postgres
auth_query = SELECT usename, passwd FROM pgbouncer.find($1)
pool_mode = transaction
default_pool_size = 2
logfile = {folder}/log
"""
    )
    options = {}
    if os.geteuid() == 0:
        # PgBouncer refuses root; the socket's folder belongs to the server's user.
        owner = pwd.getpwuid(Path(host).stat().st_uid)
        for path in (folder, *folder.iterdir()):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        options = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    process = subprocess.Popen([program, "-q", str(folder / "pgbouncer.ini")], **options)  # type: ignore[call-overload]
    url = f"postgresql://postgres:the%20superuser@127.0.0.1:{port}/postgres"

    def answers() -> bool:
        try:
            psycopg.connect(url, connect_timeout=1).close()
        except psycopg.OperationalError:
            return False
        return True

    wait_until(answers, message="PgBouncer")
    yield url
    process.terminate()
    process.wait(10)


@pytest.mark.parametrize("listening", [True, False])
def test_messages_and_workflows(own_server: embedded.Server, pooled_url: str, listening: bool) -> None:
    with psycopg.connect(own_server.url, autocommit=True) as conn:
        conn.execute("CREATE TABLE effects (n int)")
        broker = durable.DurableBroker(pooled_url, settings=settings(own_server.url if listening else None))
        work_through(broker, broker)
        assert conn.execute("SELECT count(*), sum(n) FROM effects").fetchone() == (60, 60)


@pytest.mark.parametrize("listening", [True, False])
def test_a_scoped_worker(own_server: embedded.Server, pooled_url: str, listening: bool) -> None:
    """session_user is the worker's login through the pooler, too: its server connections are its own."""
    made = durable.provision_worker_role(own_server.url, name="worker", streams=["default"], produce=["default"])
    address, role = urlsplit(pooled_url).netloc.rpartition("@")[2], sql.Identifier(made.role)
    pooled = f"postgresql://{made.role}:{made.password}@{address}/postgres"
    with psycopg.connect(own_server.url, autocommit=True) as conn:
        conn.execute("CREATE TABLE effects (n int)")
        conn.execute(sql.SQL("GRANT INSERT ON effects TO {}").format(role))
        broker = durable.DurableBroker(
            worker_credentials={"role": made.role, "password": made.password, "url": pooled},
            settings=settings(made.url if listening else None),
        )
        client = durable.DurableBroker(pooled_url, settings=settings(None))
        client.declare_queue("foreign")
        assert client.stream_id("foreign")
        with pytest.raises(durable.NotPermitted):
            broker.stream_id("foreign")
        work_through(broker, client)
        assert conn.execute("SELECT count(*), sum(n) FROM effects").fetchone() == (60, 60)

        # Revoked, it is out at once, also of the connections that the pooler keeps.
        conn.execute(sql.SQL("DROP OWNED BY {}").format(role))
        durable.revoke_worker_role("worker", url=own_server.url)
        with pytest.raises(psycopg.Error), psycopg.connect(pooled, prepare_threshold=None) as revoked:
            revoked.execute("SELECT durable.schema_version()")


def settings(listen_url: str | None) -> Settings:
    environment = {"DRAMATIQ_DURABLE_PREPARED_STATEMENTS": "off", "DRAMATIQ_DURABLE_POLL_INTERVAL": "200ms"}
    if listen_url is not None:
        environment["DRAMATIQ_DURABLE_LISTEN_URL"] = listen_url
    return Settings.from_env(environment)


def work_through(broker: durable.DurableBroker, client: durable.DurableBroker) -> None:
    """Messages and runs, sent by one broker and done by a worker on another (or the same); both are closed."""
    done = threading.Semaphore(0)

    def count(n: int) -> None:
        done.release()

    def record(n: int) -> int:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effects VALUES (%s)", [n])
        return n

    async def several() -> int:
        await durable.sleep(0.05)
        return sum([await activity.execute(n) for n in range(3)])

    for each in {broker, client}:
        actor = dramatiq.actor(count, broker=each)
        activity = durable.activity(broker=each)(record)
        workflow = durable.workflow(broker=each)(several)
        if each is client:
            send, start = actor, workflow
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
    worker.start()
    try:
        client.enqueue_many([send.message(n) for n in range(200)])
        for _ in range(100):
            send.send(1)
        for _ in range(300):
            assert done.acquire(timeout=20)
        handles = [start.start() for _ in range(20)]
        assert [h.result(timeout=30) for h in handles] == [3] * 20
    finally:
        worker.stop()
        broker.close()
        client.close()
