"""Supervised fine-tuning on TRL's SFTTrainer: the one module that names TRL and its arguments.

Forge hands over a finished model and finished rows. TRL contributes its fused LM head (the logits of the whole
vocabulary are never built), its padding-free collator and packing; transformers the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from forge_cli.errors import MachineError
from forge_cli.parts.ema import EMACallback
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.parts.rendering import IGNORED
from forge_cli.schema.runspec import RunSpec

EMA_PREFIX = "eval_ema"


def build_training_args(
    spec: RunSpec, *, output_dir: Path, compute_dtype: torch.dtype, device: str, has_eval: bool
) -> SFTConfig:
    """Translates a run file into TRL's arguments; what the installed versions do not know is an error.

    Args:
        spec: The resolved run file.
        output_dir: Folder of the checkpoints.
        compute_dtype: Format of the forward and backward pass.
        device: ``cpu``, ``cuda:0`` or ``mps``.
        has_eval: Whether there are evaluation rows.

    Raises:
        MachineError: The installed TRL or transformers lacks a field that is needed.
    """
    values: dict[str, object] = {
        **shared_fields(spec, compute_dtype=compute_dtype, device=device),
        "output_dir": str(output_dir),
        "data_seed": spec.seed,
        "logging_first_step": True,
        "disable_tqdm": True,
        # Forge made the rows: nothing is to be tokenised, cut, dropped or renamed behind its back.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": None,
        "packing": False,
        "padding_free": spec.data.packing,
        "push_to_hub": False,
        **checkpointing_fields(SFTConfig, spec.training.activation_checkpointing),
        **_schedule_of("eval", spec.evaluation.eval_steps if has_eval else None),
        **_schedule_of("save", spec.checkpoint.save_steps if spec.checkpoint else None),
    }
    if spec.checkpoint:
        values["save_total_limit"] = spec.checkpoint.save_total_limit
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        import transformers
        import trl

        raise MachineError(
            f"TRL {trl.__version__} with transformers {transformers.__version__} does not know {', '.join(unknown)}",
            why="a setting of this run would not take effect",
            fix='pip install "trl>=1.16,<2" "transformers>=5.19,<6"',
        )
    return SFTConfig(**values)


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
    trl_name = {"gradient_checkpointing": wanted} if issubclass(arguments, SFTConfig) else {}
    options = {f"{prefix}_checkpointing": wanted, f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
    return trl_name | options


def _schedule_of(kind: str, steps: int | str | None) -> dict[str, object]:
    if steps is None:
        return {f"{kind}_strategy": "no"}
    if steps == "epoch":
        return {f"{kind}_strategy": "epoch"}
    return {f"{kind}_strategy": "steps", f"{kind}_steps": steps}


class RowCollator:
    """Wraps TRL's collator: keeps the numbers of the data rows and the count of real tokens with each batch."""

    def __init__(self, collator) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict]) -> dict[str, object]:
        """Collates; training rows carry ``rows``, one number per token (packing joins several rows)."""
        batch = self.collator([{k: v for k, v in example.items() if k != "rows"} for example in examples])
        if "rows" in examples[0]:
            batch["rows"] = sorted({row for example in examples for row in example["rows"]})
            batch["real_tokens"] = sum(len(example["input_ids"]) for example in examples)
        return batch


class ForgeSFTTrainer(SFTTrainer):
    """SFTTrainer that shows the monitor every micro step and evaluates the EMA weights beside the raw ones.

    A subclass and not a callback, because no event carries a micro step's loss or the gradients before clipping.
    """

    def __init__(self, *args, monitor: MonitorCallback, ema: EMACallback | None = None, **kwargs) -> None:
        for name in ("_clip_grad_norm", "_get_grad_norm"):
            if not hasattr(SFTTrainer, name):
                raise MachineError(
                    f"the installed transformers has no Trainer.{name}",
                    why="gradient norms would be measured after clipping",
                    fix='pip install "transformers>=5.19,<6"',
                )
        super().__init__(*args, **kwargs)
        self.monitor = monitor
        self.ema = ema
        self.latest_evaluation: tuple[int, dict[str, float]] = (-1, {})
        self.data_collator = RowCollator(self.data_collator)

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """Runs one micro step and hands its loss ``[]``, rows and token count to the monitor."""
        rows = inputs.pop("rows", ())
        real_tokens = inputs.pop("real_tokens", 0)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.monitor.record_micro_step(loss, rows, real_tokens)
        return loss

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Clips with the norms that the monitor needs anyway, measured before the clipping."""
        self.accelerator.unscale_gradients()
        total = self.monitor.measure_step()
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, total)
        return total

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor:
        """Leaves the norm on the device; measures it here when nothing is clipped."""
        if grad_norm is None:
            self.accelerator.unscale_gradients()
            return self.monitor.measure_step()
        return grad_norm

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Evaluates one batch and notes how many tokens its mean loss is of; stays on the device."""
        count = (inputs["labels"][:, 1:] != IGNORED).sum()
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._eval_sums.append(torch.stack([loss.detach().double() * count, count.double()]))
        return loss, logits, labels

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluates; the loss is the mean over trained tokens, not the mean of the batches' means."""
        self._eval_sums: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = torch.stack(self._eval_sums).sum(dim=0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Evaluates the raw weights, then the averaged ones under ``eval_ema``; the raw ones come back always."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        average = self.ema.average if self.ema else None
        if average is not None and not average.is_applied and metric_key_prefix == "eval":
            with average.applied():
                metrics |= super().evaluate(eval_dataset, ignore_keys, EMA_PREFIX)
        self.monitor.record_evaluation(self.state.global_step, metrics)
        self.latest_evaluation = (self.state.global_step, metrics)
        return metrics

    def evaluate_now(self) -> dict[str, float]:
        """Evaluates the present weights, unless that was the last thing done; nothing without evaluation rows."""
        if self.eval_dataset is None:
            return {}
        step, metrics = self.latest_evaluation
        return metrics if step == self.state.global_step else self.evaluate()


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
    """Builds the trainer around a finished model and finished rows.

    The trained weights are what they were before, whatever TRL made of them: it casts the adapters of a quantised
    model to bfloat16, whose updates are lost below 1/256 of a weight, and fp16 scaling refuses them.
    """
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad]
    trainer = ForgeSFTTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        # EMA first: what it writes into a checkpoint is not the next step's time.
        callbacks=[*([ema] if ema else []), monitor, *callbacks],
        monitor=monitor,
        ema=ema,
    )
    trainer.remove_callback(PrinterCallback)
    for parameter, data in kept:
        parameter.data = data
    return trainer


def pack_rows(dataset, max_length: int):
    """Packs rows best-fit into sequences of at most ``max_length`` tokens; no token is lost.

    Every row has to fit (``data.on_overlong`` saw to it). ``seq_lengths`` keeps the borders.
    """
    return pack_dataset(dataset, max_length, strategy="bfd")
