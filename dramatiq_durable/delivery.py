"""Messages in this process: their bytes, their deliveries, and which delivery the current thread is working on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from dramatiq import JSONEncoder, Message
from dramatiq.broker import MessageProxy
from dramatiq.message import get_encoder
from dramatiq.middleware import TimeLimitExceeded

from .errors import ActivityCancelled, NotEncodable, PayloadTooLarge
from .interrupts import Interruptible
from .operations import Leave
from .telemetry.texts import one_line

#: The most bytes of a message.
MAX_PAYLOAD = 16 * 1024 * 1024

#: With this begin the bytes of a message whose row says the rest of it.
PACKED = b'{"args":'

_to_json = json.JSONEncoder(separators=(",", ":")).encode

#: Kinds of messages that carry a run forward, or ask it something; they have no payload of their own.
TASK_KINDS = ("s", "t", "w", "q")

#: Kinds that are no messages for an actor, and take nobody's place: they say that something is due, of a schedule or of
#: an activity's limits.
TICK = "c"
ALARM = "d"

#: The option that carries the limits of an activity.
LIMITS = "durable_limits"

#: The option that tells which run's event an actor is given; a dead letter that is brought back has it, too.
EVENT = "durable_event"

#: The kind of a note to look again whether a run's next event can be sent to a subscriber.
NOTE = "n"
#: The kind of the message by which the database ends a run whose time is over.
DEADLINE = "e"


class Delivery(MessageProxy, Interruptible):
    """A message that this process has leased.

    Attributes:
      broker(DurableBroker): whose delivery it is.
      stream_id(int), key(bytes), lease(bytes): where it lies, its row's id, and the token of this delivery.
      kind(str): m (plain), j (plain, written by SQL as JSON), a (activity), p (event of a topic), s, t, w (tasks of a
        run), q (a query).
      run_id(str | None), seq(int | None): the run and the command that it belongs to.
      attempt(int): counted from 1.
      sealed(bool): it came encoded by codecs: so goes back, and out, all that it has to say.
      reclaimed(bool): it was taken from a dead worker, aborted or redriven: its start has to be recorded.
      result, exception: what came of the actor.
      again(int | None): milliseconds after which the actor itself wants it again.
      retry(int | None): milliseconds after which the retries middleware wants it again.
      left(Leave | None): what it leaves behind, as its hooks decided; it is stored with its end.
      hooks(bool): its hooks are running: what they write belongs to it.
      broken(BaseException | None): a hook failed in a way that forbids the ack.
      taken(float): when a thread took it (by `time.perf_counter`); 0: none did.
      calling(bool): its hooks have run, its actor is called next.
      judged(bool): the hooks behind its actor have run: what becomes of it is decided.
      settled(bool): it was answered for; nothing more may be done under its lease.
      hopeless(bool): another attempt would end in the same way.
      released(bool): it was interrupted because the worker stops: it goes back, and no attempt is counted.
      deferred(bool): whoever has its token ends it, not its actor.
      details(bytes | None), said(float), unsaid(bool): its heartbeat's latest details, when the database was told last
        (by `time.monotonic`), and whether there is something to tell.
      info: what `activity_info()` answers.
      transaction: the open `transaction()` of its actor, if it has one.
      span: of this attempt, while it runs: see `telemetry`.
    """

    # How every delivery begins: on the class, because setting them would cost each message a microsecond.
    result: Any = None
    exception: BaseException | None = None
    again: int | None = None
    retry: int | None = None
    left: Leave | None = None
    broken: BaseException | None = None
    taken = 0.0
    calling = False
    judged = False
    settled = False
    hooks = False
    hopeless = False
    released = False
    deferred = False
    details: bytes | None = None
    said = 0.0
    unsaid = False
    info: Any = None
    transaction: Any = None
    span: Any = None

    def __init__(
        self,
        message: Message[Any],
        broker: Any,
        *,
        stream_id: int,
        key: bytes,
        lease: bytes,
        kind: str = "m",
        run_id: str | None = None,
        seq: int | None = None,
        attempt: int = 1,
        reclaimed: bool = False,
        sealed: bool = False,
    ) -> None:
        super().__init__(message)
        # Hooks ask for these a dozen times a message, and a proxy's way to its message is long.
        self.queue_name = message.queue_name
        self.actor_name = message.actor_name
        self.options = message.options
        self.message_id = message.message_id
        self.broker = broker
        self.stream_id = stream_id
        self.key = key
        self.lease = lease
        self.kind = kind
        self.run_id = run_id
        self.seq = seq
        self.attempt = attempt
        self.reclaimed = reclaimed
        self.sealed = sealed

    @property
    def message(self) -> Delivery:
        """Itself: it stands in a Worker's queue as one of Dramatiq's items would."""
        return self

    def __str__(self) -> str:
        # Logs have it: whoever sent it chose the names of its actor and its arguments.
        return one_line(super().__str__())

    def doom(self, reason: str) -> None:
        """Interrupt an activity that is of no more use: it was "cancelled", or its lease is "gone"."""
        if reason == "cancelled":
            self.interrupt(ActivityCancelled)
        elif not self.deferred:
            # With limits, it is they that have taken its lease.
            self.interrupt(TimeLimitExceeded if LIMITS in self.options else ActivityCancelled)

    def clear_exception(self) -> None:
        """Dramatiq is done with it: what it failed with, and all that its traceback holds, may go."""
        super().clear_exception()
        self.exception = self.broken = None

    def leaving(self) -> Leave:
        """What it leaves behind, to add to."""
        if self.left is None:
            self.left = Leave(self.key, self.lease)
        return self.left


#: The delivery that the current thread (or the event loop's task of an async actor) is processing.
current_delivery: ContextVar[Delivery | None] = ContextVar("current_delivery", default=None)


def key_of(message_id: str) -> bytes:
    """The row's id of a message: its own id where that is a uuid, else one derived from it.

    Version 8 is what the database makes for activities: a plain message with such an id has a row's id of its own.
    """
    if len(message_id) == 36 and message_id[8] == message_id[13] == message_id[18] == message_id[23] == "-":
        try:
            own = bytes.fromhex(message_id.replace("-", ""))
        except ValueError:
            pass
        else:
            if len(own) == 16 and own[6] >> 4 != 8:
                return own
    return uuid.uuid5(uuid.NAMESPACE_OID, message_id).bytes


def id_of(key: bytes) -> str:
    """A row's id as text."""
    text = key.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def encode_message(message: Message[Any] | Delivery, key: bytes | None = None) -> bytes:
    """A message's bytes, as Dramatiq's encoder makes them.

    Where that is Dramatiq's own, and the message goes to a row, the bytes are of what the row does not say by itself:
    its arguments, options and time, as JSON.  From these, and the row, `decode_message` makes the same message again.

    Parameters:
      message: what is encoded.
      key(bytes | None): the id of the row; None: the bytes go elsewhere.

    Raises:
      NotEncodable: the encoder refuses a value; which one is said.
      PayloadTooLarge: the bytes are over the cap.
    """
    try:
        if key is not None and type(get_encoder()) is JSONEncoder and message.message_id == id_of(key):
            rest: dict[str, Any] = {"args": message.args, "at": message.message_timestamp}
            if message.kwargs:
                rest["kwargs"] = message.kwargs
            if message.options:
                rest["options"] = message.options
            payload = _to_json(rest).encode()
        else:
            payload = message.encode()
    except (TypeError, ValueError, OverflowError, AttributeError, RecursionError) as e:
        raise NotEncodable(
            f"the message for {message.actor_name!r} cannot be encoded: {e}. {_blame(message)}Send plain values, or "
            "set another encoder with dramatiq.set_encoder()"
        ) from e
    if len(payload) > MAX_PAYLOAD:
        raise PayloadTooLarge(
            f"the message for {message.actor_name!r} has {len(payload)} bytes, more than {MAX_PAYLOAD}: "
            "keep the data elsewhere and send a reference to it"
        )
    return payload


