"""What commands that change much have in common: they say what they would do, and ask."""

from __future__ import annotations

import sys
from typing import Any

import click


def option_yes(command: Any) -> Any:
    """Add ``--yes``."""
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def option_dry_run(command: Any) -> Any:
    """Add ``--dry-run``."""
    return click.option("--dry-run", is_flag=True, help="Only say what would be done.")(command)


def confirm(question: str, *, yes: bool) -> None:
    """Ask, unless ``--yes`` was given.  Ends the command (exit code 1) when the answer is no.

    Raises:
      UsageError: there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask at: add --yes, or look first with --dry-run")
    click.confirm(question, abort=True, err=True)
