"""``forge train``: carry out a run file."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change", metavar="PATH", help="Resume though this setting changed; data stands for the rows."
    ),
]
RequireLatest = Annotated[
    bool, typer.Option("--require-latest", help="Resume from the latest checkpoint or not at all.")
]

BreakLock = Annotated[
    bool, typer.Option("--break-lock", help="Resume though a process on another host may still have the run.")
]
StopOnUsr1 = Annotated[
    bool, typer.Option("--stop-on-usr1", help="SIGUSR1 saves and stops; else it saves, and the run goes on.")
]
PreemptExitCode = Annotated[
    int | None,
    typer.Option(
        "--preempt-exit-code", metavar="N", min=0, max=255, help="Exit code after SIGTERM or SIGUSR1, not 128 + n."
    ),
]

NumProcesses = Annotated[
    int | None, typer.Option("--num-processes", metavar="N", min=1, help="Train in N processes, one for each GPU.")
]


def train(
    run_file: Annotated[
        Path, typer.Argument(metavar="[RUN_FILE]", help="Run file (YAML); default: run.yaml.", show_default=False)
    ] = Path("run.yaml"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only: no weights, nothing written.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this file's run that was stopped.")] = False,
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
    """Carry out a run file: train, evaluate, save and report."""
    from forge_cli.cli.live import choose_reporter
    from forge_cli.resolve.plan import dump_plan, resolve_plan

    plan = resolve_plan(run_file, overrides or [])
    if num_processes and num_processes > 1 and not dry_run:
        launch_processes(num_processes)
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

    how = read_resuming(resume, overwrite, allow_change, require_latest, break_lock)
    with exit_code_of_stops(preempt_exit_code):
        result = train_file(
            run_file,
            overrides or [],
            overwrite=overwrite,
            force=force,
            resume=how,
            reporter=reporter,
            stop_on_usr1=stop_on_usr1,
        )
    show_result(result, as_json)


def launch_processes(count: int) -> None:
    """Gives the command that was typed to several processes, and ends with their exit code."""
    from forge_cli.run.launch import launch

    sys.exit(launch(drop_option(sys.argv[1:], "--num-processes"), count))


def drop_option(arguments: list[str], name: str) -> list[str]:
    """Returns arguments without an option and its value."""
    kept, skipped = [], False
    for one in arguments:
        if not skipped and not one.startswith(f"{name}=") and one != name:
            kept.append(one)
        skipped = one == name
    return kept


@contextlib.contextmanager
def exit_code_of_stops(code: int | None) -> Iterator[None]:
    """Gives runs that a scheduler stopped an exit code of its own, by which it knows to start them again."""
    from forge_cli.errors import Stopped

    try:
        yield
    except Stopped as event:
        if code is not None and event.signal_number != signal.SIGINT:
            event.exit_code = code
        raise


def read_resuming(
    resume: bool, overwrite: bool, allow_change: list[str] | None, require_latest: bool, break_lock: bool
):
    """Turns the options about resuming into what :mod:`forge_cli.run.execute` takes; ``None`` starts a run.

    Raises:
        ConfigError: Options contradict each other.
    """
    from forge_cli.errors import ConfigError
    from forge_cli.run.execute import Resuming

    if resume and overwrite:
        raise ConfigError(
            "--resume goes on with a run, and --overwrite deletes it", where="--resume", fix="leave one of them out"
        )
    if not resume and (allow_change or require_latest or break_lock):
        where = "--allow-change" if allow_change else "--require-latest" if require_latest else "--break-lock"
        raise ConfigError("this says how a run is resumed, and none is", where=where, fix="add --resume")
    return Resuming(tuple(allow_change or ()), require_latest, break_lock) if resume else None


def show_result(result, as_json: bool) -> None:
    """Prints what a run ended with; of several processes the first one does."""
    if not result.report:
        return
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
