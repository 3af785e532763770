"""An estimate as plain data, for ``--json``; sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forge_cli.cli.estimate_text import list_assumptions
from forge_cli.estimate.budget import Budget, Device, make_budget
from forge_cli.estimate.devices import smallest_that_fit
from forge_cli.estimate.memory import MemoryEstimate

if TYPE_CHECKING:
    from forge_cli.estimate.advice import Advice
    from forge_cli.estimate.duration import RunTime, StepTime
    from forge_cli.resolve.plan import Plan


def describe_time(step: StepTime | None, whole: RunTime | None, note: str = "") -> dict | None:
    """Returns times as plain data."""
    if step is None:
        return None
    found: dict[str, Any] = {
        "step_seconds": [step.fast_seconds, step.seconds, step.slow_seconds],
        "tokens_per_second": step.num_tokens / step.seconds,
        "model_flops_ratio": step.model_flops_ratio,
        "step_flops": step.flops.total,
        "limited_by": step.bound_by,
        "assumed": [*step.assumptions, *([note] if note else [])],
    }
    if whole is not None:
        found["num_steps"] = whole.num_steps
        found["run_seconds"] = [whole.fast_seconds, whole.seconds, whole.slow_seconds]
        found["cost"] = [whole.fast_cost, whole.cost, whole.slow_cost] if whole.cost is not None else None
    return found


def describe_run(plan: Plan, estimate: MemoryEstimate, budget: Budget | None, advice: Sequence[Advice]) -> dict:
    """Returns the whole answer as plain data; sizes in bytes."""
    from forge_cli.estimate.causes import explain_part

    return {
        "model": plan.spec.model.name,
        "digest": plan.digest or None,
        "allocated_bytes": estimate.total_bytes,
        "peak": estimate.peak.name,
        "instants": {one.name: dict(one.parts) | {"total": one.total_bytes} for one in estimate.instants},
        "formulas": {
            part: {"settings": cause.settings, "formula": cause.formula, "source": cause.source}
            for part in estimate.peak.parts
            for cause in [explain_part(part, estimate)]
        },
        "assumed": list_assumptions(estimate),
        "device": describe_budget(budget) if budget else None,
        "advice": [
            {
                "set": list(one.overrides),
                "slowdown_ratio": round(one.slowdown, 3),
                "changes": [edit.changes_training for edit in one.edits if edit.changes_training],
                **describe_budget(one.budget),
            }
            for one in advice
        ],
    }


def describe_budget(budget: Budget) -> dict:
    """Returns a budget as plain data; sizes in bytes."""
    return {
        "gpu": budget.device.name,
        "usable_bytes": budget.device.usable_bytes,
        "allocated_bytes": budget.estimate.total_bytes,
        "reserved_bytes": budget.reserved_bytes,
        "needed_bytes": budget.needed_bytes,
        "verdict": budget.verdict,
    }


def describe_method(
    method: str, checkpointing: bool, estimate: MemoryEstimate, device: Device | None, known: list[Device]
) -> dict:
    """Returns one line of the table of methods as plain data."""
    return {
        "method": method,
        "activation_checkpointing": checkpointing,
        "allocated_bytes": estimate.total_bytes,
        "needed_bytes": make_budget(estimate, device or Device("", 0)).needed_bytes,
        "peak": estimate.peak.name,
        "verdict": make_budget(estimate, device).verdict if device else None,
        "smallest_gpus": smallest_that_fit(estimate, known),
    }
