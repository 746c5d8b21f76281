"""Calls of actors in an environment: attempt after attempt, as the actor's options or its policy say."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from dramatiq import Message
from dramatiq.middleware import Interrupt, Retries

from ..attempt import judge
from ..codecs import Codecs
from ..delivery import Delivery, current_delivery
from ..errors import DurableError, NotEncodable, PayloadTooLarge
from ..operations import Beat, Defer, Operation
from ..workflow import retry

if TYPE_CHECKING:
    from .environment import Entry, Environment


class Attempt:
    """One attempt: its delivery, and the turns that its code takes.

    Attributes:
      waits(bool): its code has ended, and whoever has its token ends it.
    """

    def __init__(self, of: Performing, delivery: Delivery) -> None:
        self.of = of
        self.delivery = delivery
        self.waits = False
        self._entry: Entry | None = None
        self.turns = of.environment.turns_of(self._run)

    def take_turn(self) -> None:
        """Let the code run until it sleeps or ends."""
        self.turns.take()
        self._after_turn()

    def interrupt(self, interruption: type[Interrupt]) -> None:
        """End its sleep with an exception."""
        if self._entry is not None:
            self._entry.dropped = True
        self.delivery.interruption = interruption
        self.turns.interrupt(interruption)
        self._after_turn()

    def _after_turn(self) -> None:
        if not self.turns.ended:
            self._entry = self.of.environment.at(self.turns.wakes_at, self.take_turn)
        elif self.of.now is self:
            self.of._ended(self)
        # else its time was over: what comes of it is not recorded

    def _run(self) -> Any:
        current_delivery.set(self.delivery)
        return self.of._call()


class Performing:
    """An actor, or a mock, that is called until it succeeds or has failed for good.

    Attributes:
      now(Attempt | None): the attempt that counts; none between two.
      attempt(int): how many there were; ``last_failure(str | None)``: of the one before.
    """

    #: When the next attempt begins.
    entry: Entry

    def __init__(self, environment: Environment, actor: Any, call: Callable[..., Any], message: Message[Any]) -> None:
        self.environment = environment
        self.actor = actor
        self.call = call
        self.message = message
        self.name = message.actor_name
        self.attempt = 0
        self.now: Attempt | None = None
        self.last_failure: str | None = None
        self.stage = Stage(self)

    def _begin(self) -> None:
        self.attempt += 1
        self.now = Attempt(self, self._deliver())
        self.now.take_turn()

    def try_again(self, delay_ms: int) -> None:
        """Have the next attempt begin later."""
        self.now = None
        self.entry = self.environment.at(self.environment.now_ms + delay_ms, self._begin)

    def _ended(self, attempt: Attempt) -> None:
        error = attempt.turns.error
        if error is None:
            try:
                self._completed(attempt.turns.value)
                return
            except (NotEncodable, PayloadTooLarge) as e:
                error = e
        if not isinstance(error, (Exception, Interrupt)):
            raise error  # the test's own: it has failed, or was skipped or interrupted
        self.last_failure = f"{type(error).__name__}: {error}"
        delay, hopeless = self._judge(attempt.delivery, error)
        if delay is None:
            self._failed(error, hopeless)
        else:
            self.try_again(delay)

    def _judge(self, delivery: Delivery, error: BaseException) -> tuple[int | None, bool]:
        """In how many milliseconds it is tried again, if at all; and whether it has failed for good."""
        if delivery.interruption is not None:
            return None, True
        policy = delivery.options.get(retry.OPTION)
        if policy:
            judge(delivery, policy, error)
        else:
            self._ask_middleware(delivery, error)
        delay: int | None = delivery.retry
        asked = retry.asked_delay(error)
        throws = None if self.actor is None else self.actor.options.get("throws")
        return delay if delay is None or asked is None else asked, delivery.hopeless or bool(
            throws and isinstance(error, throws)
        )

    def _ask_middleware(self, delivery: Delivery, error: BaseException) -> None:
        chance = random.getstate()
        # Dramatiq's backoff is random: not in a test.
        random.seed(f"{self.message.message_id}:{self.attempt}")
        try:
            for each in self.stage.middleware:
                if isinstance(each, Retries):
                    try:
                        raise error  # the middleware formats the exception that is being handled
                    except BaseException:
                        each.after_process_message(self.stage, delivery, exception=error)
        finally:
            random.setstate(chance)

    # --- what it is ----------------------------------------------------------------------------------------

    def _deliver(self) -> Delivery:
        """What the next attempt is given."""
        raise NotImplementedError

    def _call(self) -> Any:
        """Call the function, on the thread of its turns."""
        raise NotImplementedError

    def _completed(self, value: Any) -> None:
        raise NotImplementedError

    def _failed(self, error: BaseException, hopeless: bool) -> None:
        raise NotImplementedError

    def beat(self, details: bytes | None) -> None:
        """It has sent a heartbeat."""

    def deferred(self, digest: bytes) -> bool:
        """It is to be ended by whoever has the token of this digest."""
        return False


class Stage:
    """What a delivery of an environment has for a broker: enough to decide on retries, and to take heartbeats."""

    claimer = None
    #: It remembers no runs, whose fields the logs would say.
    runner = None
    #: What an attempt says goes to nobody.
    codecs = Codecs()

    def __init__(self, of: Performing) -> None:
        self._of = of
        self.middleware = [Retries()] if of.actor is None else of.actor.broker.middleware
        self.commit = self

    @property
    def actors(self) -> dict[str, Any]:
        return {self._of.name: self._of.actor}

    def get_actor(self, name: str) -> Any:
        actor = self._of.actor
        return actor if name == self._of.name and actor is not None else _Elsewhere()

    def enqueue(self, delivery: Any, *, delay: int | None = None) -> Any:
        delivery.retry = delay or 0
        return delivery

    def post(self, beat: Beat) -> None:
        # An attempt whose time is over has nothing to say any more.
        if self._of.now is not None and self._of.now.delivery is current_delivery.get():
            # Seconds of this machine are not the environment's: each heartbeat counts.
            self._of.now.delivery.said = float("-inf")
            self._of.beat(beat.payload)

    def submit(self, operation: Operation) -> bool:
        if not isinstance(operation, Defer):
            self._refuse(type(operation).__name__)
        return self._of.deferred(operation.token)

    def __getattr__(self, name: str) -> Any:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise DurableError(
            "a test's Environment has no database: mock the activity that needs one, or test it with the fixtures "
            f"durable_broker and durable_worker (it asked for {name!r})."
        )


class _Elsewhere:
    """An actor whose code is not here, or that is only told of a failure."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def send(self, *args: Any, **kwargs: Any) -> None:
        pass


def function_of(actor: Any) -> Callable[..., Any]:
    """The function behind an actor: the ``async def`` itself, where Dramatiq has put one into a plain function."""
    fn: Callable[..., Any] = actor.fn
    inner = getattr(fn, "__wrapped__", None)
    return inner if inner is not None and inspect.iscoroutinefunction(inner) else fn
