"""``dramatiq-durable check``"""

from __future__ import annotations

import dataclasses

import click

from ..check import check
from .output import plain, print_json
from .target import Target, option_json


@click.command("check")
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@option_json
@click.pass_context
def command(ctx: click.Context, strict: bool, as_json: bool) -> None:
    """Say what is wrong with the database, and what mends it.

    Ends with 0 when all is well (warnings allowed, but with --strict), else with 1.
    """
    target: Target = ctx.obj
    findings = check(target.url, target.namespace)
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{finding.level}: {line(finding.text)}. Fix: {line(finding.fix)}")
        if not findings:
            click.echo(f"all is well with the namespace {target.namespace}")
    if any(finding.level == "error" or strict for finding in findings):
        ctx.exit(1)


def line(value: str) -> str:
    """The text on one line."""
    return " ".join(str(plain(value)).split())
