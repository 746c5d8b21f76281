"""``dramatiq-durable workflow export`` and ``replay``: histories as files."""

from __future__ import annotations

import importlib
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import dramatiq

from ...errors import DurableError, Nondeterminism
from ...workflow.definition import Workflow
from ..output import print_json
from ..target import Target, option_json
from .which import handle_of, option_run

if TYPE_CHECKING:
    from ...testing import Replayer


@click.command("export")
@option_run
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.pass_obj
def export(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, output: Path | None) -> None:
    """Print a run's history as JSON: for `workflow replay`, for tests, for other tools.

    It has all values that the run was given and has made.
    """
    text = handle_of(target, workflow_id, run_id).export()
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


@click.command("replay")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--app", "modules", metavar="MODULE", multiple=True, required=True,
              help="Where the workflows are declared; may be given often.")  # fmt: skip
@option_json
@click.pass_obj
def replay(target: Target, files: tuple[Path, ...], modules: tuple[str, ...], as_json: bool) -> None:
    """Replay exported histories with the code at hand: could runs that are under way go on with it?

    Nothing is called but the code of the workflows, and no database is needed.  Exits with status 1 where the code does
    something else than a history says, and shows the first difference.
    """
    from ...testing import Replayer

    replayer = Replayer(workflows_of(target, modules))
    outcomes = [_replay(replayer, file) for file in files]
    if as_json:
        print_json(outcomes)
    else:
        for outcome in outcomes:
            click.echo(_line(outcome))
    if not all(outcome["ok"] for outcome in outcomes):
        raise click.exceptions.Exit(1)


def _replay(replayer: Replayer, file: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = {"file": str(file), "ok": False}
    try:
        replayer.replay(file)
    except Nondeterminism as e:
        outcome |= {"event_id": e.event_id, "expected": e.expected, "got": e.got, "error": str(e)}
    except (DurableError, ValueError) as e:
        outcome |= {"error": str(e)}
    else:
        outcome |= {"ok": True}
    return outcome


def _line(outcome: dict[str, Any]) -> str:
    if outcome["ok"]:
        return f"{outcome['file']}: the code does what the history says"
    if "event_id" not in outcome:
        return f"{outcome['file']}: {outcome['error']}"
    return (
        f"{outcome['file']}: the code differs at event {outcome['event_id']}\n"
        f"  history: {outcome['expected']}\n"
        f"  code:    {outcome['got']}"
    )


def workflows_of(target: Target, modules: tuple[str, ...]) -> list[Workflow[Any, Any]]:
    """The workflows that modules declare, on a broker of their own making or on ours.

    Raises:
      UsageError: a module cannot be found, or none declares any.
    """
    if dramatiq.broker.global_broker is None:
        dramatiq.set_broker(target.broker)
    # As `dramatiq` and `python -m` do.
    if "" not in sys.path:
        sys.path.insert(0, "")
    found: dict[int, Workflow[Any, Any]] = {}
    for name in modules:
        module_name = name.partition(":")[0]
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as e:
            # Only where it is the named module, or a package around it, that is missing: not what it imports itself.
            if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
                raise
            raise click.UsageError(f"--app: there is no module {module_name!r}") from None
        for value in vars(module).values():
            if isinstance(value, Workflow):
                found[id(value)] = value
            # Those that its own modules have declared.
            for workflow in getattr(value, "workflows", {}).values() if isinstance(value, dramatiq.Broker) else ():
                found[id(workflow)] = workflow
    for workflow in getattr(dramatiq.get_broker(), "workflows", {}).values():
        found[id(workflow)] = workflow
    if not found:
        raise click.UsageError(f"--app: {', '.join(modules)} declares no workflow")
    return list(found.values())
