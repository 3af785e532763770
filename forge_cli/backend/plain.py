"""Arguments for a plain ``transformers.Trainer``, for the Python API."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from forge_cli.backend.arguments import checkpointing_fields, shared_fields
from forge_cli.schema.runspec import RunSpec


def build_plain_args(spec: RunSpec, *, compute_dtype: torch.dtype, device: str) -> TrainingArguments:
    """Translates a preset into ``TrainingArguments``; ``output_dir`` and the rest may be changed afterwards.

    Args:
        spec: The preset as a run file.
        compute_dtype: Format of the forward and backward pass.
        device: ``cpu``, ``cuda:0`` or ``mps``.
    """
    return TrainingArguments(
        output_dir=spec.output_dir,
        **shared_fields(spec, compute_dtype=compute_dtype, device=device),
        **checkpointing_fields(TrainingArguments, spec.training.activation_checkpointing),
    )
