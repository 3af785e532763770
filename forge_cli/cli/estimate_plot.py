"""A picture of a sweep: memory against a setting, with the GPU's line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forge_cli.errors import MachineError
from forge_cli.estimate.budget import Budget, Device
from forge_cli.units import GIB


def draw_sweep(
    file: Path,
    title: str,
    paths: Sequence[str],
    rows: Sequence[tuple[tuple[str, ...], Budget]],
    device: Device | None,
) -> None:
    """Draws one line per combination of the other settings over the last one.

    Args:
        file: Picture to write; its suffix chooses the format.
        title: What was estimated.
        paths: Settings, the last one on the horizontal axis.
        rows: Values and their budgets.
        device: Its usable memory is drawn as a line.

    Raises:
        MachineError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MachineError("--plot needs matplotlib", fix='pip install "forge-finetune[plot]"') from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for values, budget in rows:
        lines.setdefault(values[:-1], []).append((values[-1], budget.needed_bytes / GIB))
    for others, points in lines.items():
        label = ", ".join(f"{path}={value}" for path, value in zip(paths, others, strict=False)) or "must have"
        axes.plot([value for value, _ in points], [size for _, size in points], marker="o", label=label)
    if device is not None:
        axes.axhline(device.usable_bytes / GIB, linestyle="--", color="black", label=f"{device.name}, usable")
    axes.set_title(title)
    axes.set_xlabel(paths[-1])
    axes.set_ylabel("GPU must have (GiB)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise MachineError(f"the picture cannot be written: {error}", where=str(file)) from None
