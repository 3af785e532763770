"""Arguments for a plain ``transformers.Trainer``, for the Python API."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from forge_cli.backend.sft import checkpointing_fields
from forge_cli.schema.runspec import RunSpec


def build_plain_args(spec: RunSpec, *, compute_dtype: torch.dtype, device: str) -> TrainingArguments:
    """Translates a preset into ``TrainingArguments``; ``output_dir`` and the rest may be changed afterwards.

    Args:
        spec: The preset as a run file.
        compute_dtype: Format of the forward and backward pass.
        device: ``cpu``, ``cuda:0`` or ``mps``.
    """
    training = spec.training
    return TrainingArguments(
        output_dir=spec.output_dir,
        learning_rate=training.learning_rate,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        optim=training.optim,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=compute_dtype is torch.bfloat16,
        fp16=compute_dtype is torch.float16,
        seed=spec.seed,
        use_cpu=device == "cpu",
        logging_steps=spec.logging.logging_steps,
        logging_nan_inf_filter=False,
        report_to=list(spec.logging.report_to) or "none",
        dataloader_pin_memory=device.startswith("cuda"),
        **checkpointing_fields(TrainingArguments, training.activation_checkpointing),
    )
