"""How an estimate looks on the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forge_cli.cli.render import print_json, print_table
from forge_cli.estimate.budget import Budget, Device, make_budget
from forge_cli.estimate.devices import list_devices, smallest_that_fit
from forge_cli.estimate.memory import CUBLAS_BYTES, INSTANTS, Instant, MemoryEstimate
from forge_cli.units import count_of, format_bytes, format_duration

if TYPE_CHECKING:
    from forge_cli.estimate.advice import Advice
    from forge_cli.estimate.duration import RunTime, StepTime
    from forge_cli.estimate.setting import Setting
    from forge_cli.resolve.plan import Plan

_WIDTH = 100
_BAR = 24
_MOST_IS_PACKED = 0.9


def print_methods(
    model: str, rows: Sequence[tuple[str, bool, MemoryEstimate]], device: Device | None, known: list[Device]
) -> None:
    """Prints one line per method, with and without activation checkpointing."""
    print(f"{model}: {_describe_table([estimate.setting for _, _, estimate in rows])}\n")
    table = []
    for method, checkpointing, estimate in rows:
        needs = _needs(estimate, device)
        table.append(
            (
                method,
                "on" if checkpointing else "off",
                format_bytes(estimate.total_bytes),
                format_bytes(needs),
                *([make_budget(estimate, device).verdict] if device else []),
                smallest_that_fit(estimate, known) or "no single GPU of the table",
            )
        )
    verdict = (device.name,) if device else ()
    header = ("method", "checkpointing", "peak", "GPU must have", *verdict, "smallest GPUs that hold it")
    print_table(table, header=header, right=(2, 3))
    _print_packed_share(rows[-1][2].setting)
    print("\n`forge estimate run.yaml --gpu NAME` says where it goes and what makes it fit")


def print_run(plan: Plan, estimate: MemoryEstimate, budget: Budget | None) -> None:
    """Prints the peak, its parts, the instants and the verdict."""
    from forge_cli.estimate.causes import explain_part

    print(_headline(plan))
    print(
        f"\nallocated  {format_bytes(estimate.total_bytes):>10}  at the highest instant: {INSTANTS[estimate.peak.name]}"
    )
    if budget:
        print(f"reserved   {format_bytes(budget.reserved_bytes):>10}  with the gaps between allocations")
        print(f"must have  {format_bytes(budget.needed_bytes):>10}  with the CUDA context")
        print(f"{budget.device.name:9}  {format_bytes(budget.device.usable_bytes):>10}  usable: {sum_up(budget)}")
    else:
        print(
            f"GPUs that hold it: {smallest_that_fit(estimate, list_devices(plan.spec)) or 'no single GPU of the table'}"
        )
    print()
    total = estimate.total_bytes
    print_table(
        [
            (part, format_bytes(size), f"{100 * size / total:.0f} %", explain_part(part, estimate).settings)
            for part, size in estimate.peak.parts.items()
        ],
        header=("at the peak", "", "", "decided by"),
        right=(1, 2),
    )
    print()
    print_table(
        [(INSTANTS[one.name], format_bytes(one.total_bytes), _bar(one, total)) for one in estimate.instants],
        header=("instant", "", ""),
        right=(1,),
    )
    print("\nassumed: " + "; ".join(list_assumptions(estimate)))
    _print_packed_share(estimate.setting)


def print_time(step: StepTime | None, whole: RunTime | None, *, explain: bool, note: str = "") -> None:
    """Prints the time of a step, and duration and price of the run where they are known."""
    if step is None:
        return
    print(
        f"\na step takes {format_duration(step.seconds)} ({format_duration(step.fast_seconds)} to "
        f"{format_duration(step.slow_seconds)}), {step.num_tokens / step.seconds:,.0f} tokens/s with padding, "
        f"{100 * step.model_flops_ratio:.0f} % of the peak; limited by {step.bound_by}"
    )
    if whole is None:
        print("how long the run takes: add --data (counts the rows' tokens) or --tokens N")
    else:
        cost = "" if whole.cost is None else f", {whole.cost:.2f} ({whole.fast_cost:.2f} to {whole.slow_cost:.2f})"
        print(
            f"the run's {whole.num_steps} steps take {format_duration(whole.seconds)} "
            f"({format_duration(whole.fast_seconds)} to {format_duration(whole.slow_seconds)}){cost}"
            + (f"; {note}" if note else "")
        )
    if explain:
        for line in step.assumptions:
            print(f"  {line}")


def print_explanations(estimate: MemoryEstimate) -> None:
    """Prints each part's formula with this run's numbers, and its source."""
    import textwrap

    from forge_cli.estimate.causes import explain_part

    print("\nwhere the numbers come from")
    for part, size in estimate.peak.parts.items():
        cause = explain_part(part, estimate)
        for line in textwrap.wrap(f"{part} {format_bytes(size)} = {cause.formula}", _WIDTH, subsequent_indent="    "):
            print(f"  {line}")
        print(f"    Source: {cause.source}")


def print_advice(budget: Budget, advice: Sequence[Advice]) -> None:
    """Prints the cheapest changes that make a run fit."""
    if not any(one.budget.fits for one in advice):
        print(f"\nno change of settings that Forge knows makes it fit {budget.device.name}")
        for one in advice[:1]:
            print(f"closest: {_as_options(one)}  {format_bytes(one.budget.needed_bytes)}")
        return
    print("\nwhat makes it fit, cheapest first (time of a step relative to now, roughly)")
    for one in advice:
        print(f"  {_as_options(one)}")
        changes = "; ".join(edit.changes_training for edit in one.edits if edit.changes_training)
        print(
            f"      needs {format_bytes(one.budget.needed_bytes)}, x {one.slowdown:.2f}"
            + (f"; {changes}" if changes else "")
        )


def print_trace(traced: Any, estimate: MemoryEstimate | None, *, as_json: bool) -> None:
    """Prints traced phases beside the estimate's."""
    phases, comparable = dict(traced.phases), None
    if estimate:
        # A trace neither evaluates nor saves, and cannot see what cuBLAS keeps.
        comparable = max(
            one.total_bytes - (CUBLAS_BYTES if "workspace" in one.parts else 0)
            for one in estimate.instants
            if one.name not in ("evaluation", "save")
        )
    if as_json:
        print_json({"traced": phases, "estimated": comparable, "seconds": traced.seconds})
        return
    print_table([(name, format_bytes(size)) for name, size in phases.items()], header=("traced phase", ""), right=(1,))
    print(f"\ntraced peak {format_bytes(traced.peak_bytes)} in {traced.seconds:.1f} s")
    if comparable is not None:
        ratio = comparable / traced.peak_bytes - 1
        print(f"estimated   {format_bytes(comparable)} without cuBLAS's workspace ({100 * ratio:+.2f} %)")


