"""The pages as a Starlette application."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ..cli.target import Target
from ..database import translate
from ..errors import (
    DatabaseUnavailable,
    DurableError,
    EscalationNotFound,
    NotConfigured,
    NotPermitted,
    SchemaOutOfDate,
    WorkflowNotFound,
)
from . import people, queues, runs
from .guard import FORMS, KNOWN, LEAST, SESSION, Guard, Secrets, is_same_origin
from .html import tag
from .page import BadRequest, Go, Handler, Missing, Page, View, box, document, field_
from .style import ICON, SHEET

#: The most bytes of a form, and the most fields.
MOST = 2_000_000
MOST_FIELDS = 200

#: How many pages are made at once; each has one connection at the most.
THREADS = 8

#: The longest that the database may take over a statement, in seconds.
PATIENCE = 10

PAGES: dict[str, Handler] = {
    "/runs": runs.runs,
    "/runs/{run_id}": runs.run,
    "/streams": queues.streams,
    "/stream": queues.stream,
    "/dead-letters": queues.dead_letters,
    "/dead-letters/{number}": queues.dead_letter,
    "/workers": queues.workers,
    "/workers/{number}": queues.worker,
    "/schedules": queues.schedules,
    "/escalations": people.escalations,
    "/escalations/{id}": people.escalation,
}
ACTIONS: dict[str, Handler] = {
    "/stream/pause": queues.pause,
    "/stream/resume": queues.resume,
    "/dead-letters/redrive": queues.redrive,
    "/dead-letters/drop": queues.drop,
    "/escalations/{id}/claim": people.claim,
    "/escalations/{id}/release": people.release,
    "/escalations/{id}/resolve": people.resolve,
}


#: Addresses that lead to a page of ours, and nowhere else whatever follows.
_INSIDE = re.compile(r"/(runs|streams?|dead-letters|workers|schedules|escalations)([/?][\x21-\x5b\x5d-\x7e]{0,2000})?")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def create_app(
    target: Target, *, host: str = "127.0.0.1", token: str | None = None, allow_actions: bool = False
) -> Guard:
    """The application.

    Parameters:
      target(Target): what is shown.
      host(str): where it listens.
      token(str | None): what whoever looks has to know; at least 16 characters.  None is for this machine alone, and
        then only its own names are answered to.
      allow_actions(bool): offer what changes something: pausing, redriving, dropping, claiming, resolving.

    Raises:
      ValueError: the token is too short, or missing where others can reach the host.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"others can reach {host}: a token is needed")
    if token is not None and len(token) < LEAST:
        raise ValueError(f"the token is too short: {LEAST} characters are the least")
    secrets = Secrets(token)
    hosts = frozenset({"localhost", "127.0.0.1", "::1", host}) if token is None else None
    shown = Shown(target, secrets, allow_actions)
    routes = [Route("/", _first), Route("/style.css", _style), Route("/icon.svg", _icon)]
    # What has a name of its own comes before what stands for any.
    routes += [Route(path, shown.acting(handler), methods=["POST"]) for path, handler in ACTIONS.items()]
    routes += [Route(path, shown.showing(handler)) for path, handler in PAGES.items()]
    routes += [Route("/login", shown.login, methods=["GET", "POST"])]
    # Around all of it: what fails is answered with its headers, too.
    failing = {404: shown.missing, 405: shown.looking, 500: shown.broken}
    app = Starlette(routes=routes, exception_handlers=failing)
    # It would lead to whatever the request calls its host.
    app.router.redirect_slashes = False
    return Guard(app, secrets, hosts)


