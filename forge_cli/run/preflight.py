"""Compares a plan with the GPU before anything is loaded, and afterwards what was predicted with what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from forge_cli.errors import ForgeError, MachineError
from forge_cli.estimate.advice import advise
from forge_cli.estimate.budget import Device, make_budget
from forge_cli.estimate.devices import find_visible
from forge_cli.estimate.memory import MemoryEstimate
from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.resolve.plan import Plan
from forge_cli.units import format_bytes

# What torch's counters can tell apart, and the instants that lie in it.
_PHASES = {
    "load": ("load",),
    "forward and backward": ("forward", "loss", "reference", "backward loss", "backward layer", "end of backward"),
    "optimizer step": ("end of backward", "optimizer step"),
    "evaluation": ("evaluation",),
}


def check_memory(
    plan: Plan, resolve: Callable[[Sequence[str]], Plan], say: Callable[[str], None], *, force: bool = False
) -> None:
    """Estimates the run, says the result, and stops if the visible GPU cannot hold it.

    Args:
        plan: The plan.
        resolve: Overrides to plan, for the advice.
        say: Receives lines for the user.
        force: Go on all the same.

    Raises:
        MachineError: It does not fit.
    """
    estimate = estimate_from_plan(plan)
    if estimate is None:
        return
    say(describe_estimate(estimate))
    device = find_visible()
    if device is None:
        return
    budget = make_budget(estimate, device)
    room = f"{format_bytes(budget.needed_bytes)} needed, {format_bytes(device.usable_bytes)} usable on {device.name}"
    if budget.verdict != "too big":
        say(f"memory: {room} ({budget.verdict})")
        return
    if force:
        say(f"note: {room}; going on because of --force")
        return
    options = _write_options(plan, resolve, device)
    raise MachineError(
        f"the run does not fit the GPU: {room}",
        where=plan.source,
        why="it would end out of memory, after the weights are loaded",
        fix=f"{options}; --force tries it all the same" if options else "use a larger GPU, or --force",
    )


def advise_less(plan: Plan, resolve: Callable[[Sequence[str]], Plan]) -> str:
    """Writes the ``--set`` lines with which a run that ran out of memory needs less of it; empty if none are known.

    Memory gave out with one row at a time, so that is where less is looked for: a tenth less, and what the GPU has.
    """

    def resolve_row(more: Sequence[str]) -> Plan:
        return resolve(["training.per_device_train_batch_size=1", *more])

    try:
        row = resolve_row(())
    except ForgeError:  # a method that needs several
        row, resolve_row = plan, resolve
    estimate = estimate_from_plan(row)
    if estimate is None:
        return ""
    device = find_visible() or Device("memory", estimate.total_bytes, context_bytes=0)
    less_bytes = round(make_budget(estimate, device).needed_bytes * 0.9)
    return _write_options(row, resolve_row, device._replace(usable_bytes=min(device.usable_bytes, less_bytes)))


def _write_options(plan: Plan, resolve: Callable[[Sequence[str]], Plan], device: Device) -> str:
    fitting = [one for one in advise(plan, resolve, device) if one.budget.fits]
    return " or ".join(" ".join(f"--set {text}" for text in one.overrides) for one in fitting[:3])


def describe_estimate(estimate: MemoryEstimate) -> str:
    """Says what a GPU would have to hold at the peak of a step."""
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in list(estimate.peak.parts.items())[:4])
    return f"estimated peak on a GPU, rows at full length: {format_bytes(estimate.total_bytes)} ({listed})"


def compare_phases(estimate: MemoryEstimate | None, measured: Mapping[str, int]) -> dict[str, dict[str, int | None]]:
    """Puts predicted bytes beside measured ones, phase by phase."""
    sizes = {one.name: one.total_bytes for one in estimate.instants} if estimate else {}
    return {
        phase: {
            "predicted_bytes": max((sizes[name] for name in _PHASES.get(phase, ()) if name in sizes), default=None),
            "measured_bytes": size,
        }
        for phase, size in measured.items()
    }
