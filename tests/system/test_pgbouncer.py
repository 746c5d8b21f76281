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

import dramatiq_durable as durable
from dramatiq_durable import embedded
from dramatiq_durable.settings import Settings
from tests.support import wait_until

pytestmark = pytest.mark.system


@pytest.fixture
def pooled_url(own_server: embedded.Server, instance_directory: Path) -> Iterator[str]:
    """The URL of a PgBouncer in transaction mode, two server connections wide, before a migrated database."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    assert Path(program).exists(), "install pgbouncer"
    durable.migrate.migrate(own_server.url)
    folder = instance_directory / "pgbouncer"
    folder.mkdir(mode=0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = parse_qs(urlsplit(own_server.url).query)["host"][0]
    (folder / "users.txt").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"""[databases]
* = host={host} port=5432
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users.txt
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
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"

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
    environment = {"DRAMATIQ_DURABLE_PREPARED_STATEMENTS": "off", "DRAMATIQ_DURABLE_POLL_INTERVAL": "200ms"}
    if listening:
        environment["DRAMATIQ_DURABLE_LISTEN_URL"] = own_server.url
    broker = durable.DurableBroker(pooled_url, settings=Settings.from_env(environment))
    done = threading.Semaphore(0)

    @dramatiq.actor(broker=broker)
    def count(n: int) -> None:
        done.release()

    @durable.activity(broker=broker)
    def record(n: int) -> int:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effects VALUES (%s)", [n])
        return n

    @durable.workflow(broker=broker)
    async def several() -> int:
        await durable.sleep(0.05)
        return sum([await record.execute(n) for n in range(3)])

    with psycopg.connect(own_server.url, autocommit=True) as conn:
        conn.execute("CREATE TABLE effects (n int)")
        worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
        worker.start()
        try:
            broker.enqueue_many([count.message(n) for n in range(200)])
            for _ in range(100):
                count.send(1)
            for _ in range(300):
                assert done.acquire(timeout=20)
            handles = [several.start() for _ in range(20)]
            assert [h.result(timeout=30) for h in handles] == [3] * 20
            assert conn.execute("SELECT count(*), sum(n) FROM effects").fetchone() == (60, 60)
        finally:
            worker.stop()
            broker.close()
