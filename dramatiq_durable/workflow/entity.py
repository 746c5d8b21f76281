"""A run's entity: a JSON document that its code changes, and that others find the run by."""

from __future__ import annotations

import copy
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from ..errors import NotEncodable, PayloadTooLarge
from .attributes import MAX_ENTITY, check_json
from .commands import Answered, ChangeEntity, Command
from .converter import encode, hash_arguments

if TYPE_CHECKING:
    from .replay import Execution

_WHOLE: Final = object()
_MISSING: Final[Any] = object()

MAX_DEPTH = 50
"""How many segments a path may have."""


class Entity:
    """The entity of the run whose code is running; every operation is awaited.

    A path is text with dots, ``"customer.address.city"``; a segment of digits means an element where there is a list.
    Objects that are not there on the way are made.  A change is checked at the call, done at once, and stored with the
    step; values are what JSON has of them, and what is returned is the caller's own copy.

    Every operation raises:
      TypeError: what is there already is of another type than the operation needs.
      ValueError: the path makes no sense.
      NotEncodable: a value is no JSON that Postgres can keep (NUL, NaN).
      PayloadTooLarge: the entity would be over 1 MiB.
    """

    __slots__ = ("_execution",)

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    def get(self, path: str | None = None, default: Any = None) -> Coroutine[Any, Any, Any]:
        """The whole document, or what is at a path; ``default`` where there is nothing."""
        found = _find(self._document, _path(path) if path is not None else ())
        return Answered(self._execution, Command(), default if found is _MISSING else copy.deepcopy(found))

    def set(self, path: Any, value: Any = _WHOLE) -> Coroutine[Any, Any, Any]:
        """``set(path, value)``, or ``set(document)`` for the whole of it.  Returns what is there now."""
        at, given = _arguments("set", path, value)
        return self._change("set", "put", at, given, given)

    def merge(self, path: Any, value: Any = _WHOLE) -> Coroutine[Any, Any, Any]:
        """``merge(path, object)``, or ``merge(object)`` into the whole: objects key by key, at every depth; anything
        else is replaced.  Returns what is there now."""
        at, given = _arguments("merge", path, value)
        found = _find(self._document, at)
        if not isinstance(given, dict):
            raise TypeError(f"merge() takes a dict, not {_kind(given)}.")
        if found is not _MISSING and not isinstance(found, dict):
            raise TypeError(
                f"merge(): at {_shown(at)} there is {_kind(found)}, not an object: use set() to replace it."
            )
        merged = _merged({} if found is _MISSING else found, given)
        return self._change("merge", "merge", at, given, merged)

    def append(self, path: str, value: Any) -> Coroutine[Any, Any, list[Any]]:
        """Add a value to the end of a list, which is made if it is not there.  Returns the list."""
        at, given = _path(path), _json("append", value)
        return self._change("append", "append", at, given, [*self._list("append", at), given])

    def prepend(self, path: str, value: Any) -> Coroutine[Any, Any, list[Any]]:
        """Add a value to the beginning of a list, which is made if it is not there.  Returns the list."""
        at, given = _path(path), _json("prepend", value)
        return self._change("prepend", "prepend", at, given, [given, *self._list("prepend", at)])

    def remove(self, path: str, index: int) -> Coroutine[Any, Any, list[Any]]:
        """Remove the element at an index (negative: from the end) from a list.  Returns the list; where there is no
        such element, as it is."""
        at = _path(path)
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"remove() takes the index of an element, not {index!r:.60}.")
        kept = list(self._list("remove", at))
        place = index + len(kept) if index < 0 else index
        if not 0 <= place < len(kept):
            return Answered(self._execution, Command(), copy.deepcopy(kept))
        del kept[place]
        return self._change("remove", "drop", (*at, str(place)), None, kept, result_at=at)

    def increment(self, path: str, by: float = 1) -> Coroutine[Any, Any, Any]:
        """Add to a number; nothing counts as 0.  Returns the new number."""
        at, by = _path(path), _json("increment", by)
        found = _find(self._document, at)
        for number in (by, 0 if found is _MISSING else found):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                raise TypeError(f"increment(): at {_shown(at)}, {_kind(number)} is no number.")
        total = _json("increment", by if found is _MISSING else found + by)
        return self._change("increment", "put", at, total, total)

    def toggle(self, path: str) -> Coroutine[Any, Any, bool]:
        """Turn a truth value over; nothing counts as false.  Returns the new value."""
        at = _path(path)
        found = _find(self._document, at)
        if found is not _MISSING and not isinstance(found, bool):
            raise TypeError(f"toggle(): at {_shown(at)} there is {_kind(found)}, neither true nor false.")
        turned = found is _MISSING or not found
        return self._change("toggle", "put", at, turned, turned)

    def delete(self, path: str) -> Coroutine[Any, Any, bool]:
        """Remove what is at a path.  Returns whether there was anything."""
        at = _path(path)
        if _find(self._document, at) is _MISSING:
            return Answered(self._execution, Command(), False)
        return self._change("delete", "drop", at, None, True)

    def set_if_not_exists(self, path: str, value: Any) -> Coroutine[Any, Any, Any]:
        """Set what is at a path if nothing is.  Returns what is there now."""
        at, given = _path(path), _json("set_if_not_exists", value)
        found = _find(self._document, at)
        if found is not _MISSING:
            return Answered(self._execution, Command(), copy.deepcopy(found))
        return self._change("set_if_not_exists", "put", at, given, given)

    # --- inside ------------------------------------------------------------------------------------------
    @property
    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = self._execution.state.setdefault("entity", {})
        return document

    def _list(self, verb: str, at: tuple[str, ...]) -> list[Any]:
        found = _find(self._document, at)
        if found is _MISSING:
            return []
        if not isinstance(found, list):
            raise TypeError(f"{verb}(): at {_shown(at)} there is {_kind(found)}, not a list.")
        return found

    def _change(
        self,
        verb: str,
        op: str,
        at: tuple[str, ...],
        value: Any,
        result: Any,
        *,
        result_at: tuple[str, ...] | None = None,
    ) -> Answered[Any]:
        """Record a change, and make it: ``result`` is then at the path (``op`` drop: nothing, or at ``result_at``)."""
        execution = self._execution
        data = encode([op, at, value], "the change")
        _way(self._document, at, verb, make=False)
        self._keep_within(len(data), at, op, result)
        command = ChangeEntity(None, verb, None, hash_arguments(data), op, at, value)
        # May be refused; only what is recorded is done.
        execution.issue(command)
        place = at if result_at is None else result_at
        if not place:
            execution.state["entity"] = copy.deepcopy(result)
        else:
            holder: Any = _way(self._document, place, verb, make=True)
            key: Any = int(place[-1]) if isinstance(holder, list) else place[-1]
            if op == "drop" and result_at is None:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(result)
        return Answered(execution, command, copy.deepcopy(result))

    def _keep_within(self, added: int, at: tuple[str, ...], op: str, result: Any) -> None:
        """Refuse what would make the entity too large.

        What was added since it was measured last is a bound; only where that is over the cap is it measured again.
        """
        state = self._execution.state
        document = self._document
        size = state["entity_bytes"] if "entity_bytes" in state else len(encode(document))
        size += added
        if size > MAX_ENTITY and op != "drop":
            old = _find(document, at)
            size = len(encode(document)) + len(encode(result)) - (0 if old is _MISSING else len(encode(old)))
            if size > MAX_ENTITY:
                raise PayloadTooLarge(
                    f"the entity would be {size:,} bytes, the cap is {MAX_ENTITY:,}: keep the data elsewhere and a "
                    "reference to it in the entity."
                )
        state["entity_bytes"] = size


