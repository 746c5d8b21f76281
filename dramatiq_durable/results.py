"""Results of actors, kept in Postgres: a back end for Dramatiq's ``Results``, whose results commit with the ack.

backend = durable.results.PostgresBackend(broker)
broker.add_middleware(Results(backend=backend))
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import dramatiq
from dramatiq.common import q_name
from dramatiq.encoder import Encoder
from dramatiq.results import ResultBackend, ResultMissing, ResultTimeout
from dramatiq.results.backend import DEFAULT_TIMEOUT
from dramatiq.results.result import wrap_exception

from .delivery import MAX_PAYLOAD, current_delivery
from .errors import ForbiddenInWorkflow, NotEncodable, PayloadTooLarge
from .operations import Result
from .place import Place, time_to_live
from .watch import Watch
from .workflow.replay import current

if TYPE_CHECKING:
    from .broker import DurableBroker

logger = logging.getLogger(__name__)

#: The most bytes of a result's key.
MAX_KEY = 1000


class PostgresBackend(ResultBackend):
    """Keeps results in the namespace of a broker.

    What an actor returns under a `DurableBroker` on the same namespace is stored in the same commit as the ack, so that
    a result is there exactly when its message is done.  Waiting costs a process one listening connection, however many
    of its threads wait.

    Parameters:
      broker(DurableBroker | str | None): whose namespace: a broker, or a database's URL; by default Dramatiq's global
        broker.  Does no I/O before the first use.
      url(str | None): the database's URL by its name, as Dramatiq's own back ends have it.
      namespace(str): a prefix of the results' keys, as for Dramatiq's own back ends.
      encoder(Encoder | None): how values become bytes; by default Dramatiq's global encoder.
      use_namespace_prefix_keys(bool): as for Dramatiq's own back ends.
    """

    def __init__(
        self,
        broker: DurableBroker | str | None = None,
        *,
        url: str | None = None,
        namespace: str = "dramatiq-results",
        encoder: Encoder | None = None,
        use_namespace_prefix_keys: bool = False,
    ) -> None:
        super().__init__(namespace=namespace, encoder=encoder, use_namespace_prefix_keys=use_namespace_prefix_keys)
        self.place = Place(broker, url)

    def get_result(self, message: dramatiq.Message[Any], *, block: bool = False, timeout: int | None = None) -> Any:
        """The result of a message.

        Parameters:
          message(Message): whose.
          block(bool): wait for it.
          timeout(int | None): how long to wait at the most, in milliseconds; 10 seconds by default.

        Raises:
          ResultMissing: it is not there, and block is False.
          ResultTimeout: it did not come in time.
          ResultFailure: the actor failed, and that is its result.
          DatabaseUnavailable, NotPermitted: it cannot be looked up.
          CodecFailed: it is an activity's, and this broker has not the codecs that encoded it.
        """
        # What was stored with another queue's messages is no result of this one.
        wanted = self.build_message_key(message), q_name(message.queue_name)
        _outside_of_workflows()
        if not block:
            found = self.place.call(lambda procedures, conn: procedures.get_results(conn, [wanted]))
            if not found:
                raise ResultMissing(message)
            return self._result_of(found[wanted])
        seconds = (DEFAULT_TIMEOUT if timeout is None else timeout) / 1000
        value = Watch.of(self.place.broker).wait(wanted, seconds)
        if value is None:
            raise ResultTimeout(message)
        return self._result_of(value)

    def _result_of(self, value: bytes) -> Any:
        # That of a workflow's activity went through codecs.
        return self.unwrap_result(self.encoder.decode(self.place.broker.codecs.decode(value, "a result")))

    def build_message_key(self, message: Any) -> str:
        """The key of a message's result; a hash where it cannot be kept as it is."""
        key = str(super().build_message_key(message))
        if len(key.encode()) <= MAX_KEY and "\0" not in key:
            return key
        return hashlib.md5(key.encode()).hexdigest()

    def _store(self, message_key: str, result: Any, ttl: int) -> None:
        ttl = time_to_live(ttl)
        delivery = current_delivery.get()
        if delivery is None or not self.place.shared_with(delivery.broker):
            self.place.call(
                lambda procedures, conn: procedures.store_result(conn, message_key, self._encode(result), ttl)
            )
        elif delivery.hooks:
            delivery.leaving().results.append(Result(message_key, self._encode(result), ttl))
        elif not (delivery.settled and message_key == self.build_message_key(delivery)):
            self.place.call(
                lambda procedures, conn: procedures.store_result(conn, message_key, self._encode(result), ttl)
            )
        # What has failed was given its result before its nack: it is on its way with it, or there.

    def _encode(self, result: Any) -> bytes:
        """A result's bytes; of one that cannot be carried, a failure that says so: whoever waits has to know."""
        try:
            value = self.encoder.encode(result)
        except Exception as e:
            error: Exception = NotEncodable(f"the result, of type {type(result).__name__}, cannot be encoded: {e}")
        else:
            if len(value) <= MAX_PAYLOAD:
                return value
            error = PayloadTooLarge(f"the result has {len(value)} bytes, more than {MAX_PAYLOAD}")
        logger.error("a result was not stored: %s", error)
        return self.encoder.encode(wrap_exception(error))


def _outside_of_workflows() -> None:
    if current() is not None:
        raise ForbiddenInWorkflow(
            "inside a workflow you cannot look at results: they could not be replayed. Await "
            "`durable.activity(actor).execute(...)` instead"
        )
