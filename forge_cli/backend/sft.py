"""Supervised fine-tuning on TRL's SFTTrainer.

Forge hands over a finished model and finished rows. TRL contributes its fused LM head (the logits of the whole
vocabulary are never built) and its padding-free collator; transformers the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from forge_cli.backend.arguments import build_arguments
from forge_cli.backend.watching import EMA_PREFIX, WatchedTrainer, WeightedMeans, construct_trainer
from forge_cli.parts.ema import EMACallback
from forge_cli.parts.labels import IGNORED
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.schema.runspec import RunSpec

__all__ = ["EMA_PREFIX", "ForgeSFTTrainer", "build_trainer", "build_training_args"]


def build_training_args(
    spec: RunSpec, *, output_dir: Path, compute_dtype: torch.dtype, device: str, has_eval: bool
) -> SFTConfig:
    """Translates a run file into TRL's arguments; see :func:`forge_cli.backend.arguments.build_arguments`."""
    return build_arguments(
        SFTConfig,
        spec,
        output_dir=output_dir,
        compute_dtype=compute_dtype,
        device=device,
        has_eval=has_eval,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=spec.data.packing or spec.data.padding_free,
    )


class ForgeSFTTrainer(WatchedTrainer, SFTTrainer):
    """SFTTrainer that shows the monitor every micro step and evaluates the EMA weights beside the raw ones."""

    shards_evaluation = True

    def weigh_loss(self, loss: torch.Tensor, inputs: dict) -> WeightedMeans:
        """The loss is a mean over the trained tokens of a batch."""
        return [(loss, (inputs["labels"][:, 1:] != IGNORED).sum())]


def build_trainer(
    *,
    model,
    tokenizer,
    args: SFTConfig,
    train_dataset,
    eval_dataset,
    monitor: MonitorCallback,
    ema: EMACallback | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> ForgeSFTTrainer:
    """Builds the trainer; see :func:`forge_cli.backend.watching.construct_trainer`."""
    return construct_trainer(
        ForgeSFTTrainer,
        model=model,
        processing_class=tokenizer,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        monitor=monitor,
        ema=ema,
        callbacks=callbacks,
    )
