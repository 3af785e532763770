"""The training itself: a trainer is built, or taken up where a checkpoint left it, and run to its end."""

from __future__ import annotations

import contextlib
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from forge_cli.backend import methods
from forge_cli.backend.keeping import RollBack
from forge_cli.build import reference as references
from forge_cli.build.callbacks import build_ema, build_monitor
from forge_cli.build.compute import Compute
from forge_cli.build.data import PreparedData
from forge_cli.checkpoints.store import CheckpointStore, refuse_broken
from forge_cli.errors import CheckpointError, ModelError
from forge_cli.parts.keeper import Keeper
from forge_cli.parts.memory import MemoryCallback
from forge_cli.parts.ranks import share, wait_for_all
from forge_cli.parts.sequence_test import TOLERANCE_16_BIT, TOLERANCE_FLOAT32, measure_leak
from forge_cli.parts.stop_request import StopRequest
from forge_cli.resolve.plan import Plan
from forge_cli.resolve.rules_training import warn_about_ema
from forge_cli.run.folder import RunFolder, write_atomic
from forge_cli.run.report import TrainingFigures
from forge_cli.run.reporter import Reporter, gather_expectations
from forge_cli.run.resume import ResumePoint
from forge_cli.run.room import check_room
from forge_cli.run.watchdog import Watchdog, read_limit

if TYPE_CHECKING:
    from forge_cli.backend.watching import WatchedTrainer

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def build_trainer(
    plan: Plan,
    folder: RunFolder,
    reporter: Reporter,
    model,
    tokenizer,
    data: PreparedData,
    compute: Compute,
    memory: MemoryCallback,
) -> tuple[WatchedTrainer, dict | None]:
    """Builds the trainer of a run; returns what was measured of its reference as well."""
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
        monitor=build_monitor(
            plan.spec, folder.metrics if folder.rank.is_main else None, reporter.record, data.name_rows, memory
        ),
        ema=build_ema(plan.spec),
        ref_model=reference.model if reference else None,
    )
    if plan.spec.checkpoint:
        store = CheckpointStore(folder.checkpoints, folder.run_id, plan.spec.checkpoint.save_total_limit)
        about = {
            "plan_digest": plan.digest,
            "data_fingerprint": data.fingerprint,
            "world_size": args.world_size,
            "versions": {name: version(name) for name in PACKAGES},
        }
        trainer.keeper = Keeper(store, about, reporter.say)
    if reference is None:
        return trainer, None
    return trainer, references.install_reference(trainer, plan.spec, reference, compute, reporter.say)


def prove_sequences(plan: Plan, trainer, compute, reporter: Reporter) -> None:
    """Asks the model whether rows that share a sequence see each other, where rows do share one.

    Raises:
        ModelError: They do.
    """
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


def run_training(
    plan: Plan,
    folder: RunFolder,
    trainer: WatchedTrainer,
    reporter: Reporter,
    point: ResumePoint | None,
    stop: StopRequest,
) -> TrainingFigures:
    """Trains, with an evaluation before and after; the peak of memory is the training's own.

    Args:
        plan: What to do.
        folder: The run.
        trainer: From :func:`build_trainer`.
        reporter: Receives progress.
        point: Where to go on; ``None`` begins at the first step.
        stop: What signals asked for.
    """
    memory = trainer.monitor.memory
    watchdog = Watchdog(folder.log.parent, read_limit(), folder.rank)
    trainer.stop, trainer.on_progress = stop, watchdog.mark
    # The trainer's own arithmetic of epochs, batches and accumulation.
    num_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if folder.rank.is_main:
        check_room(plan, folder.path, folder.run_id, trainer.model, num_steps)
        expected = gather_expectations(plan, on_gpu=trainer.args.device.type == "cuda")
        with contextlib.suppress(OSError):
            folder.note_facts(expected={"num_steps": num_steps, **expected})
        if hasattr(reporter, "expect"):
            reporter.expect(first_step=point.checkpoint.step if point else 0, **expected)
    loss_before = _take_up(folder, trainer, point) or trainer.evaluate_now()
    if not plan.spec.training.max_steps:
        for warning in warn_about_ema(plan.spec, num_steps):
            reporter.say(f"note: {warning}")
    if point and point.checkpoint.step >= num_steps:
        reporter.say(f"all {num_steps} steps are done; only the weights and the report are left to be written")
    reporter.start(num_steps)
    trainer.add_callback(memory)
    memory.mark("preparation")
    began = time.perf_counter()
    with watchdog.watching():
        _train_through(trainer, point.checkpoint.path if point else None, reporter)
        seconds = time.perf_counter() - began
        loss_after = trainer.evaluate_now()
    # More than a thousandth: less is what rounding does.
    if loss_after and loss_before and loss_after["eval_loss"] > 1.001 * loss_before["eval_loss"]:
        worse = f"the held-out loss rose from {loss_before['eval_loss']:.4f} to {loss_after['eval_loss']:.4f}"
        trainer.monitor.alarm(num_steps, "worse", worse)
    reporter.finish()
    return TrainingFigures(loss_before, loss_after, seconds, memory)


def _train_through(trainer: WatchedTrainer, path: Path | None, reporter: Reporter) -> None:
    """Trains to the end, and from the newest checkpoint again as often as the trainer asks for that."""
    while True:
        try:
            trainer.train(resume_from_checkpoint=str(path) if path else None)
        except RollBack as event:
            if trainer.keeper is None:
                raise CheckpointError(
                    event.reason, why="there is no checkpoint to go back to", fix="remove checkpoint: null"
                ) from event
            trainer.keeper.finish()
            wait_for_all()  # the first process writes, all of them read
            checkpoint, broken = trainer.keeper.store.find_newest()
            if checkpoint is None:
                raise refuse_broken(broken, trainer.keeper.store.root) from event
            path = checkpoint.path
            reporter.say(f"{event.reason}: back to {path.name}")
        else:
            break
    trainer.check_equal_weights()
    if trainer.keeper:
        trainer.keeper.finish(is_over=True)


def _take_up(folder: RunFolder, trainer: WatchedTrainer, point: ResumePoint | None) -> dict[str, float] | None:
    """Gives the monitor the records of the steps that are done; returns the evaluation before the first of them."""
    if point is None or not folder.rank.is_main:
        return share()
    text = "".join(json.dumps(record) + "\n" for record in point.records)
    write_atomic(folder.metrics, text)
    trainer.monitor.take_up(point.records)
    return share(next((one for one in point.records if one.get("step") == 0 and "eval_loss" in one), None))
