"""What annotations mean: names to types, where text stands for them (``from __future__ import annotations``).

A name that exists only for type checkers must not make a workflow undecodable, nor cost its neighbours their types:
what cannot be resolved is left out, its value stays JSON.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, Final

#: Where a function, or a class, that was declared inside of a function keeps the types that it could see there.
_SCOPE: Final = "__durable_scope__"
_TYPING: Final = frozenset({"types", "typing", "typing_extensions"})


def hints_of(subject: Any) -> dict[str, Any]:
    """Return the annotations of a function or class, resolved; those that cannot be are left out."""
    try:
        return typing.get_type_hints(subject, include_extras=True)
    except Exception:
        found: dict[str, Any] = {}
        for declared, names, inner in _declarations(subject):
            found.update(_each(declared, names, inner))
        return found


def declared_in() -> FrameType | None:
    """The frame in which one of our decorators is used: the first that is not of the caller's own module."""
    frame: FrameType | None = sys._getframe(1)
    decorators = None if frame is None else frame.f_globals
    while frame is not None and frame.f_globals is decorators:
        frame = frame.f_back
    return frame


def remember_scope(fn: Callable[..., Any], frame: FrameType | None, around: Any = None) -> None:
    """Keep for a function that is declared inside of another what its annotations may name: the types that are local
    there.

    Parameters:
      frame: where it is declared.
      around: the function whose body that is, where it is a workflow's: what it may name, its handlers may.
    """
    if frame is None or "<locals>" not in getattr(fn, "__qualname__", ""):
        return
    if not any(isinstance(hint, str) for hint in getattr(fn, "__annotations__", {}).values()):
        return
    known = {name: value for name, value in frame.f_locals.items() if _is_type(value)}
    scope = {**getattr(around, _SCOPE, {}), **known}
    if not scope:
        return
    for subject in (fn, *known.values()):
        if subject is fn or "<locals>" in getattr(subject, "__qualname__", ""):
            with suppress(AttributeError, TypeError):
                setattr(subject, _SCOPE, scope)


def _is_type(value: Any) -> bool:
    return isinstance(value, type) or type(value).__module__ in _TYPING


def _declarations(subject: Any) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """Each set of annotations with the names that they may use: a module's, and those further in."""
    if isinstance(subject, type):
        for base in reversed(subject.__mro__):
            module = sys.modules.get(base.__module__)
            inner = {**base.__dict__.get(_SCOPE, {}), base.__name__: base, **vars(base)}
            yield _annotations(base, base.__dict__), vars(module) if module else {}, inner
        return
    scope: Mapping[str, Any] = getattr(subject, _SCOPE, {})
    while hasattr(subject, "__wrapped__"):
        subject = subject.__wrapped__
    inner = {**scope, **_closure(subject)}
    yield _annotations(subject, getattr(subject, "__dict__", {})), getattr(subject, "__globals__", {}), inner


def _annotations(subject: Any, own: Mapping[str, Any]) -> Mapping[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(subject, format=annotationlib.Format.FORWARDREF)
    given = own.get("__annotations__") if isinstance(subject, type) else getattr(subject, "__annotations__", None)
    return given if isinstance(given, dict) else {}


def _closure(fn: Any) -> dict[str, Any]:
    code, cells = getattr(fn, "__code__", None), getattr(fn, "__closure__", None)
    found: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, cells, strict=True) if code is not None and cells else ():
        with suppress(ValueError):  # nothing is in it yet
            found[name] = cell.cell_contents
    return found


def _each(declared: Mapping[str, Any], names: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, hint in declared.items():
        one = types.SimpleNamespace(__annotations__={name: hint})
        with suppress(Exception):
            found.update(typing.get_type_hints(one, dict(names), dict(inner), include_extras=True))
    return found
