"""Carries out one plan: the table of contents of a fine-tuning run.

Nothing outside :func:`_train` imports torch; everything that can be wrong in the run file has been said by then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.data.hub import hub_or_copies
from forge_cli.errors import ModelError
from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.resolve.plan import Plan, dump_plan, resolve_plan
from forge_cli.resolve.rules_training import warn_about_ema
from forge_cli.run.folder import RunFolder, create_run_folder
from forge_cli.run.preflight import check_memory
from forge_cli.run.process import check_packages, library_logs, prepare_process, translated_errors
from forge_cli.run.reporter import PlainReporter, Reporter
from forge_cli.units import format_bytes, format_count

if TYPE_CHECKING:
    from forge_cli.build.compute import Compute
    from forge_cli.build.data import PreparedData
    from forge_cli.parts.memory import MemoryCallback
    from forge_cli.run.report import TrainingFigures


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


def train(
    run_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
) -> RunResult:
    """Trains what a run file says: ``forge train`` for Python.

    Args:
        run_file: The run file.
        overrides: ``path=value`` settings above it.
        overwrite: Delete an earlier run of the same name.
        force: Train even if the GPU is estimated to be too small.
        reporter: Receives progress; plain lines on stderr by default.

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
    return train_plan(plan, overwrite=overwrite, reporter=reporter, stem=run_file.stem)


def train_plan(
    plan: Plan, *, overwrite: bool = False, reporter: Reporter | None = None, stem: str = "run"
) -> RunResult:
    """Trains a resolved plan (see :func:`train`), without a look at the GPU's memory."""
    reporter = reporter or PlainReporter(plan.spec.logging.logging_steps)
    spec = plan.spec
    check_packages(spec)
    note = prepare_process()
    folder = create_run_folder(spec.output_dir, spec.name, stem, dump_plan(plan), overwrite=overwrite)
    for line in (f"run folder {folder.path}, plan {plan.digest[:12]}", note):
        reporter.say(line)
    try:
        with translated_errors(folder.log):
            reporter.say("loading torch and transformers ...")
            with library_logs(folder.log), hub_or_copies(spec, reporter.say):
                return _train(plan, folder, reporter)
    finally:
        reporter.finish()
        folder.settle()


def _train(plan: Plan, folder: RunFolder, reporter: Reporter) -> RunResult:
    """The run itself. Data comes first: what is wrong with it is said before any weight is read."""
    from forge_cli.build.adapter import prepare_trainable
    from forge_cli.build.compute import choose_compute
    from forge_cli.build.data import prepare_data
    from forge_cli.build.model import check_lengths, describe_model, load_model
    from forge_cli.build.reference import release_reference
    from forge_cli.build.tokenizer import load_tokenizer
    from forge_cli.data.report_text import render_report
    from forge_cli.parts.memory import MemoryCallback
    from forge_cli.run.answers import Examination
    from forge_cli.run.report import Findings, write_report

    spec = plan.spec
    began, memory = time.perf_counter(), MemoryCallback()
    compute = choose_compute(spec)
    reporter.say(f"{compute.device_name}: {compute.reason}")

    tokenizer = load_tokenizer(spec)
    data = prepare_data(spec, tokenizer, reporter.say)
    reporter.say(render_report(data.report))
    # A reward model scores answers and writes none.
    section = spec.report if spec.method != "reward" else None
    examination = Examination(section, data.questions, tokenizer, compute.autocast_dtype)

    model = load_model(spec, compute)
    check_lengths(spec, model, tokenizer)
    reporter.say(describe_model(spec, compute, model))
    model, trainable = prepare_trainable(model, spec)
    _describe_trainable(plan, trainable, reporter)

    memory.mark("load")
    reporter.say(examination.announce("before"))
    before = examination.answer(model)
    trainer, reference = _build_trainer(plan, folder, reporter, model, tokenizer, data, compute, memory)
    _prove_sequences(plan, trainer, compute, reporter)
    training = _run_training(plan, trainer, reporter)
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
    return RunResult(folder.path, weights, write_report(findings, folder))


def _run_training(plan: Plan, trainer, reporter: Reporter) -> TrainingFigures:
    """Trains, with an evaluation before and after; the peak of memory is the training's own."""
    from forge_cli.run.report import TrainingFigures

    memory = trainer.monitor.memory
    loss_before = trainer.evaluate_now()
    # The trainer's own arithmetic of epochs, batches and accumulation.
    num_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if not plan.spec.training.max_steps:
        for warning in warn_about_ema(plan.spec, num_steps):
            reporter.say(f"note: {warning}")
    reporter.start(num_steps)
    trainer.add_callback(memory)
    memory.mark("preparation")
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    loss_after = trainer.evaluate_now()
    # More than a thousandth: less is what rounding does.
    if loss_after and loss_after["eval_loss"] > 1.001 * loss_before["eval_loss"]:
        worse = f"the held-out loss rose from {loss_before['eval_loss']:.4f} to {loss_after['eval_loss']:.4f}"
        trainer.monitor.alarm(num_steps, "worse", worse)
    reporter.finish()
    return TrainingFigures(loss_before, loss_after, seconds, memory)


