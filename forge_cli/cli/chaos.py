"""``forge chaos``: see on your own machine what a run survives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def chaos(
    run_file: Annotated[
        Path, typer.Argument(metavar="[RUN_FILE]", help="Run file (YAML); default: run.yaml.", show_default=False)
    ] = Path("run.yaml"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
    ] = None,
    folder: Annotated[Path, typer.Option("--output", help="Folder for the runs; it must not exist.")] = Path("chaos"),
) -> None:
    """Run a few steps of a run file, once for every fault that Forge is built to survive."""
    from forge_cli.errors import CheckpointError, MachineError
    from forge_cli.resolve.plan import resolve_plan
    from forge_cli.run.chaos import inject_faults

    resolve_plan(run_file, overrides or [])
    if folder.exists():
        raise MachineError("the folder exists", where=str(folder), fix="delete it, or name another with --output")
    lost = []
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    print(f"{'fault':<40} {'exit':>4}  {'corrupt':>7}  {'resumed':>7}  {'same bits':>9}  survived")
    for verdict in inject_faults(run_file, overrides or [], folder, say):
        resumed = "-" if verdict.resumed is None else str(verdict.resumed)
        # A step that was skipped ends with other weights, as it is meant to.
        same = "yes" if verdict.equal else "no" if verdict.trial.same_bits else "-"
        survived = "yes" if verdict.survived else "NO"
        line = f"{verdict.trial.what:<40} {verdict.code:>4}  {verdict.broken:>7}  {resumed:>7}  {same:>9}  {survived}"
        print(line, flush=True)
        if not verdict.survived:
            lost.append(verdict.trial.fault)
    if lost:
        raise CheckpointError(
            f"{len(lost)} faults were not survived: {', '.join(lost)}",
            where=str(folder),
            why="a real run on this machine would lose work in the same way",
            fix="look at the logs in this folder, and report them",
        )
    print(f"all faults were survived; {folder} holds the runs and their logs, and may be deleted")


FUNCTIONS = {"chaos": chaos}
