"""``dramatiq-durable workflow lint``: what workflows cannot do, found in their source code."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from ..output import print_json
from ..target import option_json


@click.command("lint")
@click.argument("targets", nargs=-1, metavar="[MODULE_OR_PATH]...")
@option_json
def command(targets: tuple[str, ...], as_json: bool) -> None:
    """Find in the source of workflows what no replay can repeat, and say what to do instead.

    Takes modules, files and directories; by default, the current directory.  Nothing is imported or run.  The comment
    "# durable: allow" on a line silences it.  Exits with status 1 where something was found.
    """
    from ...workflow.lint import lint_paths

    findings = lint_paths([locate(target) for target in targets or (".",)])
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            place = f"{finding.path}:{finding.line}:{finding.column}"
            where = f" (workflow {finding.workflow})" if finding.workflow else ""
            click.echo(f"{place}: {finding.what}{where}: {finding.instead}")
    if findings:
        raise click.exceptions.Exit(1)


def locate(target: str) -> Path:
    """The file or directory of a path or a module; the module is not imported."""
    path = Path(target)
    if path.exists():
        return path
    if all(part.isidentifier() for part in target.split(".")):
        for directory in dict.fromkeys(("", *sys.path)):
            found = Path(directory, *target.split("."))
            if (found / "__init__.py").exists():
                return found
            if found.with_suffix(".py").exists():
                return found.with_suffix(".py")
    raise click.UsageError(f"there is no file, directory or module {target!r}")
