"""``forge train``: carry out a run file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN_FILE", help="Run file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only: no weights, nothing written.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train though the GPU is estimated to be too small.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Carry out a run file: train, evaluate, save and report."""
    from forge_cli.cli.live import choose_reporter
    from forge_cli.resolve.plan import dump_plan, resolve_plan

    plan = resolve_plan(run_file, overrides or [])
    reporter = choose_reporter(quiet, plan.spec.logging.logging_steps)
    for warning in plan.derived.warnings:
        reporter.say(f"note: {warning}")
    if dry_run:
        from forge_cli.estimate.plan_memory import estimate_from_plan
        from forge_cli.run.preflight import describe_estimate

        print(dump_plan(plan), end="")
        if (estimate := estimate_from_plan(plan)) is not None:
            print(describe_estimate(estimate), file=sys.stderr)
        print("the plan holds; nothing was loaded and nothing was written", file=sys.stderr)
        return
    from forge_cli.run.execute import train as train_file

    result = train_file(run_file, overrides or [], overwrite=overwrite, force=force, reporter=reporter)
    if as_json:
        print(json.dumps(result.report, indent=1, ensure_ascii=False))
        return
    from forge_cli.run.summary import render_summary

    print(render_summary(result.report, result.folder, _program()))


def _program() -> str:
    """Returns what to type for Forge in this shell: a virtual environment need not be on the path."""
    import os
    import shutil

    if shutil.which("forge") or not sys.argv[0].endswith("forge"):
        return "forge"
    return os.path.relpath(sys.argv[0])


FUNCTIONS = {"train": train}
