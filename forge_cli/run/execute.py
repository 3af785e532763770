"""Carries out one plan: the table of contents of a fine-tuning run.

Nothing outside :func:`_train` imports torch; everything that can be wrong in the run file has been said by then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.resolve.plan import Plan, dump_plan, resolve_plan
from forge_cli.resolve.rules_training import warn_about_ema
from forge_cli.run.folder import RunFolder, create_run_folder
from forge_cli.run.process import check_packages, library_logs, prepare_process, translated_errors
from forge_cli.run.reporter import PlainReporter, Reporter
from forge_cli.units import format_bytes, format_count

if TYPE_CHECKING:
    from forge_cli.build.data import PreparedData
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
    run_file: str | Path, overrides: Sequence[str] = (), *, overwrite: bool = False, reporter: Reporter | None = None
) -> RunResult:
    """Trains what a run file says: ``forge train`` for Python.

    Args:
        run_file: The run file.
        overrides: ``path=value`` settings above it.
        overwrite: Delete an earlier run of the same name.
        reporter: Receives progress; plain lines on stderr by default.

    Returns:
        Where the run's files are, and its report.

    Raises:
        ForgeError: Of any kind; its exit code tells which.
    """
    run_file = Path(run_file)
    plan = resolve_plan(run_file, overrides)
    return train_plan(plan, overwrite=overwrite, reporter=reporter, stem=run_file.stem)


def train_plan(
    plan: Plan, *, overwrite: bool = False, reporter: Reporter | None = None, stem: str = "run"
) -> RunResult:
    """Trains a resolved plan (see :func:`train`)."""
    reporter = reporter or PlainReporter(plan.spec.logging.logging_steps)
    spec = plan.spec
    check_packages(spec)
    note = prepare_process()
    folder = create_run_folder(spec.output_dir, spec.name, stem, dump_plan(plan), overwrite=overwrite)
    for line in (f"run folder {folder.path}, plan {plan.digest[:12]}", note, describe_memory(plan)):
        reporter.say(line)
    try:
        with translated_errors(folder.log):
            reporter.say("loading torch and transformers ...")
            with library_logs(folder.log):
                return _train(plan, folder, reporter)
    finally:
        reporter.finish()
        folder.settle()


def describe_memory(plan: Plan) -> str:
    """Says what a GPU would have to hold at the peak of a step; nothing where the model's shape is not known."""
    estimate = estimate_from_plan(plan)
    if estimate is None:
        return ""
    parts = {
        "weights": estimate.weights_bytes,
        "gradients and optimizer": estimate.gradients_bytes + estimate.optimizer_bytes,
        "activations": estimate.activations_bytes + estimate.working_bytes,
        "EMA": estimate.ema_bytes,
    }
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    return f"estimated peak on a GPU, rows at full length: {format_bytes(estimate.total_bytes)} ({listed})"


def _train(plan: Plan, folder: RunFolder, reporter: Reporter) -> RunResult:
    """The run itself. Data comes first: what is wrong with it is said before any weight is read."""
    from forge_cli.build.adapter import prepare_trainable
    from forge_cli.build.compute import choose_compute
    from forge_cli.build.data import prepare_data
    from forge_cli.build.model import check_lengths, describe_model, load_model, load_tokenizer
    from forge_cli.run.answers import Examination
    from forge_cli.run.report import Findings, write_report

    spec = plan.spec
    began = time.perf_counter()
    compute = choose_compute(spec)
    reporter.say(f"{compute.device_name}: {compute.reason}")

    tokenizer = load_tokenizer(spec)
    data = prepare_data(spec, tokenizer)
    for split in data.reports:
        reporter.say(split.line())
    examination = Examination(spec.report, data.questions, tokenizer, compute.autocast_dtype)

    model = load_model(spec, compute)
    check_lengths(spec, model, tokenizer)
    reporter.say(describe_model(spec, compute, model))
    model, trainable = prepare_trainable(model, spec)
    _describe_trainable(plan, trainable, reporter)

    reporter.say(examination.announce("before"))
    before = examination.answer(model)
    trainer = _build_trainer(plan, folder, reporter, model, tokenizer, data, compute)
    training = _run_training(plan, trainer, reporter)

    if trainer.ema:
        trainer.ema.apply_ema(trainer.model)
    reporter.say(examination.announce("after"))
    after = examination.answer(trainer.model)
    weights = _save(trainer.model, tokenizer, folder, trainer.ema)
    findings = Findings(
        plan=plan,
        compute=compute,
        data=data,
        trainable=trainable,
        monitor=trainer.monitor,
        weights=weights,
        training=training,
        total_seconds=time.perf_counter() - began,
        samples=examination.pair(before, after),
        exact_match_before=examination.exact_match_ratio(before),
        exact_match_after=examination.exact_match_ratio(after),
    )
    return RunResult(folder.path, weights, write_report(findings, folder))


