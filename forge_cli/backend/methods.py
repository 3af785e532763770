"""Arguments and trainer of every training method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from forge_cli.backend import sft
from forge_cli.backend.arguments import build_arguments
from forge_cli.backend.experimental import METHODS as EXPERIMENTAL
from forge_cli.backend.experimental import load_experimental
from forge_cli.backend.preference import STABLE, list_fields
from forge_cli.backend.watching import WatchedTrainer, construct_trainer
from forge_cli.parts.ema import EMACallback
from forge_cli.parts.layers import unwrap_model
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.schema.runspec import RunSpec


def find_trainer(method: str) -> tuple[type[WatchedTrainer], type[TrainingArguments]]:
    """Returns trainer and arguments of a method.

    Raises:
        MachineError: The installed TRL does not have it.
    """
    if method == "sft":
        return sft.ForgeSFTTrainer, sft.SFTConfig
    return load_experimental(method) if method in EXPERIMENTAL else STABLE[method]


def build_training_args(
    spec: RunSpec, *, output_dir: Path, compute_dtype: torch.dtype, device: str, has_eval: bool
) -> TrainingArguments:
    """Translates a run file into the arguments of its method's trainer; see ``build_arguments``."""
    common = {"output_dir": output_dir, "compute_dtype": compute_dtype, "device": device, "has_eval": has_eval}
    if spec.method == "sft":
        return sft.build_training_args(spec, **common)
    return build_arguments(find_trainer(spec.method)[1], spec, **common, disable_dropout=True, **list_fields(spec))


def build_trainer(
    spec: RunSpec,
    *,
    model,
    tokenizer,
    args: TrainingArguments,
    train_dataset,
    eval_dataset,
    monitor: MonitorCallback,
    ema: EMACallback | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    ref_model=None,
) -> WatchedTrainer:
    """Builds the trainer of a run's method around a finished model and finished rows.

    Args:
        spec: The resolved run file.
        model: The model, with adapters placed and layers frozen.
        tokenizer: Its tokenizer.
        args: From :func:`build_training_args`.
        train_dataset: For sft ``input_ids`` and ``labels``; for kto ``prompt_ids``, ``completion_ids`` and ``label``;
            else ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``. ``row`` is the number of the source row.
        eval_dataset: The same columns, or ``None``.
        monitor: Watches the run.
        ema: Averages the weights.
        callbacks: Further callbacks.
        ref_model: A frozen second model as the reference, for dpo and kto.
    """
    # Experts that no token chose get no gradient; looking for such weights costs each step a walk of the graph.
    args.ddp_find_unused_parameters = any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    parts = {
        "model": model,
        "args": args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "monitor": monitor,
        "ema": ema,
        "callbacks": callbacks,
    }
    if spec.method == "sft":
        return sft.build_trainer(tokenizer=tokenizer, **parts)
    if ref_model is not None:
        parts["ref_model"] = ref_model
    if spec.method == "kto":
        # Its batches stay what they are from the start, and are to hold answers to different prompts.
        for name in ("train_dataset", "eval_dataset"):
            parts[name] = parts[name] and parts[name].shuffle(seed=spec.seed)
    trainer = construct_trainer(find_trainer(spec.method)[0], processing_class=tokenizer, **parts)
    _hook_embeddings_once(unwrap_model(model))
    return trainer


def _hook_embeddings_once(model) -> None:
    """Keeps TRL from leaving one more hook on the embeddings with every batch.

    It switches checkpointing off and on around the reference, and transformers hooks the embeddings each time.
    """
    install = model.enable_input_require_grads

    def install_once() -> None:
        if not getattr(model, "_require_grads_hooks", None):
            install()

    model.enable_input_require_grads = install_once
