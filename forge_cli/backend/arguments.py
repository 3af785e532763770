"""A run file in the words of transformers' and TRL's arguments."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from forge_cli.errors import MachineError
from forge_cli.schema.runspec import RunSpec


def build_arguments(
    kind: type[TrainingArguments],
    spec: RunSpec,
    *,
    output_dir: Path,
    compute_dtype: torch.dtype,
    device: str,
    has_eval: bool,
    **method_fields: object,
) -> TrainingArguments:
    """Translates a run file into the arguments of one of TRL's trainers.

    Args:
        kind: TRL's class of arguments.
        spec: The resolved run file.
        output_dir: Folder of the checkpoints, inside that of the run.
        compute_dtype: Format of the forward and backward pass.
        device: ``cpu``, ``cuda:0`` or ``mps``.
        has_eval: Whether there are evaluation rows.
        **method_fields: What this trainer alone takes.

    Raises:
        MachineError: The installed TRL or transformers lacks a field that is needed.
    """
    values: dict[str, object] = {
        **shared_fields(spec, compute_dtype=compute_dtype, device=device),
        "output_dir": str(output_dir),
        # What trackers call the run; they would invent a name.
        "run_name": output_dir.parent.name,
        "project": os.environ.get("TRACKIO_PROJECT", "forge"),
        "data_seed": spec.seed,
        "logging_first_step": True,
        "disable_tqdm": True,
        # Forge made the rows: nothing is to be tokenised, cut, dropped or renamed behind its back.
        "remove_unused_columns": False,
        "push_to_hub": False,
        **checkpointing_fields(kind, spec.training.activation_checkpointing),
        **_schedule_of("eval", spec.evaluation.eval_steps if has_eval else None),
        **_schedule_of("save", spec.checkpoint.save_steps if spec.checkpoint else None),
        **method_fields,
    }
    if spec.checkpoint:
        values["save_total_limit"] = spec.checkpoint.save_total_limit
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise MachineError(
            f"{describe_versions()}: {kind.__name__} does not know {', '.join(unknown)}",
            why="a setting of this run would not take effect",
            fix='pip install "trl>=1.16,<2" "transformers>=5.19,<6"',
        )
    return kind(**values)


def describe_versions() -> str:
    """Names the installed versions that trainers depend on."""
    import transformers
    import trl

    return f"TRL {trl.__version__} with transformers {transformers.__version__}"


def shared_fields(spec: RunSpec, *, compute_dtype: torch.dtype, device: str) -> dict[str, object]:
    """Returns the arguments that a plain Trainer and TRL's share."""
    training = spec.training
    return {
        "learning_rate": training.learning_rate,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": spec.evaluation.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "optim": training.optim,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "train_sampling_strategy": training.train_sampling_strategy,
        "bf16": compute_dtype is torch.bfloat16,
        "fp16": compute_dtype is torch.float16,
        "seed": spec.seed,
        "use_cpu": device == "cpu",
        "logging_steps": spec.logging.logging_steps,
        "report_to": list(spec.logging.report_to) or "none",
        # NaN must be seen: the filter replaces it with an average that becomes exactly 0.
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": device.startswith("cuda"),
    }


def checkpointing_fields(arguments: type, wanted: bool) -> dict[str, object]:
    """Names the checkpointing switch as the installed transformers does (renamed in 5.2x, the old name goes in 6).

    TRL switches the old name on by default, so both names have to agree. Reentrant checkpointing is never used:
    behind frozen layers it trains nothing at all, silently.
    """
    known = {field.name for field in dataclasses.fields(arguments)}
    prefix = "activation" if "activation_checkpointing" in known else "gradient"
    trl_name = {"gradient_checkpointing": wanted} if arguments is not TrainingArguments else {}
    options = {f"{prefix}_checkpointing": wanted, f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
    return trl_name | options


def _schedule_of(kind: str, steps: int | str | None) -> dict[str, object]:
    if steps is None:
        return {f"{kind}_strategy": "no"}
    if steps == "epoch":
        return {f"{kind}_strategy": "epoch"}
    return {f"{kind}_strategy": "steps", f"{kind}_steps": steps}
