"""The run itself: the table of contents of a fine-tuning run."""

from __future__ import annotations

import time
from pathlib import Path

from forge_cli.build.adapter import prepare_trainable
from forge_cli.build.compute import choose_compute
from forge_cli.build.data import PreparedData, prepare_data
from forge_cli.build.model import check_lengths, describe_model, load_model
from forge_cli.build.reference import release_reference
from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.data.hub import leave_hub
from forge_cli.data.report_text import render_report
from forge_cli.parts.memory import MemoryCallback
from forge_cli.parts.ranks import wait_for_all
from forge_cli.parts.stop_request import StopRequest
from forge_cli.resolve.plan import Plan
from forge_cli.run.answers import Examination
from forge_cli.run.artifacts import save_weights, weights_name
from forge_cli.run.describe import describe_trainable
from forge_cli.run.execute import Resuming, RunResult
from forge_cli.run.folder import RunFolder
from forge_cli.run.ranks import compare_ranks
from forge_cli.run.report import Findings, write_report
from forge_cli.run.reporter import Reporter
from forge_cli.run.resume import ResumePoint, compare_data, introduce_folder
from forge_cli.run.training import build_trainer, prove_sequences, run_training


def train_in_stages(
    plan: Plan, folder: RunFolder, reporter: Reporter, point: ResumePoint | None, how: Resuming, stop: StopRequest
) -> RunResult:
    """The run itself. Data comes first: what is wrong with it is said before any weight is read."""
    spec = plan.spec
    began, memory = time.perf_counter(), MemoryCallback()
    compute = choose_compute(spec, folder.rank.local)
    reporter.say(f"{compute.device_name}: {compute.reason}")
    introduce_folder(folder, compute.device, point)
    tokenizer = load_tokenizer(spec)
    data = _prepare_rows(plan, folder, reporter, tokenizer, point, how)
    # A reward model scores answers and writes none.
    section = spec.report if spec.method != "reward" and folder.rank.is_main else None
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
    if not folder.rank.is_main:
        stop.is_over = True
        wait_for_all()  # a signal has to find all of them, until the first one has written everything
        return RunResult(folder.path, folder.path / weights_name(trainer.model), {})
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
    stop.is_over = True
    wait_for_all()
    return RunResult(folder.path, weights, report)


def _prepare_rows(
    plan: Plan, folder: RunFolder, reporter: Reporter, tokenizer, point: ResumePoint | None, how: Resuming
) -> PreparedData:
    """Prepares the rows, and makes sure that a resumed run goes on with the same ones."""

    if not folder.rank.is_main:
        wait_for_all()  # the first process writes the tokens, the others read them
    data = prepare_data(plan.spec, tokenizer, reporter.say)
    if folder.rank.is_main:
        wait_for_all()
    compare_ranks(plan, data.fingerprint)
    reporter.say(render_report(data.report))
    if (count := folder.rank.count) > 1:
        rows = count * plan.derived.effective_batch_size
        reporter.say(f"{count} processes: {rows} rows a step in all, and so {count} times fewer steps")
    if point and folder.rank.is_main:
        for change in compare_data(folder.read_facts().get("data", {}), data.identity, how.allowed_changes):
            reporter.say(f"changed: {change}")
    folder.note_facts(data=data.identity)
    return data


def _save(model, tokenizer, folder: RunFolder, ema, system_prompt: str | None) -> Path:
    """Saves the weights to use (the averaged ones with EMA on) and keeps the raw ones beside them."""
    name = weights_name(model)
    weights = save_weights(model, tokenizer, folder, name, system_prompt)
    if ema:
        ema.restore_original(model)
        save_weights(model, tokenizer, folder, f"{name}-raw", system_prompt)
    return weights
