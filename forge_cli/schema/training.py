"""How the run goes: optimisation, evaluation, checkpoints, logs, report."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge_cli.schema.section import LARGEST_FACTOR, MOST_IN_BATCH, MOST_STEPS, Section, Steps


class TrainingSection(Section):
    """Optimisation, under the names of transformers' ``TrainingArguments``."""

    learning_rate: float = Field(default=2e-5, gt=0, le=1, description="Peak learning rate.")
    num_train_epochs: float = Field(default=3, gt=0, le=1_000_000, description="Passes over the training rows.")
    max_steps: int | None = Field(
        default=None, ge=1, le=MOST_STEPS, description="Optimizer steps; when given, num_train_epochs is not used."
    )
    per_device_train_batch_size: int = Field(
        default=4, ge=1, le=MOST_IN_BATCH, description="Rows per device and micro step."
    )
    gradient_accumulation_steps: int = Field(
        default=4, ge=1, le=MOST_IN_BATCH, description="Micro steps per optimizer step."
    )
    optim: Literal[
        "adamw_torch_fused",
        "adamw_torch",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_32bit",
        "lion_8bit",
        "adafactor",
        "sgd",
    ] = Field(default="adamw_torch_fused", description="Optimizer.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        default="cosine", description="Shape of the learning rate over the run."
    )
    warmup_steps: float = Field(
        default=0.03,
        ge=0,
        le=MOST_STEPS,
        description="Steps of rising learning rate; below 1 it is a share of all steps.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1000, description="Decoupled weight decay.")
    train_sampling_strategy: Literal["random", "group_by_length"] = Field(
        default="random", description="Order of the rows; group_by_length batches rows of similar length: less padding."
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        le=LARGEST_FACTOR,
        description="Gradients are scaled down to this global norm; 0 leaves them alone.",
    )
    activation_checkpointing: bool = Field(
        default=True, description="Recompute activations in the backward pass: less memory, more time."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="Compute format. auto: bf16 where the GPU has it, else fp16; fp32 on the CPU."
    )


class EvaluationSection(Section):
    """Evaluation while training. Needs an evaluation split in ``data``."""

    eval_steps: Steps | Literal["epoch"] = Field(
        default="epoch", description="Optimizer steps between evaluations, or epoch. There is always one at the end."
    )
    per_device_eval_batch_size: int = Field(
        default=8, ge=1, le=MOST_IN_BATCH, description="Rows per device and evaluation step."
    )


class CheckpointSection(Section):
    """Checkpoints while training. ``checkpoint: null`` keeps only the final weights."""

    save_steps: Steps | Literal["epoch"] = Field(default="epoch", description="Steps between checkpoints, or epoch.")
    save_total_limit: int = Field(default=2, ge=1, le=1_000_000, description="How many checkpoints are kept.")


class LoggingSection(Section):
    """What is written while training; ``metrics.jsonl`` always holds every step."""

    logging_steps: int = Field(default=10, ge=1, le=MOST_STEPS, description="Optimizer steps between log lines.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=[], description="Trackers to send the log to; each needs its package."
    )


class ReportSection(Section):
    """Answers generated before and after training, for the report. ``report: null`` generates none."""

    samples: int = Field(
        default=4, ge=0, le=100_000, description="Rows of the evaluation split shown with their answers."
    )
    exact_match: bool = Field(
        default=False, description="Answer every evaluation row before and after, and count exact matches."
    )
    max_new_tokens: int = Field(default=64, ge=1, le=1_000_000, description="Longest generated answer, in tokens.")
    prompts: list[str] = Field(default=[], description="Further prompts to answer before and after training.")