def _build_trainer(
    plan: Plan,
    folder: RunFolder,
    reporter: Reporter,
    model,
    tokenizer,
    data: PreparedData,
    compute: Compute,
    memory: MemoryCallback,
):
    from forge_cli.backend import methods
    from forge_cli.build import reference as references
    from forge_cli.build.callbacks import build_ema, build_monitor

    reference = references.prepare_reference(plan.spec, compute)
    args = methods.build_training_args(
        plan.spec,
        output_dir=folder.checkpoints,
        compute_dtype=compute.autocast_dtype,
        device=compute.device,
        has_eval=data.eval is not None,
    )
    trainer = methods.build_trainer(
        plan.spec,
        model=model,
        tokenizer=tokenizer,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        monitor=build_monitor(plan.spec, folder.metrics, reporter.record, data.name_rows, memory),
        ema=build_ema(plan.spec),
        ref_model=reference.model if reference else None,
    )
    if reference is None:
        return trainer, None
    return trainer, references.install_reference(trainer, plan.spec, reference, compute, reporter.say)


def _prove_sequences(plan: Plan, trainer, compute, reporter: Reporter) -> None:
    """Asks the model whether rows that share a sequence see each other, where rows do share one.

    Raises:
        ModelError: They do.
    """
    import torch

    from forge_cli.parts.sequence_test import TOLERANCE_16_BIT, TOLERANCE_FLOAT32, measure_leak

    data = plan.spec.data
    if not (data.packing or data.padding_free):
        return
    first = next(one for one in trainer.train_dataset)
    ids, cuts = first["input_ids"], first.get("seq_lengths") or [len(first["input_ids"])]
    rows = [ids[: cuts[0]], ids[cuts[0] :][: cuts[1]] if len(cuts) > 1 else ids]
    leak = measure_leak(trainer.model, rows, trainer.data_collator, compute.autocast_dtype)
    if leak > (TOLERANCE_FLOAT32 if compute.dtype is torch.float32 else TOLERANCE_16_BIT):
        attention = trainer.model.config._attn_implementation
        raise ModelError(
            f"rows that share a sequence see each other with attention {attention}: log probabilities differ by "
            f"{leak:.2g} nats from those of a row alone",
            why="the model would learn to continue one row with another",
            fix="write data.packing: false and data.padding_free: false, or another model.attn_implementation",
        )
    reporter.say(f"rows that share a sequence do not see each other (two rows compared, {leak:.1e} nats)")


def _describe_trainable(plan: Plan, trainable, reporter: Reporter) -> None:
    share = 100 * trainable.num_trainable_parameters / trainable.num_parameters
    targets = f" in {', '.join(trainable.target_modules)}" if trainable.target_modules else ""
    reporter.say(
        f"trained: {format_count(trainable.num_trainable_parameters)} of "
        f"{format_count(trainable.num_parameters)} parameters ({share:.2f} %){targets}"
    )
    freeze = trainable.freeze
    if freeze is None:
        return
    reporter.say(freeze.layer_map())
    if freeze.blocked_by:
        reporter.say(
            f"note: {freeze.blocked_by} is trained below the frozen layers, so they still need a backward pass"
        )
        return
    ratio = freeze.compute_ratio(
        trains_weights=plan.spec.lora is None, activation_checkpointing=plan.spec.training.activation_checkpointing
    )
    saved = _estimate_saved_bytes(plan)
    memory = f", about {format_bytes(saved)} less memory at full length" if saved else ""
    reporter.say(f"frozen layers run forward only: {100 * (1 - ratio):.0f} % less matmul work in the layers{memory}")


def _estimate_saved_bytes(plan: Plan) -> int:
    """Estimates what freezing saves at the peak of a step; 0 where the model's shape is not known."""
    with_freeze = estimate_from_plan(plan)
    spec = plan.spec.model_copy(update={"freeze": None})
    derived = replace(plan.derived, num_frozen_layers=0)
    without = estimate_from_plan(replace(plan, spec=spec, derived=derived))
    return without.total_bytes - with_freeze.total_bytes if with_freeze and without else 0


def _save(model, tokenizer, folder: RunFolder, ema, system_prompt: str | None) -> Path:
    """Saves the weights to use (the averaged ones with EMA on) and keeps the raw ones beside them."""
    from forge_cli.run.artifacts import save_weights

    name = "adapter" if hasattr(model, "peft_config") else "model"
    weights = save_weights(model, tokenizer, folder, name, system_prompt)
    if ema:
        ema.restore_original(model)
        save_weights(model, tokenizer, folder, f"{name}-raw", system_prompt)
    return weights
