"""What happens around an actor: its start is recorded where that matters, and its hooks run as part of its message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dramatiq import Actor
from dramatiq.errors import ActorNotFound
from dramatiq.middleware import Interrupt, MiddlewareError, Retries, SkipMessage
from dramatiq.results import Results

from .attempt import judge
from .calls import Call
from .delivery import LIMITS, Delivery, current_delivery
from .errors import Abort
from .hooks import Hooks
from .operations import MarkStarted, StartActivity
from .results import PostgresBackend
from .workflow import retry

if TYPE_CHECKING:
    from .claimer import Claimer
    from .group_commit import GroupCommit

logger = logging.getLogger(__name__)


class Processing(Hooks):
    """A broker's doings with the delivery that one of its threads processes."""

    commit: GroupCommit

    @property
    def claimer(self) -> Claimer | None:
        """The thread that claims for this process, while it is a worker."""
        raise NotImplementedError

    def _record_start(self, delivery: Delivery) -> None:
        """Say durably that the actor of a reclaimed delivery begins.  Raises SkipMessage if it must not."""
        start = MarkStarted(delivery.key, delivery.lease)
        if not self.commit.submit(start):
            self._lost(delivery)
        if start.aborted:
            delivery.interrupt(Abort)
        if start.anew:
            delivery.options.pop("retries", None)

    def _begin_limited(self, delivery: Delivery) -> None:
        """An activity with limits is about to begin: its attempt's time runs from here.  Raises SkipMessage if it must
        not."""
        if not self.commit.submit(StartActivity(delivery.key, delivery.lease)):
            self._lost(delivery)
        options = delivery.options
        limits = options[LIMITS]
        soonest = min(limits.get(name, 1000) for name in ("start_to_close", "schedule_to_close", "heartbeat"))
        if self.claimer is not None and soonest < 1000:
            # Its alarm may go off before this process would look by itself.
            self.claimer.wake()
        if delivery.attempt > 1 and retry.OPTION not in options:
            # Attempts that a limit ended are none that Dramatiq has counted.
            options["retries"] = max(options.get("retries", 0), delivery.attempt - 1)
        limit = limits.get("start_to_close")
        actor = self.actors.get(delivery.actor_name)
        if limit is not None and "time_limit" not in options and actor and "time_limit" not in actor.options:
            # Dramatiq's own limit of ten minutes, which nobody asked for, does not come before the one that is given.
            options["time_limit"] = limit + 60_000

    def _lost(self, delivery: Delivery) -> None:
        delivery.settled = True
        if self.claimer is not None:
            self.claimer.finished(delivery)
        raise SkipMessage("it was handed to another worker before it began here")

    def get_actor(self, actor_name: str) -> Actor[Any, Any]:
        """The actor of a name; for the delivery that is about to be processed, one that can be interrupted.

        Raises:
          ActorNotFound: there is none.
        """
        try:
            actor = self.actors[actor_name]
        except KeyError:
            raise ActorNotFound(actor_name) from None
        delivery = current_delivery.get()
        if delivery is not None and delivery.calling and delivery.actor_name == actor_name:
            delivery.calling = False
            return Call(actor, delivery)  # type: ignore[return-value]
        return actor

    def _before_process(self, delivery: Delivery) -> None:
        """The actor is about to begin: as Dramatiq does it, but for the middleware that has nothing to do here."""
        for middleware in self.hearing("before_process_message"):
            try:
                middleware.before_process_message(self, delivery)
            except MiddlewareError:
                raise
            except Exception:
                logger.critical("Unexpected failure in before_process_message of %r.", middleware, exc_info=True)

    def _after_process(self, delivery: Delivery, *, result: Any = None, exception: BaseException | None = None) -> None:
        """The actor has ended: its hooks say what becomes of the message."""
        if delivery.kind == "a" and exception is None:
            result = delivery.result
        delivery.result = result
        delivery.exception = exception
        if exception is not None and delivery.transaction is not None:
            delivery.transaction.roll_back()
        delivery.calling = False
        final = exception is not None and (delivery.interruption is not None or delivery.hopeless)
        if final:
            delivery.fail()
        # Whatever was decided by an earlier run of these hooks, which an interrupt cut short, is decided anew.
        delivery.retry = delivery.again
        delivery.left = None
        policy = None if exception is None or final else delivery.options.get(retry.OPTION)
        if exception is not None and policy:
            judge(delivery, policy, exception)
        delivery.hooks = True
        outcome: dict[str, Any] = {"result": result} if exception is None else {"exception": exception}
        try:
            for middleware in reversed(self.hearing("after_process_message")):
                if (final or policy) and isinstance(middleware, Retries):
                    # What was aborted is not tried again, however it ended; a policy has decided by itself.
                    continue
                try:
                    middleware.after_process_message(self, delivery, **outcome)
                except Interrupt as e:
                    # A time limit or shutdown that comes this late must not end the thread with the message in hand.
                    delivery.broken = e
                    logger.warning("%s interrupted the hooks of %r: it will be run again", type(e).__name__, delivery)
                except Exception:
                    logger.critical("Unexpected failure in after_process_message of %r.", middleware, exc_info=True)
            if exception is not None and delivery.kind == "a" and delivery.retry is not None:
                asked = retry.asked_delay(exception)
                delivery.retry = delivery.retry if asked is None else asked
            delivery.judged = True
        finally:
            delivery.hooks = False
            if delivery.span is not None:
                delivery.span.end(delivery, exception)

    def _after_skip(self, delivery: Delivery) -> None:
        with _hooks_of(delivery):
            for middleware in reversed(self.middleware):
                if delivery.settled and isinstance(middleware, Results):
                    # It was lost before it began: its result is for the worker that has it now.
                    continue
                try:
                    middleware.after_skip_message(self, delivery)
                except Exception:
                    logger.critical("Unexpected failure in after_skip_message of %r.", middleware, exc_info=True)
        if delivery.span is not None:
            delivery.span.end(delivery, None)

    def keep_failure(self, delivery: Delivery) -> None:
        """Have a failure stored as its message's result before the nack, so that it commits with it.

        Dramatiq's Results does it after the nack; the back end ignores that.
        """
        for middleware in self.middleware:
            backend = middleware.backend if isinstance(middleware, Results) else None
            if isinstance(backend, PostgresBackend) and backend.place.shared_with(self):
                token = current_delivery.set(delivery)
                try:
                    with _hooks_of(delivery):
                        middleware.after_nack(self, delivery)
                except Interrupt as e:
                    delivery.broken = e
                except Exception:
                    logger.exception("the failure of %r is not stored as its result", delivery)
                finally:
                    current_delivery.reset(token)


@contextmanager
def _hooks_of(delivery: Delivery) -> Iterator[None]:
    """While its hooks run, what they write belongs to the message."""
    delivery.hooks = True
    try:
        yield
    finally:
        delivery.hooks = False
