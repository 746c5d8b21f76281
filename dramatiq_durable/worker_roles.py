"""Scoped workers: a database role that can do its streams' work and nothing else, made, renewed and taken away.

A worker is a logical thing with grants; its logins come and go, for a role of Postgres has one password.  Passwords are
made here and never leave as such: the server gets the SCRAM verifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

import dramatiq
import psycopg

from .arrays import Texts
from .database import Database
from .durations import Duration, parse_duration
from .errors import InvalidName, InvalidRole, NotConfigured
from .roles import explained, names_of
from .settings import Settings, check_url
from .worker_logins import Credential, bar, call, drop, end_what_is_over, make_login, own_logins, session
from .workflow.options import check_queue_name

Kind = Literal["worker", "activity", "workflow", "producer", "monitor"]

#: How many messages that it sent may be live at once, where provisioning says nothing else.
MOST_LIVE = 100_000


@dataclass(frozen=True, slots=True)
class WorkerLogin:
    """A login of a worker.

    Attributes:
      role(str): its name.
      created_at, expires_at(datetime | None): when it was made, and when it ends; None: never.
      connection_limit(int | None): how many sessions it may have at once; None: any number.
      sessions(int): how many it has now.
      state(str): ``live``, ``expired``, ``barred`` (may not log in) or ``missing`` (somebody dropped the role).
    """

    role: str
    created_at: datetime
    expires_at: datetime | None
    connection_limit: int | None
    sessions: int
    state: str


@dataclass(frozen=True, slots=True)
class WorkerRole:
    """A worker that was provisioned.

    Attributes:
      name(str): its name.
      kind(str): ``worker``, ``activity``, ``workflow``, ``producer`` or ``monitor``.
      streams, produce(tuple): what it may consume, and send to.
      max_live(int | None): how many messages that it sent may be live at once.
      max_statement, max_transaction(float | None): seconds that these may take.
      created_at(datetime): when it was provisioned.
      logins(tuple): its logins, the oldest first.
    """

    name: str
    kind: str
    streams: tuple[str, ...]
    produce: tuple[str, ...]
    max_live: int | None
    max_statement: float | None
    max_transaction: float | None
    created_at: datetime
    logins: tuple[WorkerLogin, ...]


def provision_worker_role(
    url: str | None = None,
    *,
    name: str,
    streams: Sequence[str] = (),
    produce: Sequence[str] = (),
    kind: Kind = "worker",
    expires: Duration | datetime | None = None,
    connection_limit: int | None = None,
    max_live: int | None = None,
    max_statement: Duration | None = 30,
    max_transaction: Duration | None = 10,
    namespace: str = "durable",
) -> Credential:
    """Make a database role that can do its streams' work, through procedures, and nothing else.

    All of it, or nothing, happens in one transaction.  When the connection is lost at its end, ``list_worker_roles``
    tells whether there is the role; its password is lost then: revoke it, and provision it again.

    Parameters:
      url(str | None): the database, as an administrator of the namespace who may create roles; None:
        DRAMATIQ_DURABLE_URL, or else that of Dramatiq's global broker.
      name(str): the worker's name, 1 to 200 printable characters.
      streams(Sequence): queue names that it consumes; they come into being here.
      produce(Sequence): queue names that it may send to, and whose workflows it may start.
      kind(str): ``worker`` takes all that its streams have; ``activity`` messages and activities, and never sees a run;
        ``workflow`` the tasks of runs alone; ``producer`` takes nothing; ``monitor`` reads counts and no payload.
      expires(Duration | datetime | None): for how long its login may be used, or until when; None: until it is revoked.
      connection_limit(int | None): the most sessions at once; None: no limit.  A worker process has a handful.
      max_live(int | None): the most live messages of its sending; None: 100,000.
      max_statement, max_transaction(Duration | None): how long these may take before the watchdog ends the session;
        None: as long as they like.

    Returns:
      Credential: the login with its password, which is kept nowhere.

    Raises:
      InvalidName: the name, or a queue's, is malformed.
      InvalidRole: the kind, its streams, the end or a limit makes no sense.
      RoleExists: the name is taken.
      NotPermitted: the URL's login lacks a privilege; the message says which, and how to get it.
      NotConfigured: there is no such namespace, or it has no roles of its own.
      SchemaOutOfDate, DatabaseUnavailable: as for every use of a namespace.
    """
    with _at(url, namespace) as database:
        return provision(
            database, name=name, streams=streams, produce=produce, kind=kind, expires=expires,
            connection_limit=connection_limit, max_live=max_live, max_statement=max_statement,
            max_transaction=max_transaction,
        )  # fmt: skip


def rotate_worker_role(
    name: str, overlap: Duration = "1h", *, url: str | None = None, namespace: str = "durable"
) -> Credential:
    """Give a worker another login, with another password; the ones it has live on for a while.

    The new login has the connection limit of the one before, and lives for as long as that one was made for.
    What a process holds that uses an old login stays its own until that ends.  Logins whose time was over before are
    dropped.

    Parameters:
      name(str): the worker's name.
      overlap(Duration): for how long the old logins go on; 0: their sessions end at once, and what they hold goes back.
      url(str | None): as for `provision_worker_role`.

    Returns:
      Credential: the new login.

    Raises:
      RoleNotFound: there is no such worker.
      NotPermitted: the login lacks a privilege; or a role that the worker's login is named by is not one that was
        provisioned: nothing was changed.
      NotConfigured, SchemaOutOfDate, DatabaseUnavailable: as for `provision_worker_role`.
      ValueError: the overlap is no duration.
    """
    with _at(url, namespace) as database:
        return rotate(database, name, overlap)


def revoke_worker_role(name: str, *, url: str | None = None, namespace: str = "durable") -> list[str]:
    """End a worker: it may do nothing from here on, its sessions are ended, what it holds is handed to others.

    First the loss of all rights is committed, then sessions are ended until none is left (a moment), then the roles are
    dropped.  May be called again when it was interrupted.

    Parameters:
      name(str): the worker's name.
      url(str | None): as for `provision_worker_role`.

    Returns:
      list[str]: what was done, one line each; a role that something in the database still depends on is left, without a
      login and without rights, and the line says on what.

    Raises:
      RoleNotFound: there is no such worker.
      NotPermitted: as for `rotate_worker_role`; nothing was changed.
      NotConfigured, SchemaOutOfDate, DatabaseUnavailable: as for `provision_worker_role`.
    """
    with _at(url, namespace) as database:
        return revoke(database, name)


def list_worker_roles(*, url: str | None = None, namespace: str = "durable") -> list[WorkerRole]:
    """The workers that were provisioned, by name; none of them with a password: those are kept nowhere.

    Raises:
      NotPermitted: the login is no administrator.
      NotConfigured, SchemaOutOfDate, DatabaseUnavailable: as for `provision_worker_role`.
    """
    with _at(url, namespace) as database:
        return list_roles(database)


@contextmanager
def _at(url: str | None, namespace: str) -> Iterator[Database]:
    given = check_url(url, name="url") if url is not None else Settings.from_env().url
    if given is not None:
        database = Database(lambda: given, namespace)
    else:
        from .broker import DurableBroker

        # Not get_broker(), which makes one for another server where none is set.
        broker = dramatiq.broker.global_broker
        if not isinstance(broker, DurableBroker):
            raise NotConfigured("which database? Give url=..., set DRAMATIQ_DURABLE_URL, or set a DurableBroker")
        database = Database(lambda: broker.database.conninfo, broker.namespace if namespace == "durable" else namespace)
    try:
        yield database
    finally:
        database.close()


# --- on a database that is open --------------------------------------------------------------------------------------


def provision(
    database: Database,
    *,
    name: str,
    streams: Sequence[str],
    produce: Sequence[str],
    kind: str,
    expires: Duration | datetime | None,
    connection_limit: int | None,
    max_live: int | None,
    max_statement: Duration | None,
    max_transaction: Duration | None,
) -> Credential:
    """See `provision_worker_role`."""
    check_worker_name(name)
    _check_kind(kind, streams, produce)
    for stream in (*streams, *produce):
        check_queue_name(stream)
    until, lifetime = _end(expires)
    _check_count("connection_limit", connection_limit)
    _check_count("max_live", max_live)
    statement, transaction = _limit("max_statement", max_statement), _limit("max_transaction", max_transaction)
    live = None if kind == "monitor" else max_live or MOST_LIVE
    with session(database) as (conn, names), conn.transaction():
        call(
            conn, names, "add_worker", name, kind, Texts(list(streams)), Texts(list(produce)), live, statement,
            transaction,
        )  # fmt: skip
        return make_login(
            conn, names, name, database.conninfo, connection_limit, (until, lifetime, None), statement, transaction
        )


def rotate(database: Database, name: str, overlap: Duration) -> Credential:
    """See `rotate_worker_role`."""
    check_worker_name(name)
    try:
        pause = parse_duration(overlap)
    except ValueError as e:
        raise InvalidRole(f"overlap: {e}") from e
    with session(database) as (conn, names):
        with conn.transaction():
            logins = own_logins(conn, names, name)
            limits = call(conn, names, "list_roles")
            statement, transaction = next(
                [None if s is None else int(s * 1000) for s in row[5:7]] for row in limits if row[0] == name
            )
            newest = logins[-1] if logins else None
            limit = newest["connection_limit"] if newest is not None else None
            end = (None, newest["lifetime"] if newest is not None else None, pause)
            made = make_login(
                conn, names, name, database.conninfo, None if limit == -1 else limit, end, statement, transaction
            )
            over = [row for row in logins if row["over"] or pause == 0]
            bar(conn, names, [row["login"] for row in over if row["there"]])
        if over:
            end_what_is_over(conn, names, name)
            with conn.transaction():
                drop(conn, names, name, [row["login"] for row in over])
    return made


def revoke(database: Database, name: str) -> list[str]:
    """See `revoke_worker_role`."""
    check_worker_name(name)
    with session(database) as (conn, names):
        with conn.transaction():
            logins = own_logins(conn, names, name)
            there = [row["login"] for row in logins if row["there"]]
            call(conn, names, "disable_worker", name)
            bar(conn, names, there)
        sessions, messages = end_what_is_over(conn, names, name)
        with conn.transaction():
            left = drop(conn, names, name, [row["login"] for row in logins])
    done = [f"{name} may do nothing any more"]
    done += [f"{sessions} sessions were ended"] if sessions else []
    done += [f"{messages} messages that it held went back to their streams"] if messages else []
    done += [f"dropped the role {login}" for login in there if login not in left]
    done += [
        f"left the role {login}, without any right: {why}; DROP OWNED BY {login}, DROP ROLE {login} when it is settled"
        for login, why in left.items()
    ]
    return done


def list_roles(database: Database) -> list[WorkerRole]:
    """See `list_worker_roles`."""
    with database.connection() as conn:
        try:
            rows = call(conn, names_of(conn, database.namespace), "list_roles")
        except psycopg.Error as e:
            raise explained(e, conn, database.namespace) from e
    found: dict[str, WorkerRole] = {}
    logins: dict[str, list[WorkerLogin]] = {}
    for name, kind, consume, produce, live, statement, transaction, created, *login in rows:
        if kind in get_args(Kind):
            if login[0] is not None:
                logins.setdefault(name, []).append(WorkerLogin(*login))
            found[name] = WorkerRole(
                name, kind, tuple(consume), tuple(produce), live, statement, transaction, created,
                tuple(logins.get(name, ())),
            )  # fmt: skip
    return list(found.values())


# --- checks -----------------------------------------------------------------------------------------------------------


def check_worker_name(name: str) -> str:
    """The name, if a worker can have it.

    Raises:
      InvalidName: it has not 1 to 200 characters, one of them cannot be printed, or it begins or ends with a blank.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= 200 or not name.isprintable() or name != name.strip():
        shown = f"{name[:60]!r}" if isinstance(name, str) else f"{type(name).__name__}"
        raise InvalidName(
            f"{shown} cannot be a worker's name: it has 1 to 200 characters that can be printed, and no blank at "
            "either end (for example 'billing')"
        )
    return name


