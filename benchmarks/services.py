"""The servers of a run: Postgres always, Redis and RabbitMQ when somebody is measured on them.

Each is started here, on a free port of this machine, with a data directory that is thrown away.  What a checkpoint or
a statistics module would add at random is taken out: no checkpoint falls into a run of the usual length.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from benchmarks.contenders import find_program
from dramatiq_durable import embedded

SETTINGS = {
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    # Loaded for the one question that counts statements, and off elsewhere.
    "shared_preload_libraries": "pg_stat_statements",
    "pg_stat_statements.track": "none",
    "compute_query_id": "off",
}

START_TIMEOUT = 60


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Services:
    """What runs; ``close`` ends all of it.

    Parameters:
      folder(Path): where data may be kept.
      url(str | None): a Postgres of one's own, as its superuser; None: an embedded one.
      flush_delay(int): microseconds that the embedded one waits before each flush, as if its disk were slower.
    """

    def __init__(self, folder: Path, url: str | None, *, flush_delay: int = 0) -> None:
        self.folder = folder
        self._given = url
        self._flush_delay = flush_delay
        self._databases: list[str] = []
        self._others: dict[str, str] = {}
        self._closers = contextlib.ExitStack()
        if url is None:
            folder.chmod(0o755)  # the server's user passes through
            delay = {"commit_delay": str(flush_delay), "commit_siblings": "0"} if flush_delay else {}
            server = embedded.acquire(folder / "postgres", settings={**SETTINGS, **delay})
            self._closers.callback(server.release, wait=30)
            self._admin_url = server.url
            self.pgbench: str | None = os.fspath(server.binaries / "pgbench")
        else:
            self._admin_url = url
            self.pgbench = find_program("pgbench")
        #: A connection outside the measured databases.
        self.admin = psycopg.connect(self._admin_url, autocommit=True)
        self._closers.callback(self._drop_databases)

    def database(self, name: str) -> str:
        """Make an empty database; answers its URL."""
        name = "benchmark_" + name.replace("-", "_")
        self.admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
        self.admin.execute(f'CREATE DATABASE "{name}"'.encode())
        self._databases.append(name)
        return urlsplit(self._admin_url)._replace(path=f"/{name}").geturl()

    def url(self, service: str) -> str:
        """The URL of the other servers, started when first asked for."""
        if service not in self._others:
            self._others[service] = {"": lambda: "", "redis": self._redis, "rabbitmq": self._rabbitmq}[service]()
        return self._others[service]

    def flush_seconds(self) -> float | None:
        """How long the embedded server takes to flush a page, in the middle; None: the server is not ours."""
        if self._given is not None:
            return None
        times = []
        with (self.folder / "flushed").open("wb") as file:
            for _ in range(300):
                file.seek(0)
                file.write(os.urandom(8192))
                file.flush()
                began = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
        return statistics.median(times) + self._flush_delay / 1e6

    def close(self) -> None:
        self._closers.close()

    def _drop_databases(self) -> None:
        if self._given is not None:
            for name in self._databases:
                self.admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
        self.admin.close()

    def _redis(self) -> str:
        """With the append-only file that is flushed each second: the usual compromise of a queue on Redis."""
        port, folder = free_port(), self.folder / "redis"
        folder.mkdir()
        program = find_program("redis-server") or "redis-server"
        options = f"--bind 127.0.0.1 --port {port} --dir {folder} --appendonly yes --appendfsync everysec".split()
        self._run([program, *options, "--save", ""], {}, port, "redis")
        return f"redis://127.0.0.1:{port}/0"

    def _rabbitmq(self) -> str:
        port, distribution, mapper = free_port(), free_port(), free_port()
        folder = self.folder / "rabbitmq"
        folder.mkdir()
        # Debian's wrapper insists on a user and a directory of its own; what it wraps does not.
        wrapped = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        program = os.fspath(wrapped) if wrapped.exists() else find_program("rabbitmq-server") or "rabbitmq-server"
        (folder / "plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text("log.file = false\n")
        environment = {
            "HOME": os.fspath(folder),
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"benchmark{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": os.fspath(folder / "data"),
            "RABBITMQ_LOG_BASE": os.fspath(folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": os.fspath(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": os.fspath(folder / "rabbitmq.conf"),
            "RABBITMQ_PID_FILE": os.fspath(folder / "pid"),
        }
        # Erlang leaves its port mapper behind; this one is ours alone.
        self._closers.callback(
            subprocess.run,
            [find_program("epmd") or "epmd", "-kill"],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        self._run([program], environment, port, "rabbitmq")
        return f"amqp://guest:guest@127.0.0.1:{port}"

    def _run(self, command: list[str], environment: dict[str, str], port: int, name: str) -> None:
        """Start a server, and wait until it takes connections."""
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._closers.callback(_end, process)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
