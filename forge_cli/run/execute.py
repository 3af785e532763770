"""Carries out one plan: takes its folder, and does the run in it.

Nothing here imports torch; everything that can be wrong in the run file has been said by the time that stages do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_cli.data.hub import hub_or_copies
from forge_cli.errors import WorkerDied
from forge_cli.parts.stop_request import Interrupt
from forge_cli.resolve.plan import Plan, dump_plan, resolve_plan
from forge_cli.run.folder import (
    PLAN_FILE,
    RunFolder,
    create_run_folder,
    open_run_folder,
    recover_run,
    write_atomic,
)
from forge_cli.run.preflight import advise_less, check_memory
from forge_cli.run.process import check_packages, library_logs, prepare_process, trackers_in, translated_errors
from forge_cli.run.ranks import Rank, read_rank
from forge_cli.run.reporter import PlainReporter, Reporter, SilentReporter
from forge_cli.run.resume import (
    ResumePoint,
    compare_plans,
    compare_ranks_before,
    find_folder_of_main,
    find_resume_point,
    find_run,
)
from forge_cli.run.signals import SignalListener, describe_interrupt
from forge_cli.run.watchdog import crash_stacks

# A scheduler does not reach all processes at once.
SKEW_SECONDS = 5.0


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: The run folder.
        weights: Folder of the adapter or the model.
        report: Content of ``report.json``.
    """

    folder: Path
    weights: Path
    report: dict


@dataclass(frozen=True)
class Resuming:
    """How a run may be resumed.

    Attributes:
        allowed_changes: Settings that may differ from the run's plan, and ``data`` for its rows.
        require_latest: Do not fall back to an earlier checkpoint if the latest cannot be used.
        break_lock: Take the run folder though a process on another host may still hold it.
    """

    allowed_changes: tuple[str, ...] = ()
    require_latest: bool = False
    break_lock: bool = False


def train(
    run_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    force: bool = False,
    resume: Resuming | None = None,
    reporter: Reporter | None = None,
    stop_on_usr1: bool = False,
) -> RunResult:
    """Trains what a run file says: ``forge train`` for Python.

    Args:
        run_file: The run file.
        overrides: ``path=value`` settings above it.
        overwrite: Delete an earlier run of the same name.
        force: Train even if the GPU is estimated to be too small.
        resume: Go on with the run of this file that was stopped, and what may have changed since.
        reporter: Receives progress; plain lines on stderr by default.
        stop_on_usr1: SIGUSR1 saves and stops; else it saves, and the run goes on.

    Returns:
        Where the run's files are, and its report.

    Raises:
        ForgeError: Of any kind; its exit code tells which.
    """
    run_file = Path(run_file)

    def resolve(more: Sequence[str] = ()) -> Plan:
        return resolve_plan(run_file, [*overrides, *more])

    plan = resolve()
    if not (rank := read_rank()).is_main:
        return _follow(plan, rank, resume, stop_on_usr1=stop_on_usr1)
    reporter = reporter or PlainReporter(plan.spec.logging.logging_steps)
    check_memory(plan, resolve, reporter.say, force=force)
    if resume is not None:
        path = find_run(plan.spec.output_dir, plan.spec.name, run_file.stem)
        return resume_plan(path, plan, resume, reporter, stop_on_usr1=stop_on_usr1)
    return train_plan(plan, overwrite=overwrite, reporter=reporter, stem=run_file.stem, stop_on_usr1=stop_on_usr1)


def resume_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    how: Resuming | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
    stop_on_usr1: bool = False,
) -> RunResult:
    """Goes on with a run that was stopped: ``forge resume`` for Python.

    Args:
        run: The run folder.
        overrides: ``path=value`` settings above its plan.
        how: What may have changed.
        force: As for :func:`train`.
        reporter: As for :func:`train`.
        stop_on_usr1: As for :func:`train`.

    Raises:
        ForgeError: Of any kind; its exit code tells which.
    """
    path = Path(run)
    recovered = recover_run(path) if (rank := read_rank()).is_main else ""
    if not (path / PLAN_FILE).is_file():
        open_run_folder(path)  # says what is missing

    def resolve(more: Sequence[str] = ()) -> Plan:
        return resolve_plan(path / PLAN_FILE, [*overrides, *more])

    plan = resolve()
    if not rank.is_main:
        return _follow(plan, rank, how or Resuming(), stop_on_usr1=stop_on_usr1)
    reporter = reporter or PlainReporter(plan.spec.logging.logging_steps)
    reporter.say(recovered)
    check_memory(plan, resolve, reporter.say, force=force)
    return resume_plan(path, plan, how or Resuming(), reporter, stop_on_usr1=stop_on_usr1)


