"""The other way round: the largest batch, length or rank that fits, and tables over several values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from forge_cli.estimate.budget import Budget, Device, make_budget
from forge_cli.estimate.memory import MemoryEstimate
from forge_cli.resolve.plan import Plan

Estimate = Callable[[Plan], MemoryEstimate]

# What `--max` asks for: setting, step of the search, and where it ends.
QUESTIONS = {
    "batch": ("training.per_device_train_batch_size", 1, 4096),
    "length": ("data.max_length", 64, 1_048_576),
    "rank": ("lora.r", 1, 1024),
}


class Largest(NamedTuple):
    """The answer to ``--max``.

    Attributes:
        path: The setting.
        value: Its largest value that fits; 0 if none does.
        budget: With that value; with the smallest one if none fits.
        limited_by: What ended the search: ``memory``, ``the model's positions`` or ``the search``.
    """

    path: str
    value: int
    budget: Budget
    limited_by: str


def find_largest(plan: Plan, device: Device, question: str, estimate: Estimate) -> Largest:
    """Finds the largest batch, length or rank with which a plan fits a device, by bisection.

    Units: rows, tokens or ranks. Source: memory never falls when one of them grows.
    """
    path, step, limit = QUESTIONS[question]
    positions = plan.facts.max_position_embeddings if plan.facts else None
    reason = "the search"
    if question == "length" and positions:
        limit, reason = min(limit, positions), "the model's positions"

    def try_value(times: int) -> Budget:
        return make_budget(estimate(_with_value(plan, path, times * step)), device)

    low, high = 0, 1
    budget = try_value(1)
    if not budget.fits:
        return Largest(path, 0, budget, "memory")
    while high * step <= limit and try_value(high).fits:
        low, high = high, high * 2
    high = min(high, limit // step + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if try_value(middle).fits else (low, middle)
    return Largest(path, low * step, try_value(low), reason if low == limit // step else "memory")


def _with_value(plan: Plan, path: str, value: int) -> Plan:
    section, name = path.split(".")
    changed = getattr(plan.spec, section).model_copy(update={name: value})
    return plan._replace(spec=plan.spec.model_copy(update={section: changed}))


def sweep(
    resolve: Callable[[Sequence[str]], Plan],
    device: Device,
    axes: Sequence[tuple[str, Sequence[str]]],
    estimate: Estimate,
) -> Iterator[tuple[tuple[str, ...], Budget]]:
    """Yields the budget of every combination of values.

    Args:
        resolve: Overrides to plan.
        device: What it has to fit into.
        axes: Setting and its values, as typed.
        estimate: Plan to estimate.
    """
    paths = [path for path, _ in axes]
    for values in product(*(values for _, values in axes)):
        plan = resolve([f"{path}={value}" for path, value in zip(paths, values, strict=True)])
        yield values, make_budget(estimate(plan), device)
