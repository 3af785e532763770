"""What to change so that a run fits: single edits of the run file, tried one after the other, cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from forge_cli.errors import ForgeError
from forge_cli.estimate.budget import Budget, Device, make_budget
from forge_cli.estimate.memory import MemoryEstimate
from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.estimate.plan_time import estimate_plan_step
from forge_cli.facts.gpus import find_gpu
from forge_cli.resolve.plan import Plan
from forge_cli.schema.runspec import RunSpec

# Times are compared on this one where only a size is given.
_STANDARD = "a100-80gb"

Resolve = Callable[[Sequence[str]], Plan]
Estimate = Callable[[Plan], MemoryEstimate | None]


class Edit(NamedTuple):
    """A change of the run file.

    Attributes:
        overrides: ``PATH=VALUE`` texts for ``--set``.
        slowdown: Guess at the time of a step relative to now, where the roofline sees nothing (paging, the host).
        changes_training: What else it changes; empty where the same is learned.
    """

    overrides: tuple[str, ...]
    slowdown: float
    changes_training: str = ""


class Advice(NamedTuple):
    """Edits and what they lead to.

    Attributes:
        edits: To be made together.
        budget: With them.
        slowdown: Time of a step relative to now (1 is no slower), by the roofline of the GPU and the edits' guesses.
    """

    edits: tuple[Edit, ...]
    budget: Budget
    slowdown: float

    @property
    def overrides(self) -> tuple[str, ...]:
        """All overrides, in order."""
        return tuple(text for edit in self.edits for text in edit.overrides)


def list_edits(spec: RunSpec) -> list[Edit]:
    """Lists the edits that make sense for a run, those first that change nothing that is learned."""
    training, lora = spec.training, spec.lora
    batch, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    edits: list[Edit] = []
    if spec.quantization and spec.quantization.bits == 4 and not spec.quantization.bnb_4bit_use_double_quant:
        edits.append(Edit(("quantization.bnb_4bit_use_double_quant=true",), 1.0))
    if spec.evaluation.per_device_eval_batch_size > 1 and (
        spec.data.eval or spec.data.eval_fraction or spec.data.eval_rows
    ):
        edits.append(Edit(("evaluation.per_device_eval_batch_size=1",), 1.0))
    if spec.ema and spec.ema.device == "auto":
        edits.append(Edit(("ema.device=cpu",), 1.02))
    if training.optim in ("adamw_torch_fused", "adamw_torch"):
        edits.append(Edit(("training.optim=adamw_bnb_8bit",), 1.03))
        edits.append(Edit(("training.optim=paged_adamw_8bit",), 1.05))
    if batch > 1 and batch % 2 == 0:
        edits.append(
            Edit(
                (
                    f"training.per_device_train_batch_size={batch // 2}",
                    f"training.gradient_accumulation_steps={steps * 2}",
                ),
                1.0,
            )
        )
        if batch > 2:
            edits.append(
                Edit(
                    (
                        "training.per_device_train_batch_size=1",
                        f"training.gradient_accumulation_steps={steps * batch}",
                    ),
                    1.0,
                )
            )
    if not training.activation_checkpointing:
        edits.append(Edit(("training.activation_checkpointing=true",), 1.0))
    if lora and not spec.quantization:
        edits.append(Edit(("quantization.bits=4",), 1.0, "the frozen weights are rounded to 4 bits"))
    if lora and lora.r >= 16:
        edits.append(Edit((f"lora.r={lora.r // 2}",), 1.0, "the adapters hold half as much"))
    if spec.freeze is None:
        edits.append(Edit(("freeze.first=50%",), 1.0, "the first half of the layers is not trained"))
    if spec.data.max_length >= 1024:
        edits.append(
            Edit(
                (f"data.max_length={spec.data.max_length // 2}",),
                1.0,
                "longer rows are refused, dropped or cut (data.on_overlong)",
            )
        )
    if lora is None:
        edits.append(Edit(("preset=lora",), 1.0, "adapters are trained instead of all weights"))
        edits.append(Edit(("preset=qlora",), 1.0, "adapters are trained, on weights rounded to 4 bits"))
    return sorted(edits, key=lambda one: (bool(one.changes_training), one.slowdown))


def advise(
    plan: Plan, resolve: Resolve, device: Device, *, estimate: Estimate = estimate_from_plan, limit: int = 6
) -> list[Advice]:
    """Finds the edits with which a plan fits a device, cheapest first; combined ones where no single one is enough.

    Args:
        plan: The plan that does not fit.
        resolve: Overrides to plan: an edit that contradicts the run file is left out.
        device: What it has to fit into.
        estimate: Plan to estimate.
        limit: Longest list.
    """
    before = estimate(plan)
    now = _seconds(plan, before, device) if before else None

    def try_edits(edits: Sequence[Edit]) -> Advice | None:
        return _try(resolve, estimate, device, edits, now)

    single = [one for edit in list_edits(plan.spec) if (one := try_edits([edit])) is not None]
    found = [one for one in single if one.budget.fits]
    if not found:
        found = _combine([one.edits[0] for one in sorted(single, key=_cost)], try_edits)
    return sorted(found, key=_cost)[:limit]


def _cost(advice: Advice) -> tuple[bool, float]:
    return any(edit.changes_training for edit in advice.edits), advice.slowdown


def _combine(edits: Sequence[Edit], try_edits: Callable[[Sequence[Edit]], Advice | None]) -> list[Advice]:
    """Adds edits one by one, cheapest first, until the plan fits; the closest where it never does."""
    best: Advice | None = None
    for edit in edits:
        chosen = [*_without_rivals(best.edits if best else (), edit), edit]
        advice = try_edits(chosen)
        if advice is None or (best is not None and advice.budget.needed_bytes >= best.budget.needed_bytes):
            continue
        best = advice
        if best.budget.fits:
            break
    return [best] if best else []


def _without_rivals(chosen: Sequence[Edit], edit: Edit) -> list[Edit]:
    """Drops what says something about the same settings."""
    paths = {text.split("=")[0] for text in edit.overrides}
    return [one for one in chosen if not paths & {text.split("=")[0] for text in one.overrides}]


def _try(
    resolve: Resolve, estimate: Estimate, device: Device, edits: Sequence[Edit], now: float | None
) -> Advice | None:
    try:
        plan = resolve([text for edit in edits for text in edit.overrides])
        found = estimate(plan)
    except ForgeError:
        return None
    if found is None:
        return None
    slowdown = math.prod(edit.slowdown for edit in edits)
    then = _seconds(plan, found, device)
    if now and then:
        slowdown *= then / now
    return Advice(tuple(edits), make_budget(found, device), slowdown)


def _seconds(plan: Plan, estimate: MemoryEstimate, device: Device) -> float | None:
    """Returns the seconds per token, on the device or on a GPU that stands for others."""
    step = estimate_plan_step(plan, estimate.setting, device.gpu or find_gpu(_STANDARD))
    return step.seconds / step.num_tokens if step else None