def decode_message(payload: bytes, kind: str, queue_name: str, actor_name: str, key: bytes) -> Message[Any]:
    """The message of a row.

    Parameters:
      payload(bytes), kind(str), key(bytes): of the row; what SQL wrote (kind ``j``) is JSON, whatever the encoder.
      queue_name(str), actor_name(str): the names that the row's stream and actor have.

    Raises whatever the encoder does for bytes that are not its own.
    """
    rest = _rest(payload) if payload.startswith(PACKED) else None
    if rest is not None:
        kwargs, options = rest.get("kwargs", {}), rest.get("options", {})
        return Message(queue_name, actor_name, tuple(rest["args"]), kwargs, options, id_of(key), rest["at"])
    if kind == "j":
        return Message(**JSONEncoder().decode(payload))
    return Message.decode(payload)


def _rest(payload: bytes) -> dict[str, Any] | None:
    """What a row's payload says; None where it is a whole message, which begins like that in other encoders' JSON."""
    try:
        rest: dict[str, Any] = json.loads(payload.decode())
    except ValueError:
        return None
    return rest if "at" in rest and "actor_name" not in rest else None


def _blame(message: Message[Any] | Delivery) -> str:
    places: Mapping[str, Any] = {
        **{f"argument {n}": value for n, value in enumerate(message.args, 1)},
        **{f"argument {name!r}": value for name, value in message.kwargs.items()},
        **{f"option {name!r}": value for name, value in message.options.items()},
    }
    for place, value in places.items():
        try:
            get_encoder().encode({"value": value})
        except Exception:
            return f"Its {place} is of type {type(value).__name__}. "
    return ""
