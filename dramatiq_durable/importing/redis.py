"""Dramatiq's RedisBroker, as a source.

It keeps a queue as a list of ids and a hash of their messages; the delayed ones likewise, under the queue's name with
``.DQ``; the dead letters as a sorted set, under ``.XQ``.  Who fetches ids moves them to a set of its own, in one step;
an ack removes them there and in the hash.  We fetch and ack the same way, always under the same name, so that the next
import finds what one that died had fetched.  The name has no heartbeat: no worker's maintenance takes it from us.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

from ..errors import ImportFailed, NotConfigured
from .source import Counts, Found, Place, check_scheme, library

#: The worker id that imports fetch as.
OURSELVES = "dramatiq-durable-import"

#: After so many milliseconds without a heartbeat, Dramatiq counts a worker as dead (by default).
HEARTBEAT_TIMEOUT = 60_000

#: The names that Dramatiq allows for queues.
_QUEUE_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9._-]*")

# list, acks, count -> ids
_TAKE = """
local ids = redis.call("lrange", KEYS[1], 0, ARGV[1] - 1)
for _, id in ipairs(ids) do redis.call("sadd", KEYS[2], id) end
redis.call("ltrim", KEYS[1], #ids, -1)
return ids
"""

# acks of a dead worker, our acks, messages, heartbeats; worker, time limit -> how many
_ADOPT = """
local beat = redis.call("zscore", KEYS[4], ARGV[1])
if beat and tonumber(beat) > tonumber(ARGV[2]) then return 0 end
local ids = redis.call("smembers", KEYS[1])
for _, id in ipairs(ids) do
    if redis.call("hexists", KEYS[3], id) > 0 then redis.call("sadd", KEYS[2], id) end
end
redis.call("del", KEYS[1])
return #ids
"""

# acks, messages; ids
_REMOVE = """
for _, id in ipairs(ARGV) do
    if redis.call("srem", KEYS[1], id) > 0 then redis.call("hdel", KEYS[2], id) end
end
"""

# acks, list; ids, to be put back in front
_BACK = """
for n = #ARGV, 1, -1 do
    if redis.call("srem", KEYS[1], ARGV[n]) > 0 then redis.call("lpush", KEYS[2], ARGV[n]) end
end
"""


class RedisSource:
    """The queues of a RedisBroker.

    Parameters:
      url(str): as the RedisBroker has it.
      namespace(str): as the RedisBroker has it.

    Raises:
      NotConfigured: redis-py is missing, or the URL or the login is wrong.
      ImportFailed: the server cannot be reached, or another import is reading from it.
    """

    title = "Redis"
    lists = True

    def __init__(self, url: str, namespace: str = "dramatiq") -> None:
        self._redis = library("redis")
        check_scheme(url, self.title, ("redis", "rediss", "unix"), "redis://:password@localhost:6379/0")
        self._prefix = f"{namespace}:"
        self._heartbeats = f"{self._prefix}__heartbeats__"
        try:
            # No command is repeated behind our back: what a lost answer had fetched would be left behind.
            self.client = self._redis.Redis.from_url(
                url,
                client_name=OURSELVES,
                single_connection_client=True,
                retry=self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0),
                socket_connect_timeout=10,
            )
        except ValueError as e:
            raise NotConfigured(f"the URL of Redis cannot be read: {e}") from e
        except self._redis.RedisError as e:
            raise self._translated(e) from e
        self._scripts = {text: self.client.register_script(text) for text in (_TAKE, _ADOPT, _REMOVE, _BACK)}
        try:
            with self.errors():
                self._be_alone()
                self._look_around()
        except BaseException:
            self.close()
            raise

    def _be_alone(self) -> None:
        """Two imports at once would have what was fetched in common."""
        # One that was killed this very moment is still being noticed.
        patience = time.monotonic() + 2
        while sum(client["name"] == OURSELVES for client in self.client.client_list()) > 1:
            if time.monotonic() > patience:
                raise ImportFailed("another import is reading from this Redis: wait for its end")
            time.sleep(0.05)

    def _look_around(self) -> None:
        """Find the queues, and the sets of ids that workers have fetched: the only look at all of the keys."""
        self._queues: set[str] = set()
        self._fetched: dict[str, list[str]] = {}
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", self._prefix) + "*"
        for key in self.client.scan_iter(match=pattern, count=1000):
            name = key.decode(errors="replace").removeprefix(self._prefix)
            if name.startswith("__acks__."):
                # A worker's id has no dot in it; a queue's name may have some.
                worker, _, name = name.removeprefix("__acks__.").partition(".")
                self._fetched.setdefault(name, []).append(worker)
                name += ".msgs"
            if name.endswith(".msgs") and _QUEUE_NAME.fullmatch(name):
                self._queues.add(re.sub(r"\.[DX]Q$", "", name.removesuffix(".msgs")))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What Redis refuses, as errors that say what to do."""
        try:
            yield
        except self._redis.RedisError as e:
            raise self._translated(e) from e

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, (self._redis.exceptions.AuthenticationError, self._redis.exceptions.NoPermissionError)):
            return NotConfigured(f"Redis refused the login ({error}): check user and password in its URL")
        said = str(error).rstrip(".")
        return ImportFailed(f"Redis failed: {said}. Is it running, and is the URL its own? It is safe to import again")

    def identity(self) -> UUID:
        key = f"{self._prefix}__import__"
        with self.errors():
            self.client.set(key, str(uuid4()), nx=True)
            return UUID(self.client.get(key).decode())

    def queues(self, candidates: Sequence[str]) -> list[str]:
        return sorted(self._queues)

    def count(self, queue: str) -> Counts:
        counts = Counts(in_flight=0)
        readers: set[str] = set()
        with self.errors():
            for name in (queue, f"{queue}.DQ"):
                waiting = self.client.llen(self._prefix + name)
                for worker in self._fetched.get(name, ()):
                    held = self.client.scard(self._acks(worker, name))
                    beat = self.client.zscore(self._heartbeats, worker)
                    if beat is not None and beat > _now() - HEARTBEAT_TIMEOUT:
                        counts.in_flight = (counts.in_flight or 0) + held
                        readers.add(worker)
                    else:
                        waiting += held
                if name == queue:
                    counts.ready = waiting
                else:
                    counts.delayed = waiting
            counts.dead = self.client.zcard(f"{self._prefix}{queue}.XQ")
        counts.readers = len(readers)
        return counts

    def open(self, queue: str, place: Place) -> _Box:
        if place == "dead":
            return _DeadLetters(self, f"{self._prefix}{queue}.XQ")
        name = queue if place == "ready" else f"{queue}.DQ"
        box = _Queue(self, self._prefix + name, self._acks(OURSELVES, name))
        with self.errors():
            for worker in self._fetched.get(name, ()):
                if worker != OURSELVES:
                    keys = [self._acks(worker, name), box.acks, box.messages, self._heartbeats]
                    self.run(_ADOPT, keys, [worker, _now() - HEARTBEAT_TIMEOUT])
            box.fetched = list(self.client.smembers(box.acks))
        return box

    def _acks(self, worker: str, name: str) -> str:
        return f"{self._prefix}__acks__.{worker}.{name}"

    def run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        return self._scripts[script](keys=keys, args=arguments)

    def close(self) -> None:
        self.client.close()


