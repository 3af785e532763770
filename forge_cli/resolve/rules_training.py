"""Contradictions about steps: warm-up, intervals, averaging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from forge_cli.resolve.effect import INTERVALS, find_idle
from forge_cli.resolve.scene import Clash, Scene
from forge_cli.resolve.wording import show

if TYPE_CHECKING:
    from forge_cli.schema.runspec import RunSpec

_MAX = "training.max_steps"


def check_warmup(scene: Scene) -> Iterator[Clash]:
    """Warm-up is a share below 1 or a whole number of steps, and ends before the run does."""
    training = scene.spec.training
    warmup, last = training.warmup_steps, training.max_steps
    path = "training.warmup_steps"
    if path in find_idle(scene.spec) or warmup < 1:
        return
    if not float(warmup).is_integer():
        what = f"{show(warmup)} is neither a share (below 1) nor a whole number of steps"
        yield Clash((path,), what, f"write {int(warmup)}, or a share such as 0.03")
    elif last is not None and warmup >= last:
        what = f"the warm-up takes {int(warmup)} steps, the whole run {last}"
        why = "the learning rate would never reach its peak"
        yield Clash((path, _MAX), what, "write a share such as 0.03, or fewer steps", why)


def check_intervals(scene: Scene) -> Iterator[Clash]:
    """Saving, logging and evaluating happen within the run."""
    spec, last = scene.spec, scene.spec.training.max_steps
    idle = find_idle(spec)
    for path in INTERVALS:
        section, _, name = path.partition(".")
        steps = getattr(getattr(spec, section), name, None)
        if not isinstance(steps, int) or path in idle:
            continue
        if steps < 1:
            yield Clash((path,), f"must be at least 1; this is {steps}", f"write {name}: 100, or {name}: epoch")
        elif last is not None and steps > last and scene.is_deliberate(path, (_MAX,)):
            what = f"every {steps} steps, but the run has {last}"
            yield Clash((path, _MAX), what, f"write {name}: {last} or less")


def check_ema(scene: Scene) -> Iterator[Clash]:
    """Averaging starts before the run ends."""
    ema, last = scene.spec.ema, scene.spec.training.max_steps
    if ema is None or last is None:
        return
    if ema.update_after_step >= last:
        what = f"averaging starts after step {ema.update_after_step}, but the run has {last}"
        yield Clash(("ema.update_after_step", _MAX), what, f"write less than {last}")
    elif ema.update_after_step + ema.update_every > last:
        what = f"no step of {last} updates the average: the first would be {ema.update_after_step + ema.update_every}"
        yield Clash(("ema.update_every", "ema.update_after_step", _MAX), what, "write a smaller update_every")


def warn_about_ema(spec: RunSpec, num_steps: int | None) -> Iterator[str]:
    """Warns when the average forgets so slowly that it still holds the starting weights at the end.

    Args:
        spec: The run file.
        num_steps: Optimizer steps of the run; ``None`` while they are not known.
    """
    ema, last = spec.ema, num_steps
    if ema is None or last is None:
        return
    half_life = count_half_life_steps(ema.decay)
    # Without a warm-up the start counts until it is forgotten: a fifth of the run cost nothing that could be measured
    # (docs/quality.md); at half of it the loss was 3.6 times as high.
    if half_life <= (last if ema.decay_warmup else last / 5):
        return
    said = f"ema.decay {show(ema.decay)} has a half-life of {half_life:.0f} steps, the run has {last}"
    if ema.decay_warmup:
        reached = (1 + last) / (10 + last)
        yield f"{said}: with decay_warmup it is never reached, and ends at {reached:.3f}"
    else:
        fitting = round(0.5 ** (10 / last), 4)
        yield f"{said}: the average holds on to the start; {show(fitting)} has a tenth of the run"


def count_half_life_steps(decay: float) -> float:
    """Counts the optimizer steps after which a weight counts half in the average.

    ``update_every`` does not matter, as the decay is raised to its power.

    Units:
        Optimizer steps.
    Source:
        decay^n = 1/2.
    """
    return math.log(0.5) / math.log(decay)


def check_spikes(scene: Scene) -> Iterator[Clash]:
    """A run can go back only to a checkpoint."""
    spec = scene.spec
    if spec.monitor and spec.monitor.on_spike == "rollback" and spec.checkpoint is None:
        what = "the run goes back to its last checkpoint, and checkpoint: null keeps none"
        yield Clash(("monitor.on_spike", "checkpoint"), what, "write on_spike: stop, or remove checkpoint: null")


TRAINING_RULES = (check_warmup, check_intervals, check_ema, check_spikes)
