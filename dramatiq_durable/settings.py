"""The settings that come from the environment, read once and checked before anything is done with them."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar, cast

from .durations import parse_duration
from .errors import NotConfigured
from .telemetry import LEVELS, Level

T = TypeVar("T")

logger = logging.getLogger(__name__)

PREFIX = "DRAMATIQ_DURABLE_"

URL_EXAMPLE = "postgresql://user:password@localhost:5432/database"


def check_url(url: str, *, name: str = PREFIX + "URL") -> str:
    """Return ``url`` without surrounding blanks, if it looks like the URL of a Postgres database.

    The check is of the form only: nothing is connected.  No part of the URL that may be a password, or a piece of
    one, is ever in the message.

    Parameters:
      url(str): what somebody set.
      name(str): where it was set, for the message.

    Raises:
      NotConfigured: it is no such URL; the message says why, and what one looks like.
    """

    def refuse(why: str) -> NotConfigured:
        return NotConfigured(f"{name} is no URL of a Postgres database: {why}. It looks like {URL_EXAMPLE}.")

    url = url.strip()
    scheme, separator, rest = url.partition("://")
    if not url:
        raise refuse("it is empty")
    if not separator:
        raise refuse("it does not start with postgresql://")
    if scheme.lower() not in ("postgresql", "postgres"):
        dialect = scheme.lower().startswith(("postgresql+", "postgres+"))
        # What stands before :// is a scheme only where it looks like one.
        shown = f"with {scheme}://" if re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]{0,19}", scheme) else "otherwise"
        raise refuse(
            f"it starts {shown}, not with postgresql://"
            + (" (leave out the driver, the part from the + on)" if dialect else "")
        )
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise refuse("it has a blank or a control character in it: percent-encode it (a blank is %20)")
    if re.search(r"%(?![0-9a-fA-F]{2})", url) or "%00" in url:
        raise refuse("a % in it is not followed by two hexadecimal digits: a % itself is written %25")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    encode = "percent-encode such characters in user and password (@ is %40, / is %2F, ? is %3F, # is %23, : is %3A)"
    if authority.count("@") > 1:
        raise refuse(f"it has more than one @ before the database: {encode}")
    for host in authority.rpartition("@")[2].split(","):
        matched = re.fullmatch(r"(?:\[[^\[\]]*\]|[^:\[\]]*)(?::(\d*))?", host)
        if matched is None or (matched[1] and not 0 < int(matched[1]) < 65536):
            raise refuse(f"its port is no number from 1 to 65535, or {encode}")
    return url


def _boolean(text: str) -> bool:
    value = text.lower()
    if value in ("1", "true", "on", "yes"):
        return True
    if value in ("0", "false", "off", "no"):
        return False
    raise ValueError("it is neither on nor off")


def _seconds(text: str) -> float:
    if (milliseconds := parse_duration(text)) == 0:
        raise ValueError("it has to be longer than nothing")
    return milliseconds / 1000


def _seconds_or_off(text: str) -> float | None:
    return None if text.lower() == "off" else _seconds(text)


def _level(text: str) -> Level:
    for level in LEVELS:
        if text.lower() == level:
            return level
    raise ValueError(f"it is none of {', '.join(LEVELS)}")


def _namespace(text: str) -> str:
    from .migrate import check_namespace  # needs psycopg, which reading the settings does not

    return check_namespace(text)


def _modules(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} is no module's name")
    return names


#: What only commands read: their --app, and the token of their page.
_OF_COMMANDS = ("APP", "UI_TOKEN")


def _warn_of_unknown(environ: Mapping[str, str]) -> None:
    """A misspelt setting would be as good as none: another database would be used, say.  It is no error, because an
    environment may be shared with other versions."""
    known = [field.name.strip("_").upper() for field in fields(Settings)]
    for name in sorted(environ):
        setting = name.removeprefix(PREFIX)
        ours = setting in known or setting in _OF_COMMANDS or setting.startswith("TEST_")
        if name.startswith(PREFIX) and not ours:
            near = difflib.get_close_matches(setting, known, n=1)
            meant = f". Did you mean {PREFIX}{near[0]}?" if near else f". The settings are {', '.join(known)}."
            logger.warning("%s is no setting of dramatiq-durable, and is ignored%s", name, meant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set from outside; each field is read from ``DRAMATIQ_DURABLE_<FIELD>``.

    Attributes:
      url(str | None): the database; None stands for the embedded Postgres.
      listen_url(str | None): a database URL for LISTEN, where ``url`` goes through a pooler; None: the same as ``url``.
      namespace(str): the Postgres schema that holds everything of ours.
      import_(tuple): modules that ``dramatiq_durable.app`` imports, comma-separated in ``DRAMATIQ_DURABLE_IMPORT``.
      embedded_dir(Path | None): directory of the embedded Postgres; None: the default one.
      reclaim_delay(float): seconds without a heartbeat after which a worker counts as dead.
      poll_interval(float): seconds between two looks into the database when nothing wakes us.
      prepared_statements(bool): whether the server may prepare statements; off behind PgBouncer.
      deadlock_timeout(float | None): seconds that a workflow's code may run without awaiting; then its task fails,
        and is tried again. ``off``: None, as long as it likes.
      telemetry(str): what is told where the application has set up OpenTelemetry: nothing ("off"), metrics and the
        spans that tell what happened ("info"), or the engine's, too ("debug"). Prometheus's metrics it leaves alone.
    """

    url: str | None = None
    listen_url: str | None = None
    namespace: str = "durable"
    import_: tuple[str, ...] = ()
    embedded_dir: Path | None = None
    reclaim_delay: float = 30.0
    poll_interval: float = 1.0
    prepared_statements: bool = True
    deadlock_timeout: float | None = 5.0
    telemetry: Level = "info"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Return the settings in ``environ``; what is not set there, or empty, has its default.

        Raises:
          NotConfigured: a value is malformed; the message names the variable, the value and an example.
        """

        def read(name: str, parse: Callable[[str], T], default: T, example: str) -> T:
            text = environ.get(PREFIX + name, "").strip()
            if not text:
                return default
            try:
                return parse(text)
            except ValueError as error:
                variable = PREFIX + name
                why = str(error).rstrip(".")
                raise NotConfigured(f"{variable}={text!r}: {why}. For example: {variable}={example}") from None

        def read_url(name: str) -> str | None:
            text = environ.get(PREFIX + name, "").strip()
            return check_url(text, name=PREFIX + name) if text else None

        _warn_of_unknown(environ)
        return cls(
            url=read_url("URL"),
            listen_url=read_url("LISTEN_URL"),
            namespace=read("NAMESPACE", _namespace, "durable", "durable"),
            import_=read("IMPORT", _modules, (), "shop.orders,shop.payments"),
            embedded_dir=read("EMBEDDED_DIR", Path, None, "/var/lib/shop/postgres"),
            reclaim_delay=read("RECLAIM_DELAY", _seconds, 30.0, "30s"),
            poll_interval=read("POLL_INTERVAL", _seconds, 1.0, "0.5"),
            prepared_statements=read("PREPARED_STATEMENTS", _boolean, True, "off"),
            deadlock_timeout=read("DEADLOCK_TIMEOUT", _seconds_or_off, cast("float | None", 5.0), "5s"),
            telemetry=read("TELEMETRY", _level, "info", "debug"),
        )