class _Box:
    """One list, or one sorted set, and the hash of its messages."""

    def __init__(self, source: RedisSource, key: str) -> None:
        self.source = source
        self.client = source.client
        self.key = key
        self.messages = f"{key}.msgs"

    def __enter__(self) -> _Box:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is to be put back."""

    def take(self, limit: int) -> list[Found]:
        raise NotImplementedError

    def settle(self, moved: Sequence[Found], left: Sequence[Found]) -> None:
        raise NotImplementedError


class _Queue(_Box):
    """What waits: fetched as a worker would."""

    def __init__(self, source: RedisSource, key: str, acks: str) -> None:
        super().__init__(source, key)
        self.acks = acks
        #: What an import that died, or a worker, had fetched already.
        self.fetched: list[bytes] = []
        self._left: list[bytes] = []

    def take(self, limit: int) -> list[Found]:
        with self.source.errors():
            ids, self.fetched = self.fetched[:limit], self.fetched[limit:]
            if not ids:
                ids = self.source.run(_TAKE, [self.key, self.acks], [limit])
            return (
                [Found(*pair) for pair in zip(ids, self.client.hmget(self.messages, ids), strict=True)] if ids else []
            )

    def settle(self, moved: Sequence[Found], left: Sequence[Found]) -> None:
        self._left.extend(found.handle for found in left)
        if moved:
            with self.source.errors():
                self.source.run(_REMOVE, [self.acks, self.messages], [found.handle for found in moved])

    def __exit__(self, *error: object) -> None:
        for n in range(0, len(self._left), 1000):
            with self.source.errors():
                # From the last to the first: in the end they are in front, in their order.
                end = len(self._left) - n
                self.source.run(_BACK, [self.acks, self.key], self._left[max(0, end - 1000) : end])


class _DeadLetters(_Box):
    """Dead letters, oldest first: nobody takes them but who is told to."""

    _skipped = 0

    def take(self, limit: int) -> list[Found]:
        with self.source.errors():
            pairs = self.client.zrange(self.key, self._skipped, self._skipped + limit - 1, withscores=True)
            payloads = self.client.hmget(self.messages, [id for id, _ in pairs]) if pairs else []
        return [Found(id, payload, int(died)) for (id, died), payload in zip(pairs, payloads, strict=True)]

    def settle(self, moved: Sequence[Found], left: Sequence[Found]) -> None:
        self._skipped += len(left)
        if moved:
            ids = [found.handle for found in moved]
            with self.source.errors(), self.client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(self.key, *ids)
                pipeline.hdel(self.messages, *ids)
                pipeline.execute()


def _now() -> int:
    return int(time.time() * 1000)
