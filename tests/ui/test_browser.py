"""The pages in a real browser: colours, widths, keys, forms.  ``UI_PICTURES=DIRECTORY`` keeps what was seen."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from dramatiq_durable import escalations
from tests.support.processes import Processes
from tests.ui.browser import browser
from tests.ui.conftest import Site
from tests.ui.test_command import start

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

#: Of every element with text of its own: how much its colour differs from what is behind it.
CONTRAST = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .03928 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const lum = c => { const [r, g, b] = c.map(linear);
                     return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
                        if (c.length === 3 || c[3] === 1) return c.slice(0, 3) } return [255, 255, 255] };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const a = lum(parse(getComputedStyle(e).color).slice(0, 3)), b = lum(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push([e.tagName, e.className, e.textContent.slice(0, 40), ratio]);
  }
  return bad;
})()
"""

#: What has the focus: its text or name, and whether one sees that it has.
FOCUS = """
(() => { const e = document.activeElement, s = getComputedStyle(e);
  return [e.tagName, e.id || e.textContent.trim(), s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2,
          e.getBoundingClientRect().left >= 0] })()
"""


#: Which element of the page has the focus, by its place; -1: none.
PLACE = """
document.activeElement === document.body ? -1 : [...document.querySelectorAll("*")].indexOf(document.activeElement)
"""


def test_every_page_light_and_dark_narrow_and_wide(site: Site, run_process: Processes, tmp_path: Path) -> None:
    _, address = start(run_process, site.url, "--listen", "127.0.0.1:0", "--allow-actions")
    pictures = Path(os.environ.get("UI_PICTURES", tmp_path))
    (asked,) = escalations.list(run_id=site.runs["ask"])
    pages = {
        "runs": "/runs",
        "wrong-filter": "/runs?where=nonsense",
        "no-runs": "/runs?name=nobody",
        "not-there": "/runs/nobody",
        **{f"run-{name}": f"/runs/{id}" for name, id in site.runs.items()},
        "streams": "/streams",
        "stream": "/stream?name=mail",
        "dead-letters": "/dead-letters",
        "dead-letter": "/dead-letters/1",
        "workers": "/workers",
        "schedules": "/schedules",
        "escalations": "/escalations",
        "escalation": f"/escalations/{asked.id}",
    }
    with browser(tmp_path / "profile") as chromium:
        for dark, width in ((False, 1600), (True, 1600), (False, 375), (True, 375)):
            chromium.look(width, dark)
            for name, path in pages.items():
                chromium.go(address + path)
                assert chromium.ask("document.querySelector('h1') !== null"), path
                assert chromium.ask("document.scripts.length") == 0
                # Tables scroll by themselves, never the page.
                assert chromium.ask("document.documentElement.scrollWidth") <= width, (name, width)
                assert chromium.ask(CONTRAST) == [], (name, dark)
                page = chromium.ask("getComputedStyle(document.body).backgroundColor")
                assert page == ("rgb(20, 23, 28)" if dark else "rgb(251, 251, 250)")
                chromium.picture(pictures / f"{name}-{'dark' if dark else 'light'}-{width}.png")
        wrong = [text for text in chromium.said if not re.search("status of 40[04]", text)]
        assert wrong == []


def test_with_the_keyboard_alone(site: Site, run_process: Processes, tmp_path: Path) -> None:
    _, address = start(run_process, site.url, "--listen", "127.0.0.1:0", "--allow-actions")
    (asked,) = escalations.list(run_id=site.runs["ask"])
    with browser(tmp_path / "profile") as chromium:
        chromium.look(1280, False)
        chromium.go(f"{address}/runs")
        seen: list[Any] = []
        for _ in range(13):
            chromium.press("Tab")
            seen.append(chromium.ask(FOCUS))
        assert all(visible and there for _, _, visible, there in seen), seen
        assert [name for _, name, _, _ in seen[:11]] == [
            "Skip to the content",
            *("Runs", "Streams", "Dead letters", "Workers", "Schedules", "Escalations"),
            *("where", "name", "status", "order"),
        ]
        assert seen[11][:2] == ["BUTTON", "Show"]

        chromium.go(f"{address}/runs")
        chromium.press("Tab")
        chromium.press("Enter", "\r")
        chromium.press("Tab")
        assert chromium.ask(FOCUS)[1] == "where"

        chromium.go(f"{address}/escalations/{asked.id}")
        chromium.ask("document.getElementById('payload').focus()")
        chromium.call("Input.insertText", text='{"ok": true}')
        chromium.press("Tab")
        assert chromium.ask(FOCUS)[1] == "by"
        chromium.call("Input.insertText", text="ann")
        chromium._events.clear()
        chromium.press("Enter", "\r")
        chromium.loaded()
        assert "It is resolved" in chromium.ask("document.body.textContent")
        assert chromium.said == []
    assert escalations.get(asked.id).result == {"ok": True}


