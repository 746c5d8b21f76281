"""Escalations: what workflows wait for people to do."""

from __future__ import annotations

import json
from typing import Any

from .. import escalations as all_escalations
from ..errors import EscalationConflict
from ..escalations import STATUSES, Escalation
from .html import Child, link, tag
from .page import (
    BadRequest,
    Go,
    Page,
    View,
    action,
    ago,
    box,
    choice,
    facts,
    field_,
    filters,
    pager,
    section,
    short,
    state,
    table,
    value,
)  # fmt: skip

#: How many a page has.
ROWS = 50

#: However it stands; without a word, those that wait are meant.
ANY = "any"

#: What `field_` takes for whoever does something.
_WHO: dict[str, Any] = {"required": True, "maxlength": 200, "autocomplete": "username"}

DONE = {"claimed": "It is claimed.", "released": "It is nobody's again.", "resolved": "It is resolved."}


def escalations(view: View) -> Page:
    """Those that match, by priority and age."""
    role, subject, type = view.given("role"), view.given("subject"), view.given("type")
    status, after = view.given("status") or "waiting", view.given("after")
    try:
        found = all_escalations.list(
            role=role, subject=subject, type=type, status=None if status == ANY else status,  # type: ignore[arg-type]
            limit=ROWS + 1, after=after, broker=view.broker,
        )  # fmt: skip
    except ValueError as e:
        raise BadRequest(str(e)) from None
    columns = ("escalation", "role", "type", "#priority", "status", "opened", "times out", "claimed by", "workflow id")
    rows = [
        (
            link(short(known.subject) or known.id, f"/escalations/{known.id}"),
            known.role,
            known.type,
            known.priority,
            state(known.status),
            ago(known.opened_at),
            ago(known.times_out_at),
            known.claimed_by,
            link(known.workflow_id, f"/runs/{known.run_id}"),
        )
        for known in found[:ROWS]
    ]
    query = {"role": role, "subject": subject, "type": type, "status": status}
    return Page(
        "Escalations",
        [
            filters(
                "/escalations",
                field_("Role", "role", role),
                choice("Status", "status", (*STATUSES, ANY), status, none=""),
                field_("Subject", "subject", subject),
                field_("Type", "type", type),
            ),
            table("Escalations", columns, rows, "There are no such escalations."),
            pager("/escalations", query, "after", after is None, found[ROWS - 1].id if len(found) > ROWS else None),
        ],
        "/escalations",
    )


def escalation(view: View) -> Page:
    """One of them, and what can be done with it."""
    known = all_escalations.get(view.path["id"], broker=view.broker)
    return shown(view, known, DONE.get(view.given("done") or ""))


def shown(view: View, known: Escalation, said: str | None, *, bad: bool = False, answer: str = "") -> Page:
    """The page of one.

    Parameters:
      said: what became of what was done last.
      bad: that was not what was wanted.
      answer: what stays in the field for the answer.
    """
    title = f"{known.role}: {known.subject}" if known.subject else known.role
    return Page(
        title,
        [
            None if said is None else box(tag("p", said), bad=bad),
            facts(
                ("status", state(known.status)),
                ("id", known.id),
                ("run", link(known.workflow_id, f"/runs/{known.run_id}")),
                ("workflow", known.workflow),
                ("type", known.type),
                ("priority", known.priority),
                ("opened", ago(known.opened_at)),
                ("times out", ago(known.times_out_at)),
                ("claimed by", known.claimed_by),
                ("claimed until", ago(known.claimed_until)),
                ("closed", ago(known.closed_at)),
                ("resolved by", known.resolved_by),
            ),
            section("What is asked", value(known.payload)),
            section("Metadata", value(known.metadata)) if known.metadata else None,
            section("Answer", value(known.result)) if known.status == "resolved" else None,
            _actions(view, known, answer) if known.closed_at is None and view.allow_actions else None,
        ],
        "/escalations",
        status=409 if bad else 200,
    )


def _actions(view: View, known: Escalation, answer: str) -> Child:
    here, who = f"/escalations/{known.id}", known.claimed_by or view.filled("by")
    for_ = field_("For (such as 30 minutes; nothing: until it is released)", "timeout", None)
    hint = tag("p", 'Text needs quotes of its own: "approved"; nothing at all is null.', id="json", class_="soft")
    area = tag(
        "textarea", "\n", answer, id="payload", name="payload", rows=5, spellcheck="false", aria_describedby="json"
    )
    release = action(view, f"{here}/release", "Release", field_("By", "by", who, id="release-by", **_WHO))
    return [
        section("Resolve", action(
            view, f"{here}/resolve", "Resolve",
            tag("div", tag("label", "Answer, as JSON", for_="payload"), area, hint), field_("By", "by", who, **_WHO),
        )),
        section("Claim", action(
            view, f"{here}/claim", "Claim", field_("By", "by", who, id="claim-by", **_WHO), for_,
        )),
        section("Release", release) if known.claimed_by else None,
    ]  # fmt: skip


# --- acting ---------------------------------------------------------------------------------------------------


def claim(view: View) -> Page | Go:
    """Claim one, so that nobody else does the same."""
    id, by, timeout = view.path["id"], _by(view), view.filled("timeout") or None
    return _done(view, "claimed", lambda: all_escalations.claim(id, by=by, timeout=timeout, broker=view.broker))


def release(view: View) -> Page | Go:
    """Give one back."""
    id, by = view.path["id"], _by(view)
    return _done(view, "released", lambda: all_escalations.release(id, by=by, broker=view.broker))


def resolve(view: View) -> Page | Go:
    """Answer, and wake the workflow."""
    id, by, text = view.path["id"], _by(view), view.filled("payload")
    try:
        payload = json.loads(text) if text else None
    except (ValueError, RecursionError) as e:
        known = all_escalations.get(id, broker=view.broker)
        return shown(view, known, f"The answer is no JSON ({e}).", bad=True, answer=text)
    return _done(view, "resolved", lambda: all_escalations.resolve(id, payload, by, broker=view.broker), text)


def _done(view: View, done: str, act: Any, answer: str = "") -> Page | Go:
    id = view.path["id"]
    try:
        known: Escalation = act()
    except EscalationConflict as e:
        return shown(view, all_escalations.get(id, broker=view.broker), str(e), bad=True, answer=answer)
    except ValueError as e:
        raise BadRequest(str(e)) from None
    return Go(f"/escalations/{known.id}?done={done}")


def _by(view: View) -> str:
    by = view.filled("by")
    if not by:
        raise BadRequest("say who you are: by")
    return by
