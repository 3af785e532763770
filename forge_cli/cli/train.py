"""``forge train``: carry out a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer



def train(
    run_file: Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only: no weights, nothing written.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Carry out a run file: train, evaluate, save and report."""
    from forge_cli.run.execute import train as execute

    execute(run_file, overrides or [], dry_run=dry_run, overwrite=overwrite, quiet=quiet)


FUNCTIONS = {"train": train}
