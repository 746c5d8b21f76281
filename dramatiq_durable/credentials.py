"""The one credential of a scoped worker's process: which it is, and that there is no other beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .errors import NotConfigured
from .settings import Settings, check_url
from .worker_logins import Credential

#: What a broker takes as its credentials.
Credentials = Credential | Mapping[str, Any] | str


def url_of(credentials: Credentials) -> str:
    """The URL of a worker's credentials: a text, a mapping of ``url`` with or without ``role`` and ``password`` (what
    ``dramatiq-durable role provision --json`` prints), or what `provision_worker_role` returns.

    Raises:
      NotConfigured: there is no URL in it, or none that says who logs in.
    """
    name = "the broker's worker_credentials"
    role = password = None
    if isinstance(credentials, Mapping):
        found, role, password = (credentials.get(key) for key in ("url", "role", "password"))
    else:
        found = credentials.url if isinstance(credentials, Credential) else credentials
    if not isinstance(found, str):
        raise NotConfigured(
            f"{name} have no url: give what provision_worker_role() returned, its url, or a mapping with 'url' (and "
            "'role' and 'password' where the url has none)"
        )
    url = check_url(found, name=name)
    user = user_of(url)
    if role is not None:
        if user is not None and user != role:
            raise NotConfigured(f"{name} are of two roles: the url's is {user!r}, 'role' is {role!r}. Give one of them")
        if user is None:
            parts = urlsplit(url)
            who = quote(str(role), safe="") + ("" if password is None else ":" + quote(str(password), safe=""))
            url = urlunsplit(parts._replace(netloc=f"{who}@{parts.netloc}"))
            user = str(role)
    if user is None:
        raise NotConfigured(
            f"{name} do not say who logs in: write the url like postgresql://role:password@host/database"
        )
    return url


def user_of(url: str) -> str | None:
    """Who logs in with a URL; None where it does not say."""
    try:
        user = conninfo_to_dict(url).get("user")
    except psycopg.ProgrammingError:
        return None
    return None if user is None else str(user)


def is_scoped(url: str) -> bool:
    """Whether a URL is that of a login that was provisioned, as far as its name tells."""
    return re.match("dd_[0-9a-f]{12}_", user_of(url) or "") is not None


def check_alone(url: str, settings: Settings) -> None:
    """Refuse other credentials beside a worker's: whoever takes over its process would have those, too.

    Raises:
      NotConfigured: a setting has the URL of another login.
    """
    role = user_of(url)
    for variable, other in (("URL", settings.url), ("LISTEN_URL", settings.listen_url)):
        if other is not None and user_of(other) != role:
            advice = "take it out of the environment of this process"
            if variable == "LISTEN_URL":
                advice += f", or write {role!r} and its password into it"
            raise NotConfigured(
                f"DRAMATIQ_DURABLE_{variable} logs in as {user_of(other)!r} beside the worker's credentials of "
                f"{role!r}, and a scoped worker's process holds no other credential: {advice}"
            )
