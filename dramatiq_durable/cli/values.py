"""Values on the command line: JSON in, JSON out."""

from __future__ import annotations

import json
from typing import Any

import click


def parse(value: str, what: str) -> Any:
    """JSON from the command line.

    Raises:
      UsageError: it is none.
    """
    try:
        return json.loads(value)
    except ValueError as e:
        raise click.UsageError(f"{what} is no JSON ({e}); text needs quotes of its own, like '\"approved\"'") from None


def parse_call(args_json: str, kwargs_json: str) -> tuple[list[Any], dict[str, Any]]:
    """The values of ``--args`` and ``--kwargs``.

    Raises:
      UsageError: they are no list and no object.
    """
    args, kwargs = parse(args_json, "--args"), parse(kwargs_json, "--kwargs")
    if not isinstance(args, list):
        raise click.UsageError("--args is a list in JSON, like '[\"o-1\", 500]'")
    if not isinstance(kwargs, dict):
        raise click.UsageError("--kwargs is an object in JSON, like '{\"cents\": 500}'")
    return args, kwargs


def option_call(command: Any) -> Any:
    """Add ``--args`` and ``--kwargs``."""
    command = click.option(
        "--kwargs", "kwargs_json", metavar="JSON", default="{}", show_default=True, help="The named ones, an object."
    )(command)
    return click.option(
        "--args", "args_json", metavar="JSON", default="[]", show_default=True, help="The arguments, a list."
    )(command)


def shown(value: Any) -> str:
    """A value as JSON, on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)