def _run_training(plan: Plan, trainer, reporter: Reporter) -> TrainingFigures:
    """Trains, with an evaluation before and after; the peak of memory is the training's own."""
    from forge_cli.parts.memory import peak_memory_bytes, reset_peak_memory
    from forge_cli.run.report import TrainingFigures

    loss_before = trainer.evaluate_now()
    # The trainer's own arithmetic of epochs, batches and accumulation.
    num_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if not plan.spec.training.max_steps:
        for warning in warn_about_ema(plan.spec, num_steps):
            reporter.say(f"note: {warning}")
    reporter.start(num_steps)
    reset_peak_memory()
    began = time.perf_counter()
    trainer.train()
    seconds, peak = time.perf_counter() - began, peak_memory_bytes()
    loss_after = trainer.evaluate_now()
    if loss_after and loss_after["eval_loss"] > loss_before["eval_loss"]:
        worse = f"the held-out loss rose from {loss_before['eval_loss']:.4f} to {loss_after['eval_loss']:.4f}"
        trainer.monitor.alarm(num_steps, "worse", worse)
    reporter.finish()
    return TrainingFigures(loss_before, loss_after, seconds, peak)


def _build_trainer(plan: Plan, folder: RunFolder, reporter: Reporter, model, tokenizer, data: PreparedData, compute):
    from forge_cli.backend import sft
    from forge_cli.build.callbacks import build_ema, build_monitor

    args = sft.build_training_args(
        plan.spec,
        output_dir=folder.checkpoints,
        compute_dtype=compute.autocast_dtype,
        device=compute.device,
        has_eval=data.eval is not None,
    )
    return sft.build_trainer(
        model=model,
        tokenizer=tokenizer,
        args=args,
        train_dataset=_pack(plan.spec, data, reporter),
        eval_dataset=data.eval,
        monitor=build_monitor(plan.spec, folder.metrics, reporter.record),
        ema=build_ema(plan.spec),
    )


def _pack(spec, data: PreparedData, reporter: Reporter):
    if not spec.data.packing:
        return data.train
    from forge_cli.backend.sft import pack_rows

    packed = pack_rows(data.train, spec.data.max_length)
    filled = data.reports[0].tokens / (len(packed) * spec.data.max_length)
    reporter.say(f"packing: {len(data.train)} rows in {len(packed)} sequences, {100 * filled:.0f} % filled")
    return packed


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


def _save(model, tokenizer, folder: RunFolder, ema) -> Path:
    """Saves the weights to use (the averaged ones with EMA on) and keeps the raw ones beside them."""
    from forge_cli.run.artifacts import save_weights

    name = "adapter" if hasattr(model, "peft_config") else "model"
    weights = save_weights(model, tokenizer, folder, name)
    if ema:
        ema.restore_original(model)
        save_weights(model, tokenizer, folder, f"{name}-raw")
    return weights