def list_assumptions(estimate: MemoryEstimate) -> list[str]:
    """Lists what an estimate takes for granted."""
    setting = estimate.setting
    reason = "padding" if setting.padded else "packed rows" if setting.packed else ""
    found = [f"every sequence has {setting.sequence_length} tokens"]
    masked = reason and setting.attention != "flash"
    found.append(f"attention {setting.attention}" + (f" with a mask for {reason}" if masked else ", no mask"))
    found.append(
        {"fused": "the loss in tiles (TRL)", "plain": "all logits at once", "score": "one score a row"}[setting.loss]
    )
    if setting.optim.startswith("paged"):
        found.append("paged optimizer states are in host memory")
    if setting.facts.num_local_experts:
        found.append("tokens are spread evenly over the experts")
    return found


def fit_row(budget: Budget, verdict: str) -> tuple[str, ...]:
    """Returns the cells of one GPU."""
    device = budget.device
    return device.name, format_bytes(device.usable_bytes), format_bytes(budget.needed_bytes), verdict


def sweep_cells(budget: Budget, has_device: bool) -> tuple[str, str, str]:
    """Returns the cells of one combination of values."""
    sizes = format_bytes(budget.estimate.total_bytes), format_bytes(budget.needed_bytes)
    return (*sizes, budget.verdict if has_device else "")


def calibration_rows(found: dict) -> list[tuple[str, ...]]:
    """Returns the cells of calibrated GPUs."""
    return [
        (gpu, str(one["runs"]), format_bytes(one["context_bytes"]), f"{100 * one['reserve_ratio']:.1f} %")
        for gpu, one in found.items()
    ]


def sum_up(budget: Budget) -> str:
    """Says in a few words whether it fits and by how much."""
    room = budget.device.usable_bytes - budget.needed_bytes
    if budget.fits:
        return f"fits, {format_bytes(room)} to spare"
    if budget.verdict == "tight":
        return f"tight: allocations fit, gaps between them may not ({format_bytes(-room)} over)"
    return f"too big by {format_bytes(-room)}"


def _needs(estimate: MemoryEstimate, device: Device | None) -> int:
    return make_budget(estimate, device or Device("", 0)).needed_bytes


def name_run(plan: Plan, varied: Sequence[str] = ()) -> str:
    """Names a run in a few words: model, method and batch, unless the batch is what varies."""
    spec, batch = plan.spec, "training.per_device_train_batch_size"
    rows = [] if batch in varied else [f"batch {spec.training.per_device_train_batch_size}"]
    return ", ".join([spec.model.name, spec.preset or spec.method, *rows])


def _describe_table(settings: Sequence[Setting]) -> str:
    """Says what all lines of the table of methods have in common."""
    batches = dict.fromkeys(f"{one.batch_size} x {one.sequence_length}" for one in settings)
    whole = settings[0]
    rows = "packed" if whole.packed else "padded" if whole.padded else "one row a sequence"
    compute = "16-bit" if whole.autocast or whole.compute_bytes == 2 else "float32"
    weights = "float32" if whole.trained_bytes == 4 else "16 bit"
    return (
        f"{' or '.join(batches)} tokens per micro step, {rows}; "
        f"weights that are trained whole in {weights}, with {compute} compute"
    )


def _print_packed_share(setting: Setting) -> None:
    """Says how much of a model bitsandbytes packs, where that is less than one would think."""
    from forge_cli.facts.parameter_count import count_quantized_parameters

    packed, total = count_quantized_parameters(setting.facts), setting.facts.num_parameters
    if setting.quantized_bits and packed is not None and total and packed / total < _MOST_IS_PACKED:
        print(f"bitsandbytes packs {100 * packed / total:.0f} % of this model's weights")


def _headline(plan: Plan) -> str:
    spec = plan.spec
    training = spec.training
    method = spec.preset or spec.method
    parts = [
        f"{spec.model.name}, {method}",
        f"{training.per_device_train_batch_size} x {spec.data.max_length} tokens",
        count_of(training.gradient_accumulation_steps, "micro step", "micro steps"),
        f"activation checkpointing {'on' if training.activation_checkpointing else 'off'}",
        training.optim,
    ]
    return ", ".join(parts)


def _bar(instant: Instant, total: int) -> str:
    return "█" * max(round(_BAR * instant.total_bytes / total), 1) if total else ""


def _as_options(advice: Advice) -> str:
    return " ".join(f"--set {text}" for text in advice.overrides)
