"""Carries out one plan: the table of contents of a fine-tuning run.

Nothing outside :func:`_train` imports torch; everything that can be wrong in the run file has been said by then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.data.hub import hub_or_copies, leave_hub
from forge_cli.parts.stop_request import StopRequest
from forge_cli.resolve.plan import Plan, dump_plan, resolve_plan
from forge_cli.run.folder import (
    PLAN_FILE,
    RunFolder,
    create_run_folder,
    find_run,
    open_run_folder,
    recover_run,
    write_atomic,
)
from forge_cli.run.preflight import advise_less, check_memory
from forge_cli.run.process import check_packages, library_logs, prepare_process, translated_errors
from forge_cli.run.reporter import PlainReporter, Reporter
from forge_cli.run.resume import ResumePoint, compare_data, compare_plans, find_resume_point
from forge_cli.run.signals import SignalListener
from forge_cli.run.watchdog import crash_stacks

if TYPE_CHECKING:
    from forge_cli.build.data import PreparedData


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
    recovered = recover_run(path)
    if not (path / PLAN_FILE).is_file():
        open_run_folder(path)  # says what is missing

    def resolve(more: Sequence[str] = ()) -> Plan:
        return resolve_plan(path / PLAN_FILE, [*overrides, *more])

    plan = resolve()
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
    note = prepare_process()
    folder = create_run_folder(spec.output_dir, spec.name, stem, dump_plan(plan), overwrite=overwrite)
    reporter.say(f"run folder {folder.path}, plan {plan.digest[:12]}")
    reporter.say(note)
    return _carry_out(plan, folder, reporter, None, Resuming(), SignalListener(stop_on_usr1=stop_on_usr1))


def resume_plan(path: Path, plan: Plan, how: Resuming, reporter: Reporter, *, stop_on_usr1: bool = False) -> RunResult:
    """Goes on with a run under a resolved plan (see :func:`resume_run`)."""
    check_packages(plan.spec)
    note = prepare_process()
    folder = open_run_folder(path, break_lock=how.break_lock)
    try:
        changes = compare_plans(resolve_plan(folder.plan, ()), plan, how.allowed_changes)
        point = find_resume_point(folder, require_latest=how.require_latest)
        if changes:
            write_atomic(folder.plan, dump_plan(plan))
    except BaseException:
        folder.lock.release()
        raise
    reporter.say(f"run folder {folder.path}, plan {plan.digest[:12]}")
    for line in (note, *point.notes, *(f"changed: {change}" for change in changes)):
        reporter.say(line)
    return _carry_out(plan, folder, reporter, point, how, SignalListener(stop_on_usr1=stop_on_usr1))


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
            with library_logs(folder.log), hub_or_copies(spec, reporter.say):
                return _train(plan, folder, reporter, point, how, stop)
    finally:
        reporter.finish()
        folder.settle()


def _train(
    plan: Plan, folder: RunFolder, reporter: Reporter, point: ResumePoint | None, how: Resuming, stop: StopRequest
) -> RunResult:
    """The run itself. Data comes first: what is wrong with it is said before any weight is read."""
    from forge_cli.build.adapter import prepare_trainable
    from forge_cli.build.compute import choose_compute
    from forge_cli.build.model import check_lengths, describe_model, load_model
    from forge_cli.build.reference import release_reference
    from forge_cli.build.tokenizer import load_tokenizer
    from forge_cli.parts.memory import MemoryCallback
    from forge_cli.run.answers import Examination
    from forge_cli.run.describe import describe_trainable
    from forge_cli.run.report import Findings, write_report
    from forge_cli.run.training import build_trainer, prove_sequences, run_training

    spec = plan.spec
    began, memory = time.perf_counter(), MemoryCallback()
    compute = choose_compute(spec)
    reporter.say(f"{compute.device_name}: {compute.reason}")
    tokenizer = load_tokenizer(spec)
    data = _prepare_rows(plan, folder, reporter, tokenizer, point, how)
    # A reward model scores answers and writes none.
    section = spec.report if spec.method != "reward" else None
    examination = Examination(section, data.questions, tokenizer, compute.autocast_dtype)

    model = load_model(spec, compute)
    check_lengths(spec, model, tokenizer)
    reporter.say(describe_model(spec, compute, model))
    model, trainable = prepare_trainable(model, spec)
    describe_trainable(plan, trainable, reporter)

    memory.mark("load")
    reporter.say(examination.announce("before"))
    before = examination.answer(model)
    trainer, reference = build_trainer(plan, folder, reporter, model, tokenizer, data, compute, memory)
    leave_hub(spec)
    prove_sequences(plan, trainer, compute, reporter)
    training = run_training(plan, folder, trainer, reporter, point, stop)
    release_reference(trainer)

    if trainer.ema:
        trainer.ema.apply_ema(trainer.model)
    reporter.say(examination.announce("after"))
    after = examination.answer(trainer.model)
    weights = _save(trainer.model, tokenizer, folder, trainer.ema, data.report.system_prompt)
    findings = Findings(
        plan=plan,
        compute=compute,
        data=data,
        trainable=trainable,
        monitor=trainer.monitor,
        weights=weights,
        training=training,
        reference=reference,
        total_seconds=time.perf_counter() - began,
        samples=examination.pair(before, after),
        exact_match_before=examination.exact_match_ratio(before),
        exact_match_after=examination.exact_match_ratio(after),
    )
    report = write_report(findings, folder)
    return RunResult(folder.path, weights, report)


def _prepare_rows(
    plan: Plan, folder: RunFolder, reporter: Reporter, tokenizer, point: ResumePoint | None, how: Resuming
) -> PreparedData:
    """Prepares the rows, and makes sure that a resumed run goes on with the same ones."""
    from forge_cli.build.data import prepare_data
    from forge_cli.data.report_text import render_report

    data = prepare_data(plan.spec, tokenizer, reporter.say)
    reporter.say(render_report(data.report))
    if point:
        for change in compare_data(folder.read_facts().get("data", {}), data.identity, how.allowed_changes):
            reporter.say(f"changed: {change}")
    folder.note_facts(data=data.identity)
    return data


def _save(model, tokenizer, folder: RunFolder, ema, system_prompt: str | None) -> Path:
    """Saves the weights to use (the averaged ones with EMA on) and keeps the raw ones beside them."""
    from forge_cli.run.artifacts import save_weights

    name = "adapter" if hasattr(model, "peft_config") else "model"
    weights = save_weights(model, tokenizer, folder, name, system_prompt)
    if ema:
        ema.restore_original(model)
        save_weights(model, tokenizer, folder, f"{name}-raw", system_prompt)
    return weights