def _arguments(verb: str, path: Any, value: Any) -> tuple[tuple[str, ...], Any]:
    if value is not _WHOLE:
        return _path(path), _json(verb, value)
    if not isinstance(path, dict):
        raise TypeError(f"{verb}() takes a path and a value, or a dict for the whole entity, not {path!r:.60} alone.")
    return (), _json(verb, path)


def _json(verb: str, value: Any) -> Any:
    return check_json(value, f"the value of {verb}()")[0]


def _path(path: Any) -> tuple[str, ...]:
    if not isinstance(path, str):
        raise TypeError(f"a path is text such as 'customer.name', not {path!r:.60}.")
    segments = tuple(path.split("."))
    if "" in segments:
        raise ValueError(f"a path is names with dots between them, such as 'customer.name', not {path!r:.60}.")
    if len(segments) > MAX_DEPTH or len(path) > 2000:
        raise ValueError(f"a path has at most {MAX_DEPTH} names and 2000 characters: {path[:60]!r}...")
    if "\0" in path or any("\ud800" <= c <= "\udfff" for c in path):
        raise NotEncodable(f"the path {path!r:.60} has a NUL or half a surrogate pair, which Postgres cannot keep.")
    return segments


def _find(value: Any, path: tuple[str, ...]) -> Any:
    for segment in path:
        if isinstance(value, dict) and segment in value:
            value = value[segment]
        elif isinstance(value, list) and _is_index(segment) and int(segment) < len(value):
            value = value[int(segment)]
        else:
            return _MISSING
    return value


def _way(value: Any, path: tuple[str, ...], verb: str, *, make: bool) -> Any:
    """What holds the last segment of a path; ``make`` what is missing on the way.

    Raises:
      TypeError: something on the way is neither an object nor a list.
      IndexError: a list on the way is shorter.
    """
    for n, segment in enumerate(path):
        last = n == len(path) - 1
        if isinstance(value, list):
            if not _is_index(segment) or int(segment) >= len(value):
                raise IndexError(f"{verb}(): the list at {_shown(path[:n])} has no element {segment!r}.")
            if not last:
                value = value[int(segment)]
        elif not isinstance(value, dict):
            raise TypeError(f"{verb}(): at {_shown(path[:n])} there is {_kind(value)}, which has no {segment!r}.")
        elif not last:
            if segment not in value and not make:
                return None
            value = value.setdefault(segment, {})
    return value


def _is_index(segment: str) -> bool:
    return segment.isascii() and segment.isdigit() and len(segment) < 10


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        there = merged.get(key)
        merged[key] = _merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return merged


def _shown(path: tuple[str, ...]) -> str:
    return repr(".".join(path)) if path else "the top"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")