def train_plan(
    plan: Plan,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    stem: str = "run",
    stop_on_usr1: bool = False,
) -> RunResult:
    """Trains a resolved plan (see :func:`train`), without a look at the GPU's memory."""
    reporter = reporter or PlainReporter(plan.spec.logging.logging_steps)
    spec = plan.spec
    check_packages(spec)
    note = prepare_process(read_rank())
    folder = create_run_folder(spec.output_dir, spec.name, stem, dump_plan(plan), overwrite=overwrite)
    reporter.say(f"run folder {folder.path}, plan {plan.digest[:12]}")
    reporter.say(note)
    return _carry_out(plan, folder, reporter, None, Resuming(), SignalListener(stop_on_usr1=stop_on_usr1))


def resume_plan(path: Path, plan: Plan, how: Resuming, reporter: Reporter, *, stop_on_usr1: bool = False) -> RunResult:
    """Goes on with a run under a resolved plan (see :func:`resume_run`)."""
    check_packages(plan.spec)
    rank = read_rank()
    note = prepare_process(rank)
    folder = open_run_folder(path, break_lock=how.break_lock)
    try:
        changes = compare_plans(resolve_plan(folder.plan, ()), plan, how.allowed_changes)
        point = find_resume_point(folder, require_latest=how.require_latest)
        changes += compare_ranks_before(point.checkpoint.manifest.world_size, rank.count, how.allowed_changes)
        if changes:
            write_atomic(folder.plan, dump_plan(plan))
    except BaseException:
        folder.lock.release()
        raise
    reporter.say(f"run folder {folder.path}, plan {plan.digest[:12]}")
    for line in (note, *point.notes, *(f"changed: {change}" for change in changes)):
        reporter.say(line)
    return _carry_out(plan, folder, reporter, point, how, SignalListener(stop_on_usr1=stop_on_usr1))


def _follow(plan: Plan, rank: Rank, how: Resuming | None, *, stop_on_usr1: bool) -> RunResult:
    """Takes part in a run as one of its further processes: the first one has the folder and says where it is."""
    check_packages(plan.spec)
    prepare_process(rank)
    listener = SignalListener(stop_on_usr1=stop_on_usr1)
    try:
        with listener.listening():
            folder, point = find_folder_of_main(plan.spec, rank)
    except Interrupt as event:
        raise describe_interrupt(event, Path(plan.spec.output_dir)) from None
    return _carry_out(plan, folder, SilentReporter(), point, how or Resuming(), listener)


def _carry_out(
    plan: Plan,
    folder: RunFolder,
    reporter: Reporter,
    point: ResumePoint | None,
    how: Resuming,
    listener: SignalListener,
) -> RunResult:
    spec = plan.spec

    def advise() -> str:
        return advise_less(plan, lambda more: resolve_plan(folder.plan, more))

    try:
        with translated_errors(folder.log, advise), listener.listening() as stop, crash_stacks(folder.log.parent):
            reporter.say("loading torch and transformers ...")
            with library_logs(folder.log), hub_or_copies(spec, reporter.say), trackers_in(folder.path, spec):
                from forge_cli.run.stages import train_in_stages

                return train_in_stages(plan, folder, reporter, point, how, stop)
    except WorkerDied:
        _wait_for_signal(listener, folder.path)
        raise
    finally:
        reporter.finish()
        folder.settle()


def _wait_for_signal(listener: SignalListener, folder: Path) -> None:
    """Waits for the signal that may have ended another process first: it was meant for all of them.

    Raises:
        Stopped: It came.
    """
    until = time.monotonic() + SKEW_SECONDS
    try:
        with listener.listening() as stop:
            while not stop.signal_number and time.monotonic() < until:
                time.sleep(0.02)
    except Interrupt:
        pass
    if listener.request.signal_number:
        raise describe_interrupt(Interrupt(listener.request.signal_number), folder) from None
