"""Who is measured: ours, Dramatiq's StubBroker as the floor, and the peers that are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The peers' packages live apart from ours, and from each other: some exclude one another.
VENVS = ROOT / ".venv-bench"


@dataclass(frozen=True)
class Contender:
    """A system as it is measured.

    Attributes:
      name(str): what the command line calls it.
      label(str): what the tables call it.
      system(str): its module in ``benchmarks.systems``.
      service(str): the server that it needs: postgres, redis, rabbitmq; empty: none.
      venv(str): the environment with its packages; empty: that of this process.
      share(float): how many of our messages it gets, so that every measurement takes about as long.
      left(str): the query that counts what is not acknowledged yet, for those on Postgres.
      environment(dict): variables that tune it.
    """

    name: str
    label: str
    system: str
    service: str = "postgres"
    venv: str = ""
    share: float = 1.0
    left: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return VENVS / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    def missing(self) -> str:
        """What has to be installed before it can be measured; empty: nothing."""
        program = {"redis": "redis-server", "rabbitmq": "rabbitmq-server"}.get(self.service)
        if not self.python.exists():
            return "make bench-peers" + ("" if program is None or find_program(program) else f", and {program}")
        if program is not None and not find_program(program):
            return f"{program} (on Debian: apt-get install {program})"
        return ""


def find_program(name: str) -> str | None:
    """Where a server's program is, the folders of the system's administrators included."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path)


_DURABLE = "SELECT count(*) FROM durable.message WHERE kind = 'm' AND due_at <= now()"

OURS = Contender("ours", "ours", "durable", left=_DURABLE)
INSERT = Contender("insert", "psycopg's one-row INSERT", "bare_insert")
STUB = Contender("stub", "StubBroker (memory, no I/O)", "stub", "")

_DRAMATIQ_PG = "SELECT count(*) FROM dramatiq.queue WHERE state IN ('queued', 'consumed')"
_PROCRASTINATE = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
_PGQUEUER = "SELECT count(*) FROM pgqueuer"


def _pgqueuer(batch: int, share: float) -> Contender:
    environment = {"BENCHMARK_BATCH": str(batch)}
    label = f"pgqueuer, batch {batch}"
    return Contender(
        f"pgqueuer-{batch}", label, "pgqueuer_", "postgres", "pgqueuer", share, _PGQUEUER, environment=environment
    )


_TUNED = {"dramatiq_queue_prefetch": "400"}

PEERS = (
    Contender("redis", "dramatiq + Redis", "redis", "redis", "dramatiq", 0.15),
    Contender("redis-400", "dramatiq + Redis, prefetch 400", "redis", "redis", "dramatiq", 0.3, environment=_TUNED),
    Contender("rabbitmq", "dramatiq + RabbitMQ", "rabbitmq", "rabbitmq", "dramatiq", 0.4),
    Contender(
        "dramatiq-postgres",
        "dramatiq-postgres",
        "dramatiq_postgres",
        "postgres",
        "dramatiq-postgres",
        0.2,
        _DRAMATIQ_PG,
    ),
    Contender("dramatiq-pg", "dramatiq-pg", "dramatiq_pg", "postgres", "dramatiq-pg", 0.06, _DRAMATIQ_PG),
    Contender("procrastinate", "procrastinate", "procrastinate_", "postgres", "procrastinate", 0.05, _PROCRASTINATE),
    _pgqueuer(10, 0.5),
    _pgqueuer(100, 1.0),
)

REQUIREMENTS = {
    "dramatiq": ["dramatiq[redis,rabbitmq]>=2"],
    "dramatiq-postgres": ["dramatiq-postgres", "psycopg[binary]"],
    "dramatiq-pg": ["dramatiq-pg", "psycopg2-binary"],
    "procrastinate": ["procrastinate", "psycopg[binary]"],
    "pgqueuer": ["pgqueuer", "asyncpg"],
}


def chosen_peers(names: Sequence[str]) -> list[Contender]:
    """The peers whose names begin with one of these; all of them for "all".

    Raises:
      ValueError: there is no such peer.
    """
    for name in names:
        if name not in ("all", "none") and not any(p.name.startswith(name) for p in PEERS):
            raise ValueError(f"there is no peer {name!r}: choose among {', '.join(p.name for p in PEERS)}, all, none")
    return [p for p in PEERS if any(name == "all" or p.name.startswith(name) for name in names)]


def install_peers() -> None:
    """Make the environments of all peers."""
    for name, packages in REQUIREMENTS.items():
        print(f"Installing {', '.join(packages)} into {VENVS.name}/{name} ...", flush=True)
        python = VENVS / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", VENVS / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages], check=True)


def versions(venv: str, packages: Sequence[str]) -> dict[str, str]:
    """The installed versions of packages in a peer's environment."""
    code = "import sys, importlib.metadata as m; [print(p, m.version(p)) for p in sys.argv[1:]]"
    python = VENVS / venv / "bin" / "python"
    names = [package.partition("[")[0].partition(">")[0] for package in packages]
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=False)
    return dict(line.split() for line in done.stdout.splitlines())


if __name__ == "__main__":
    install_peers()
