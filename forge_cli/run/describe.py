"""What a run says about what it trains, before it trains."""

from __future__ import annotations

from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.resolve.plan import Plan
from forge_cli.run.reporter import Reporter
from forge_cli.units import format_bytes, format_count


def describe_trainable(plan: Plan, trainable, reporter: Reporter) -> None:
    """Says how many parameters are trained and what the frozen layers save."""
    share = 100 * trainable.num_trainable_parameters / trainable.num_parameters
    targets = f" in {', '.join(trainable.target_modules)}" if trainable.target_modules else ""
    reporter.say(
        f"trained: {format_count(trainable.num_trainable_parameters)} of "
        f"{format_count(trainable.num_parameters)} parameters ({share:.2f} %){targets}"
    )
    freeze = trainable.freeze
    if freeze is None:
        return
    reporter.say(freeze.layer_map())
    if freeze.blocked_by:
        reporter.say(
            f"note: {freeze.blocked_by} is trained below the frozen layers, so they still need a backward pass"
        )
        return
    ratio = freeze.compute_ratio(
        trains_weights=plan.spec.lora is None, activation_checkpointing=plan.spec.training.activation_checkpointing
    )
    saved = _estimate_saved_bytes(plan)
    memory = f", about {format_bytes(saved)} less memory at full length" if saved else ""
    reporter.say(f"frozen layers run forward only: {100 * (1 - ratio):.0f} % less matmul work in the layers{memory}")


def _estimate_saved_bytes(plan: Plan) -> int:
    """Estimates what freezing saves at the peak of a step; 0 where the model's shape is not known."""
    with_freeze = estimate_from_plan(plan)
    spec = plan.spec.model_copy(update={"freeze": None})
    derived = plan.derived._replace(num_frozen_layers=0)
    without = estimate_from_plan(plan._replace(spec=spec, derived=derived))
    return without.total_bytes - with_freeze.total_bytes if with_freeze and without else 0
