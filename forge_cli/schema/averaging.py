"""Averaged weights, and what is watched while training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge_cli.schema.section import LARGEST_FACTOR, MOST_STEPS, Section


class EmaSection(Section):
    """Exponential moving average of the trained weights. Presence is the switch."""

    decay: float = Field(default=0.999, gt=0, lt=1, description="Share of the old average kept at each update.")
    decay_warmup: bool = Field(
        default=True, description="Start with a low decay, min(decay, (1 + n) / (10 + n)) at update n."
    )
    update_after_step: int = Field(
        default=0, ge=0, le=MOST_STEPS, description="First optimizer step after which averaging starts."
    )
    update_every: int = Field(
        default=1,
        ge=1,
        le=MOST_STEPS,
        description="Optimizer steps between updates; the decay is raised to this power.",
    )
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="Where the average is kept. auto: beside the weights."
    )


class MonitorSection(Section):
    """Gradient norms per layer group and alarms. Updates that are not finite are skipped with or without it."""

    gradients: bool = Field(default=True, description="Record gradient norms per layer group at every logging step.")
    spike_ratio: float = Field(
        default=3.0,
        gt=1,
        le=LARGEST_FACTOR,
        description="Alarm when a step's loss exceeds this many times the running median.",
    )
    on_spike: Literal["warn", "skip", "rollback", "stop"] = Field(
        default="warn",
        description="What a spike of the loss or the gradient norm does: an alarm only, no update for its step, back "
        "to the last checkpoint without its rows, or the end of the run.",
    )
    spike_window: int = Field(default=50, ge=5, le=100_000, description="Steps the running median looks back.")
