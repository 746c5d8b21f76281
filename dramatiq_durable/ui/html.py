"""HTML from functions.  Whatever is not `Html` already is text, and is escaped."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import urlencode

#: They join letters and signs in what people write; every other format character could hide or turn text.
_JOINERS = "\u200c\u200d"

#: What has to be looked at.
_ODD = re.compile(r"[^\x20-\x7e\n\t]")


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"
Value: TypeAlias = str | int | float | bool | None

_VOID = frozenset({"input", "link", "meta", "br", "rect"})


def visible(text: str) -> str:
    """Text with its control, format and lone half characters spelled out: nothing is hidden, or turns the line."""
    return _ODD.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    c = found[0]
    if c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return c
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}"


def render(child: Child) -> Html:
    """A child as HTML: text is escaped, None is nothing, several come one after the other."""
    if child is None:
        return Html("")
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return Html(html.escape(visible(child)))
    if isinstance(child, (int, float)):
        return Html(str(child))
    return Html("".join(render(part) for part in child))


def tag(name: str, /, *children: Child, **attributes: Value) -> Html:
    """An element.

    Parameters:
      name(str): the element's, which is never anything that was read.
      children: what is in it.
      attributes: `_` stands for `-`, one at the end for nothing (``class_``); None and False leave one out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        else:
            # What a form gives back has to be what it was: only what UTF-8 cannot carry is replaced.
            text = str(value).encode("utf-8", "replace").decode()
            parts.append(f'{key}="{html.escape(text)}"')
    if name in _VOID:
        return Html(f"<{' '.join(parts)}>")
    return Html(f"<{' '.join(parts)}>{render(children)}</{name}>")


def link(text: Child, path: str, /, **query: str | int | None) -> Html:
    """A link to a page of ours; ``path`` begins with a slash and holds nothing that was read but ids."""
    return tag("a", text, href=address(path, **query))


def address(path: str, /, **query: str | int | None) -> str:
    """A path with its query; None and empty text are left out."""
    given = {key: value for key, value in query.items() if value not in (None, "")}
    return path + ("?" + urlencode(given, errors="replace") if given else "")
