"""What the commands work on: a namespace of a database, from the options, the environment or the embedded server."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, LiteralString

import click
import dramatiq
from psycopg import sql

from ..broker import DurableBroker
from ..codecs import Codec, ShownCodecs, decode_only
from ..migrate import check_namespace
from ..settings import Settings, check_url


class Target:
    """A namespace of a database; nothing is read or connected to before it is needed.

    Parameters:
      url(str | None): as given on the command line.
      namespace(str | None): as given on the command line.
      app(str | None): the module whose broker's codecs are used: ``module`` or ``module:broker``.
    """

    def __init__(self, url: str | None, namespace: str | None, app: str | None = None) -> None:
        self._url = url
        self._namespace = namespace
        self._app = app
        self._server: Any = None

    @cached_property
    def settings(self) -> Settings:
        """Those of the environment.  Raises NotConfigured for a malformed one."""
        return Settings.from_env()

    @cached_property
    def namespace(self) -> str:
        """Raises InvalidName for one that cannot be a schema."""
        return check_namespace(self._namespace if self._namespace is not None else self.settings.namespace)

    @cached_property
    def url(self) -> str:
        """The database's, whether or not it was migrated; without any, the embedded server is started."""
        if self._url is not None:
            return check_url(self._url, name="--url")
        if self.settings.url is not None:
            return self.settings.url
        from .. import embedded

        self._server = embedded.acquire(self.settings.embedded_dir)
        return str(self._server.url)

    @cached_property
    def broker(self) -> DurableBroker:
        """A broker on a namespace that is migrated (the embedded server's is, by itself)."""
        url = check_url(self._url, name="--url") if self._url is not None else None
        codecs = ShownCodecs(self._codecs())
        return DurableBroker(url, namespace=self.namespace, middleware=[], codecs=codecs, settings=self.settings)

    def _codecs(self) -> Sequence[Codec | decode_only]:
        """Those of the application's broker."""
        if self._app is None:
            return ()
        module, _, name = self._app.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            found = importlib.import_module(module)
            broker = getattr(found, name) if name else dramatiq.get_broker()
        except (ImportError, AttributeError) as e:
            raise click.UsageError(f"--app {self._app}: {e}") from e
        if not isinstance(broker, DurableBroker):
            raise click.UsageError(
                f"--app {self._app}: that is a {type(broker).__name__}: name a DurableBroker, like shop.app:broker"
            )
        return broker.codecs.given

    def rows(self, procedure: str, *arguments: Any, columns: LiteralString = "*") -> list[dict[str, Any]]:
        """What a procedure of the namespace answers, each row by the names of its columns.

        Parameters:
          columns(str): which of them, in SQL.

        Raises:
          NotPermitted: the login is no administrator.
          SchemaOutOfDate, NotConfigured, DatabaseUnavailable: as for every use of a namespace.
        """
        call = sql.SQL("SELECT {} FROM {}.{}({})").format(
            sql.SQL(columns),
            sql.Identifier(self.namespace),
            sql.Identifier(procedure),
            sql.SQL(", ").join([sql.Placeholder()] * len(arguments)),
        )
        with self.broker.database.calling() as conn:
            cursor = conn.execute(call, arguments)
            names = [column.name for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def close(self) -> None:
        """Close what was opened; the embedded server stops with its last user."""
        if "broker" in self.__dict__:
            self.broker.close()
        if self._server is not None:
            self._server.release()
            self._server = None


def option_json(command: Any) -> Any:
    """Add ``--json`` to a listing."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def option_limit(default: int) -> Callable[[Any], Any]:
    """Add ``--limit`` to a listing."""
    limit = click.IntRange(1, 10_000)
    return click.option("--limit", type=limit, default=default, show_default=True, help="The most rows.")


def names(values: Sequence[str]) -> list[str]:
    """An option that may be given often, and with several names between commas."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]