def _check_kind(kind: str, streams: Sequence[str], produce: Sequence[str]) -> None:
    for option, names in (("streams", streams), ("produce", produce)):
        if isinstance(names, str):
            raise InvalidRole(f"{option} is a list of queue names: write [{names!r}]")
    if kind not in get_args(Kind):
        raise InvalidRole(f"kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
    if kind in ("worker", "activity", "workflow") and not streams:
        raise InvalidRole(f"a role of the kind {kind!r} consumes at least one stream: name it in streams=[...]")
    if kind in ("producer", "monitor") and streams:
        raise InvalidRole(f"a role of the kind {kind!r} consumes no stream: leave streams out, or choose another kind")
    if kind == "producer" and not produce:
        raise InvalidRole("a producer sends to at least one stream: name it in produce=[...]")
    if kind == "monitor" and produce:
        raise InvalidRole("a monitor sends to no stream: leave produce out, or choose another kind")


def _check_count(option: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31):
        raise InvalidRole(f"{option} is a whole number from 1 on, or None, not {value!r}")


def _limit(option: str, value: Duration | None) -> int | None:
    if value is None:
        return None
    try:
        milliseconds = parse_duration(value)
    except ValueError as e:
        raise InvalidRole(f"{option}: {e}") from e
    if not 1 <= milliseconds < 2**31:
        raise InvalidRole(f"{option} is between a millisecond and 24 days, or None, not {value!r}")
    return milliseconds


def _end(expires: Duration | datetime | None) -> tuple[datetime | None, int | None]:
    """When a login ends: at a time, or so many milliseconds after it is made."""
    if expires is None:
        return None, None
    if isinstance(expires, datetime):
        if expires.tzinfo is None:
            raise InvalidRole(f"expires={expires!r} has no time zone: say which, such as datetime(..., tzinfo=UTC)")
        if expires <= datetime.now(UTC):
            raise InvalidRole(f"expires={expires.isoformat()} is over already")
        if expires - datetime.now(UTC) > timedelta(days=36_600):
            raise InvalidRole(f"expires={expires.isoformat()} is more than a hundred years away: None is for ever")
        return expires, None
    try:
        milliseconds = parse_duration(expires)
    except ValueError as e:
        raise InvalidRole(f"expires: {e}") from e
    if milliseconds < 1000 or milliseconds > 36_600 * 86_400_000:
        raise InvalidRole(f"expires is between a second and a hundred years, or None, not {expires!r}")
    return None, milliseconds
