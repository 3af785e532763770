"""The time and the price of a plan: its settings become :class:`Work` on a GPU."""

from __future__ import annotations

import re

from forge_cli.errors import ConfigError
from forge_cli.estimate.duration import RunTime, StepTime, estimate_run_time, estimate_step_time
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.work import Work, count_extra_forwards
from forge_cli.facts.gpus import Gpu
from forge_cli.resolve.plan import Plan


def estimate_plan_step(plan: Plan, setting: Setting, gpu: Gpu) -> StepTime | None:
    """Estimates the time of one optimizer step of a plan; ``None`` for an architecture that Forge does not know.

    Units: seconds. Source: ``forge_cli.estimate.duration``, a roofline with stated efficiencies.
    """
    return estimate_step_time(
        _work_of(plan, setting),
        gpu,
        num_trained_parameters=sum(size * times for size, times in setting.trained.items()),
        trained_bytes=setting.trained_bytes,
        optim=setting.optim,
        ema=setting.ema == "device",
    )


def estimate_plan_run(
    plan: Plan, step: StepTime, *, tokens_per_epoch: int | None, steps_per_epoch: int | None, price: float | None
) -> RunTime | None:
    """Estimates the duration and the price of a plan.

    Args:
        plan: The plan.
        step: One of its steps.
        tokens_per_epoch: Tokens of the rows, padding left out; ``None`` if not known.
        steps_per_epoch: Optimizer steps; ``None`` takes full sequences.
        price: Per hour; ``None`` for none.

    Returns:
        Duration and price, or ``None`` when neither steps nor tokens are known.
    """
    training = plan.spec.training
    if steps_per_epoch is None and tokens_per_epoch is not None:
        steps_per_epoch = max(-(-tokens_per_epoch // step.num_tokens), 1)
    if training.max_steps is not None:
        num_steps = training.max_steps
    elif steps_per_epoch is not None:
        num_steps = max(round(steps_per_epoch * training.num_train_epochs), 1)
    else:
        return None
    real = None
    if tokens_per_epoch is not None and steps_per_epoch:
        real = tokens_per_epoch * num_steps / steps_per_epoch
    return estimate_run_time(step, num_steps, num_real_tokens=real, price_per_hour=price)


def read_price(written: str | None) -> float | None:
    """Reads ``2.50/h`` or ``2.50``.

    Raises:
        ConfigError: It is no price.
    """
    if written is None:
        return None
    found = re.fullmatch(r"\s*[$€£¥]?\s*(\d+(?:\.\d+)?)\s*(?:/\s*h(?:our)?)?\s*", written)
    if found is None:
        raise ConfigError(f"--price {written!r} is no price per hour", fix="write it like --price 2.50/h")
    return float(found[1])


def _work_of(plan: Plan, setting: Setting) -> Work:
    spec, adapters = plan.spec, setting.adapters
    own, reference = count_extra_forwards(spec.method, precomputed=spec.preference.precompute_ref_log_probs)
    return Work(
        facts=setting.facts,
        batch_size=setting.num_sequences,
        sequence_length=setting.sequence_length,
        micro_steps=setting.accumulation_steps,
        lora_rank=adapters.rank if adapters else None,
        lora_targets=adapters.targets if adapters else None,
        dora=bool(adapters and adapters.dora),
        num_frozen_layers=plan.derived.num_frozen_layers or 0,
        trains_embeddings=setting.embeddings_train,
        trains_head=setting.head_trains,
        checkpoint_every=1 if setting.activation_checkpointing else 0,
        quantized_bits=setting.quantized_bits,
        attention=setting.attention,
        masked=setting.padded or setting.packed,
        loss=setting.loss,
        own_forwards=own,
        reference_forwards=reference,
    )