class Shown:
    """Makes pages of what they are asked for."""

    def __init__(self, target: Target, secrets: Secrets, allow_actions: bool) -> None:
        self._target = target
        self._secrets = secrets
        self._allow_actions = allow_actions
        target.broker.database.longest = PATIENCE * 1000
        self._threads = ThreadPoolExecutor(THREADS, "ui")

    def showing(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """An address that shows something."""

        async def show(request: Request) -> Response:
            return await self._answer(request, handler, {})

        return show

    def acting(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """An address that does something, for our own forms."""

        async def act(request: Request) -> Response:
            if not self._allow_actions:
                return self._page(request, _refused("Nothing can be changed here: start it with --allow-actions."))
            form = await self._form(request)
            if form is None:
                return self._page(request, _refused("This form is none of ours, or it is old: go back, and reload."))
            return await self._answer(request, handler, form)

        return act

    async def login(self, request: Request) -> Response:
        """Where the token is given."""
        wanted = request.query_params.get("next", "")
        if self._secrets.token is None:
            return RedirectResponse(_inside(wanted), 303)
        wrong: str | None = None
        if request.method == "POST":
            form = await self._form(request)
            wanted = "" if form is None else form.get("next", [""])[0]
            if form is not None and self._secrets.is_token(form.get("token", [""])[0].strip()):
                answer = RedirectResponse(_inside(wanted), 303)
                secure = request.headers.get("origin", "").startswith("https:")
                # Lax: links to a run, from an alert or a chat, lead there.
                answer.set_cookie(SESSION, self._secrets.session(), KNOWN, httponly=True, samesite="lax", secure=secure)
                return answer
            wrong = "That is not the token." if form is not None else "Try again."
        hidden = tag("input", type="hidden", name="form_token", value=self._secrets.form(self._browser(request)))
        then = tag("input", type="hidden", name="next", value=_inside(wanted))
        field = field_("Token", "token", None, type="password", required=True, autocomplete="current-password")
        body = [
            None if wrong is None else box(wrong, bad=True),
            tag("form", hidden, then, field, tag("button", "Go on"), method="post", action="/login", class_="act"),
            tag(
                "p",
                "It is the DRAMATIQ_DURABLE_UI_TOKEN of whoever started this, or else was written there.",
                class_="soft",
            ),
        ]
        return self._page(request, Page("Token", body, "", status=403 if wrong else 200))

    async def missing(self, request: Request, error: Exception) -> Response:
        return self._page(request, _sorry("There is no such page", request.scope["path"], 404))

    async def looking(self, request: Request, error: Exception) -> Response:
        answer = self._page(request, _sorry("That is not done here", f"{request.method} {request.scope['path']}", 405))
        if isinstance(error, HTTPException):
            answer.headers.update(error.headers or {})
        return answer

    async def broken(self, request: Request, error: Exception) -> Response:
        why = f"{type(error).__name__}: whoever runs this page has more in its log"
        return self._page(request, _sorry("Something is wrong here", why, 500))

    async def _form(self, request: Request) -> dict[str, list[str]] | None:
        """A form's fields; None where it is none of ours."""
        if not is_same_origin(request):
            return None
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST:
                return None
        try:
            form = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MOST_FIELDS)
        except ValueError:
            return None
        given = form.get("form_token", [""])[0]
        return form if self._secrets.is_form(request.cookies.get(FORMS, ""), given) else None

    async def _answer(self, request: Request, handler: Handler, form: dict[str, list[str]]) -> Response:
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(self._threads, self._done, self._view(request, form), handler)
        return RedirectResponse(done.address, 303) if isinstance(done, Go) else self._page(request, done)

    def _done(self, view: View, handler: Handler) -> Page | Go:
        given = [*view.query.values(), *view.path.values(), *(v for values in view.form.values() for v in values)]
        if any("\0" in text for text in given):
            return _sorry("That makes no sense", "a NUL is in no name and no value", 400)
        try:
            return handler(view)
        except psycopg.Error as e:
            error: Exception = translate(e)
        except (DurableError, BadRequest, Missing, ValueError) as e:
            error = e
        if isinstance(error, (Missing, WorkflowNotFound, EscalationNotFound)):
            return _sorry("There is nothing here", str(error), 404)
        if isinstance(error, (BadRequest, ValueError)):
            return _sorry("That makes no sense", str(error), 400)
        if isinstance(error, NotPermitted):
            return _sorry("That is not there, or not for this login", str(error), 403)
        if isinstance(error.__cause__, psycopg.errors.QueryCanceled):
            why = f"The database was not done after {PATIENCE} seconds: name a status, a workflow, an actor, a time."
            return _sorry("That takes too long", why, 503)
        if isinstance(error, (DatabaseUnavailable, SchemaOutOfDate, NotConfigured)):
            why = str(error).rstrip(".")
            return _sorry("The database cannot be used", f"{why}. Once that is mended, load this page again.", 503)
        return _sorry("That did not work", str(error), 500)

    def _page(self, request: Request, page: Page) -> Response:
        browser = self._browser(request)
        answer = HTMLResponse(document(page, self._view(request, {})), page.status)
        if request.cookies.get(FORMS) != browser:
            secure = request.headers.get("origin", "").startswith("https:")
            answer.set_cookie(FORMS, browser, httponly=True, samesite="strict", secure=secure)
        return answer

    def _view(self, request: Request, form: dict[str, list[str]]) -> View:
        token = self._secrets.form(self._browser(request))
        return View(self._target, self._allow_actions, token, request.path_params, request.query_params, form)

    def _browser(self, request: Request) -> str:
        """What this browser is called, from its first page on."""
        if not hasattr(request.state, "browser"):
            request.state.browser = request.cookies.get(FORMS) or self._secrets.browser()
        return str(request.state.browser)


def _inside(address: str) -> str:
    """Where somebody wanted to go, if that is a page of ours."""
    return address if _INSIDE.fullmatch(address) else "/runs"


def _sorry(title: str, why: str, status: int) -> Page:
    return Page(title, box(tag("p", why), bad=True), "/runs", status)


def _refused(why: str) -> Page:
    return _sorry("Refused", why, 403)


async def _first(request: Request) -> Response:
    return RedirectResponse("/runs", 303)


async def _style(request: Request) -> Response:
    return Response(SHEET, media_type="text/css", headers={"Cache-Control": "max-age=300"})


async def _icon(request: Request) -> Response:
    return Response(ICON, media_type="image/svg+xml", headers={"Cache-Control": "max-age=300"})
