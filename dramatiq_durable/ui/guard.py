"""Who may see the pages, and whose forms are believed.

Three things can go wrong with a page on one's own machine: another site sends a form to it (the origin and a token in
the form are checked), another site's name is made to lead to it (only names of this machine are answered to, unless a
token is asked for), and what is shown runs as code (the policy of every answer allows no script at all).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import time
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SESSION = "dramatiq_durable_session"
FORMS = "dramatiq_durable_forms"

#: How long somebody is known who has given the token, in seconds.
KNOWN = 12 * 3600

#: The least length of a token: it can be tried as often as somebody likes.
LEAST = 16

#: What is answered to whoever has not given the token.
OPEN = ("/login", "/style.css", "/icon.svg")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Another site learns no ids; our own forms still say where they come from.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Secrets:
    """What tells our own from others.

    Parameters:
      token(str | None): what whoever looks has to know; None: nothing.
    """

    def __init__(self, token: str | None) -> None:
        self.token = token
        self._forms = os.urandom(32)

    def is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def session(self) -> str:
        """A cookie for whoever has given the token."""
        until = str(int(time.time()) + KNOWN)
        return f"{until}.{self._sign(until)}"

    def knows(self, session: str) -> bool:
        """Whether a cookie is one of ours, and still good."""
        if self.token is None:
            return True
        until, _, signature = session.partition(".")
        signed = hmac.compare_digest(signature.encode(), self._sign(until).encode())
        return signed and until.isdigit() and int(until) > time.time()

    def _sign(self, until: str) -> str:
        assert self.token is not None
        return hmac.new(self.token.encode(), f"session {until}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def browser(self) -> str:
        """A name for a browser, which its forms are bound to."""
        return base64.urlsafe_b64encode(os.urandom(18)).decode()

    def form(self, browser: str) -> str:
        """What a browser's forms carry."""
        return hmac.new(self._forms, browser.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def is_form(self, browser: str, given: str) -> bool:
        return bool(browser) and hmac.compare_digest(given.encode("utf-8", "replace"), self.form(browser).encode())


def is_same_origin(request: Request) -> bool:
    """Whether a form came from one of our own pages; browsers always say."""
    try:
        return urlsplit(request.headers.get("origin", "")).netloc == request.headers.get("host", "") != ""
    except ValueError:
        return False


def is_loaded_elsewhere(request: Request) -> bool:
    """Whether another site loads a page of ours as a part of its own, as an image or in a frame: it would see nothing,
    but have the database work.  Its links may lead here."""
    if request.headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return False
    asked = request.headers.get("sec-fetch-mode"), request.headers.get("sec-fetch-dest")
    return asked != ("navigate", "document")


class Guard:
    """What is in front of all pages.

    Parameters:
      hosts(frozenset[str] | None): the names that are answered to; None: all.
    """

    def __init__(self, app: ASGIApp, secrets: Secrets, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._secrets = secrets
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refused(Request(scope))
        await (self._app if refused is None else refused)(scope, receive, sending)

    def _refused(self, request: Request) -> Response | None:
        if self._hosts is not None and _host_of(request) not in self._hosts:
            return PlainTextResponse("ask for localhost, or start this with a token", 421)
        if is_loaded_elsewhere(request):
            return PlainTextResponse("this page is no part of another site's", 403)
        # As the routes have it: a URL is made of what the client says is its host, too.
        if request.scope["path"] in OPEN or self._secrets.knows(request.cookies.get(SESSION, "")):
            return None
        if request.method in ("GET", "HEAD"):
            path, query = request.scope["path"], request.scope["query_string"].decode("latin-1")
            wanted = {} if path == "/" else {"next": f"{path}?{query}" if query else path}
            return RedirectResponse("/login" + ("?" + urlencode(wanted, errors="replace") if wanted else ""), 303)
        return PlainTextResponse("the token comes first: /login", 401)


def _host_of(request: Request) -> str | None:
    try:
        return urlsplit("//" + request.headers.get("host", "")).hostname
    except ValueError:
        return None
