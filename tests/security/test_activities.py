"""What a login can do to the activities of others: nothing; but a token is its bearer's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from dramatiq_durable.arrays import Blobs, Uuid, Uuids
from dramatiq_durable.operations import Defer, FinishActivity, Park
from tests.sql.api import Claimed, Session, Worker, new_id

from .conftest import Grant
from .scene import Scene, everything, refusal, set_up

DIGEST = hashlib.sha256(b"secret").digest()


@pytest.fixture
def scene(db: Session, grant: Grant) -> Scene:
    return set_up(db, grant)


def lease(claimed: Claimed) -> tuple[Any, Any]:
    return Uuid(claimed.message_id), Uuid(claimed.lease)


def leases(claimed: Claimed) -> tuple[Any, Any]:
    return Uuids([claimed.message_id]), Uuids([claimed.lease])


CALLS: dict[str, Callable[[Worker, Claimed], Any]] = {
    "start": lambda w, c: w.call("start_activities", *leases(c)),
    "beat": lambda w, c: w.call("beat_activities", *leases(c), Blobs([b"1"])),
    "doomed": lambda w, c: w.call("doomed_activities", *leases(c)),
    "look": lambda w, c: w.call("activity_of_lease", *lease(c)),
    "expire": lambda w, c: w.call("expire_activities", *leases(c)),
    "defer": lambda w, c: w.call("defer_activity", *lease(c), b"digest"),
    "park": lambda w, c: w.call("park_activities", *leases(c)),
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_foreign_lease_is_like_none(scene: Scene, name: str) -> None:
    worker = scene.attacker.register(scene.mine)
    before = everything(scene.db)
    none = scene.activity._replace(message_id=new_id(), lease=new_id())
    call = CALLS[name]
    assert refusal(lambda: call(worker, scene.activity)) == refusal(lambda: call(worker, none))
    assert everything(scene.db) == before


def test_a_foreign_run_waits_for_nothing(scene: Scene) -> None:
    assert scene.db.call("pending_of", Uuid(scene.run)) != []
    assert scene.attacker.call("pending_of", Uuid(scene.run)) == scene.attacker.call("pending_of", Uuid(new_id())) == []


def test_a_token_is_its_bearer_s(scene: Scene) -> None:
    activity = scene.activity
    assert scene.victim.operate(Defer(activity.message_id, activity.lease, DIGEST))
    assert scene.victim.operate(Park(activity.message_id, activity.lease))
    before = everything(scene.db)
    for digest in (b"", b"x" * 32, hashlib.sha256(b"guess").digest()):
        finish = FinishActivity(scene.run, 1, digest, "ActivityCompleted", b"1", None)
        assert scene.attacker.operate(finish) == "missing"
        assert scene.attacker.call("beat_by_token", Uuid(scene.run), 1, digest, b"1")[0][0] == "missing"
        assert scene.attacker.call("attempt_of_token", Uuid(scene.run), 1, digest) == []
    for wrong in (
        FinishActivity(scene.run, 2, DIGEST, "ActivityCompleted", b"1", None),
        FinishActivity(new_id(), 1, DIGEST, "ActivityCompleted", b"1", None),
        FinishActivity(scene.run, 1, DIGEST, "CancelRequested", b"1", None),
    ):
        assert scene.attacker.operate(wrong) == "missing"
    assert everything(scene.db) == before
    # Whoever has it needs no grant: that is what it is for.
    finish = FinishActivity(scene.run, 1, DIGEST, "ActivityCompleted", b"1", None)
    assert scene.attacker.call("beat_by_token", Uuid(scene.run), 1, DIGEST, b"1")[0][0] == "ok"
    assert scene.attacker.operate(finish) == "ok"
    assert [row[1:3] for row in scene.db.inbox(scene.run)][-1] == ("ActivityCompleted", 1)
    assert scene.attacker.operate(finish) == "missing"


def test_tokens_are_not_stored(scene: Scene) -> None:
    scene.victim.operate(Defer(scene.activity.message_id, scene.activity.lease, DIGEST))
    assert scene.db.sql("SELECT token FROM durable.activity") == [(DIGEST,)]
    with pytest.raises(Exception, match="permission denied"):
        scene.attacker.sql("SELECT * FROM durable.activity")
