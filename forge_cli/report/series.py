"""Curves out of the lines of ``metrics.jsonl``: the values that count, smoothed and thinned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MOST_POINTS = 1500
# A smoothed value looks over about this share of the run, back and ahead.
_MEMORY_RATIO = 0.02
_LEAST_STEPS = 3.0


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        steps: Optimizer steps, rising.
        values: One finite value a step.
    """

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)

    def smooth(self) -> Series:
        """Returns means that look back and ahead alike, with weights that fade; so a fall is not drawn too late."""
        keep = 1 - 1 / max(_LEAST_STEPS, _MEMORY_RATIO * len(self.values))
        behind, ahead = _fade(self.values, keep), _fade(self.values[::-1], keep)[::-1]
        both = zip(behind, ahead, strict=True)
        return Series(self.steps, [(one + other) / (weight + rest) for (one, weight), (other, rest) in both])

    def thin(self) -> Series:
        """Returns at most about :data:`MOST_POINTS` points: the lowest and highest of equal parts, in order."""
        if len(self.steps) <= MOST_POINTS:
            return self
        size = math.ceil(2 * len(self.steps) / MOST_POINTS)
        kept = {0, len(self.steps) - 1}
        for start in range(0, len(self.steps), size):
            part = range(start, min(start + size, len(self.steps)))
            kept |= {min(part, key=self.values.__getitem__), max(part, key=self.values.__getitem__)}
        return Series([self.steps[i] for i in sorted(kept)], [self.values[i] for i in sorted(kept)])


def _fade(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """Returns for each value the weighted sum of it and all before it, and the sum of the weights."""
    total, weight, sums = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        sums.append((total, weight))
    return sums


def as_number(value: object) -> float | None:
    """Returns a finite number, else ``None``: lost values are written as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def read_series(records: Iterable[Mapping[str, object]], name: str) -> Series:
    """Reads one measure, the last line of a step counting, as steps are done again after going back.

    Args:
        records: Lines of ``metrics.jsonl``.
        name: ``loss``, ``grad_norm``, ``eval_loss``, ...; steps whose update was skipped are left out.
    """
    found: dict[int, float | None] = {}
    for record in records:
        if name in record and isinstance(record.get("step"), int):
            found[record["step"]] = None if record.get("skipped") else as_number(record[name])
    pairs = sorted((step, value) for step, value in found.items() if value is not None)
    return Series([step for step, _ in pairs], [value for _, value in pairs])


def read_groups(records: Iterable[Mapping[str, object]], most: int = 20_000) -> tuple[list[int], dict[str, list]]:
    """Reads the gradient norms of layer groups.

    Args:
        records: Lines of ``metrics.jsonl``.
        most: Norms to return; of more, those of equally spaced steps.

    Returns:
        The steps that have norms, and for each group its norm at each of them; ``None`` where it is lost.
    """
    found = {one["step"]: one["group_norms"] for one in records if isinstance(one.get("group_norms"), Mapping)}
    steps = sorted(found)
    widest = max(map(len, found.values()), default=0)
    steps = steps[:: max(1, math.ceil(len(steps) * widest / most))]
    labels = list(dict.fromkeys(label for step in steps for label in found[step]))
    return steps, {label: [as_number(found[step].get(label)) for step in steps] for label in labels}


def read_marks(records: Iterable[Mapping[str, object]]) -> tuple[dict[int, str], dict[int, str]]:
    """Reads which steps were bad: step to reason, of skipped or diverged steps and of other alarms."""
    bad: dict[int, str] = {}
    alarms: dict[int, str] = {}
    for record in records:
        step, reason = record.get("step"), str(record.get("message") or "")
        if not isinstance(step, int):
            continue
        if record.get("skipped") or record.get("diverged"):
            bad[step] = reason or bad.get(step) or ("diverged" if record.get("diverged") else "skipped")
        elif "alarm" in record:
            alarms[step] = reason
    return bad, {step: reason for step, reason in alarms.items() if step not in bad}


def last_step(records: Sequence[Mapping[str, object]]) -> int:
    """Returns the last step that something is known of; 0 for none."""
    return max((one["step"] for one in records if isinstance(one.get("step"), int)), default=0)
