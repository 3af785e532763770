"""``forge resume``: go on with a run that was stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.train import AllowChange, BreakLock, NumProcesses, PreemptExitCode, RequireLatest, StopOnUsr1


def resume(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder; default: the newest run.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
    ] = None,
    allow_change: AllowChange = None,
    require_latest: RequireLatest = False,
    break_lock: BreakLock = False,
    force: Annotated[bool, typer.Option("--force", help="Train though the GPU is estimated to be too small.")] = False,
    stop_on_usr1: StopOnUsr1 = False,
    preempt_exit_code: PreemptExitCode = None,
    num_processes: NumProcesses = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Go on with a run from its newest checkpoint that is whole."""
    from forge_cli.cli.live import choose_reporter
    from forge_cli.cli.train import exit_code_of_stops, launch_processes, read_resuming, show_result
    from forge_cli.results.find import Run, choose_run
    from forge_cli.run.execute import resume_run
    from forge_cli.run.ranks import read_rank
    from forge_cli.run.resume import read_num_processes

    run = run if run and run.is_dir() else choose_run(run).path
    if (home := Run(run).home) != Path.cwd():
        run = run.resolve()
        os.chdir(home)  # the plan's paths start there
        print(f"going on in {home}, where the run was started", file=sys.stderr)
    if read_rank().count == 1 and (count := num_processes or read_num_processes(run)) > 1:
        launch_processes(count)
    how = read_resuming(True, False, allow_change, require_latest, break_lock)
    reporter = choose_reporter(quiet, 10)
    with exit_code_of_stops(preempt_exit_code):
        result = resume_run(run, overrides or [], how=how, force=force, reporter=reporter, stop_on_usr1=stop_on_usr1)
    show_result(result, as_json)


FUNCTIONS = {"resume": resume}