@pytest.mark.parametrize("width", [375, 1600])
def test_whatever_has_the_focus_is_seen_in_the_order_of_the_page(
    site: Site, run_process: Processes, tmp_path: Path, width: int
) -> None:
    _, address = start(run_process, site.url, "--listen", "127.0.0.1:0", "--allow-actions")
    (asked,) = escalations.list(run_id=site.runs["ask"])
    with browser(tmp_path / "profile") as chromium:
        chromium.look(width, False)
        for path in (
            *("/runs", f"/runs/{site.runs['good']}", f"/runs/{site.runs['tries']}", "/stream?name=mail"),
            *("/dead-letters", "/dead-letters/1", f"/escalations/{asked.id}"),
        ):
            chromium.go(address + path)
            assert chromium.ask("[...document.querySelectorAll('[tabindex]')].every(e => e.tabIndex <= 0)")
            places: list[int] = []
            while True:
                chromium.press("Tab")
                place = chromium.ask(PLACE)
                if place < 0 or place in places:
                    break
                _, name, visible, there = chromium.ask(FOCUS)
                assert visible, (path, name)
                assert there, (path, name)
                places.append(place)
            assert places == sorted(places), path
            assert len(places) > 8, path
        assert chromium.said == []


def test_the_token_is_given_and_leads_on(site: Site, run_process: Processes, tmp_path: Path) -> None:
    env = {"DRAMATIQ_DURABLE_UI_TOKEN": "a-token-of-some-length"}
    process, address = start(run_process, site.url, "--listen", "127.0.0.1:0", **env)
    with browser(tmp_path / "profile") as chromium:
        for dark, width in ((False, 1600), (True, 375)):
            chromium.look(width, dark)
            chromium.go(f"{address}/runs?status=failed")
            assert chromium.ask("location.pathname") == "/login"
            assert chromium.ask("document.documentElement.scrollWidth") <= width
            assert chromium.ask(CONTRAST) == []
        chromium.ask("document.querySelector('[name=token]').focus()")
        for text, then in (("not-the-token-at-all", "/login"), ("a-token-of-some-length", "/runs?status=failed")):
            chromium.ask("document.querySelector('[name=token]').focus()")
            chromium.call("Input.insertText", text=text)
            chromium._events.clear()
            chromium.press("Enter", "\r")
            chromium.loaded()
            assert chromium.ask("location.pathname + location.search") == then
        assert "a-token" not in chromium.ask("document.documentElement.outerHTML + location.href + document.cookie")
        # It would have a name beside the password; there is none.
        assert [text for text in chromium.said if not re.search(r"status of 403|username fields", text)] == []
    assert "a-token" not in process.output


def test_another_site_cannot_send_its_form(site: Site, run_process: Processes, tmp_path: Path) -> None:
    _, address = start(run_process, site.url, "--listen", "127.0.0.1:0", "--allow-actions")
    (asked,) = escalations.list(run_id=site.runs["ask"])
    evil = tmp_path / "evil.html"
    evil.write_text(
        f"<form method=post action='{address}/escalations/{asked.id}/resolve'><input name=by value=x></form>"
        "<script>document.forms[0].submit()</script>"
    )
    with browser(tmp_path / "profile") as chromium:
        chromium.go(f"{address}/escalations/{asked.id}")
        chromium._events.clear()
        chromium.call("Page.navigate", url=evil.as_uri())
        chromium.loaded()
        while "Refused" not in (chromium.ask("document.title") or ""):
            chromium.loaded()
    assert escalations.get(asked.id).status == "waiting"
