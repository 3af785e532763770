"""EMA and monitor sections become callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from forge_cli.parts.ema import EMACallback
from forge_cli.parts.guard import MOST_ROLLBACKS, MOST_SKIPS, Guard
from forge_cli.parts.memory import MemoryCallback
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.schema.runspec import RunSpec


def build_ema(spec: RunSpec) -> EMACallback | None:
    """Builds the EMA callback; ``None`` without the section."""
    if spec.ema is None:
        return None
    return EMACallback(
        spec.ema.decay,
        decay_warmup=spec.ema.decay_warmup,
        update_after_step=spec.ema.update_after_step,
        update_every=spec.ema.update_every,
        device=spec.ema.device,
    )


def build_monitor(
    spec: RunSpec,
    metrics_path: Path | None = None,
    on_record: Callable[[dict], None] | None = None,
    name_rows: Callable[[Sequence[int]], list[str]] | None = None,
    memory: MemoryCallback | None = None,
) -> MonitorCallback:
    """Builds the monitor. Without the section it still records losses and lets no non-finite update happen."""
    section = spec.monitor
    return MonitorCallback(
        check_gradients=section.gradients if section else False,
        guard=Guard(
            section.on_spike if section else "warn",
            section.spike_ratio if section else None,
            section.spike_window if section else 50,
            most_skips=MOST_SKIPS,
            most_rollbacks=MOST_ROLLBACKS if spec.checkpoint else 0,
        ),
        metrics_path=metrics_path,
        on_record=on_record,
        name_rows=name_rows,
        memory=memory,
    )
