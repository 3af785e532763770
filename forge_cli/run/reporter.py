"""What a run says while it goes on. The command line draws it; Python callers may pass their own."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from forge_cli.redaction import printable, printable_lines

if TYPE_CHECKING:
    from forge_cli.resolve.plan import Plan

_BARS = "▁▂▃▄▅▆▇█"
_RECENT_STEPS = 20
_KEPT_LOSSES = 200


class Reporter(Protocol):
    """Receives the progress of a run.

    One that also has ``expect(**facts)``, as :class:`PlainReporter` has, is told before ``start`` what Forge expects.
    """

    def say(self, text: str) -> None:
        """Takes a line about a stage."""

    def start(self, num_steps: int) -> None:
        """Training starts."""

    def record(self, record: dict) -> None:
        """Takes a step, an evaluation or an alarm, as written to ``metrics.jsonl``."""

    def finish(self) -> None:
        """Training ended, well or not."""


def gather_expectations(plan: Plan, *, on_gpu: bool) -> dict[str, float | None]:
    """Gathers what Forge's estimator says about a run: what ``expect`` takes.

    Args:
        plan: The plan.
        on_gpu: Whether it trains on a GPU; the estimates are of GPUs.

    Returns:
        ``tokens_per_second`` (padding included) and ``memory_bytes`` at the peak; ``None`` where it is not known.
    """
    from forge_cli.estimate.devices import find_visible
    from forge_cli.estimate.memory import estimate_memory
    from forge_cli.estimate.plan_memory import setting_from_plan
    from forge_cli.estimate.plan_time import estimate_plan_step

    setting = setting_from_plan(plan) if on_gpu else None
    if setting is None:
        return {"tokens_per_second": None, "memory_bytes": None}
    device = find_visible()
    step = estimate_plan_step(plan, setting, device.gpu) if device and device.gpu else None
    return {
        "tokens_per_second": round(step.tokens_per_second, 1) if step else None,
        "memory_bytes": estimate_memory(setting).total_bytes,
    }


class Progress:
    """Where a run stands, gathered from its records.

    Attributes:
        num_steps: Optimizer steps of the whole run; 0 if that is not known.
        step: The last one that is done.
        latest: The newest value of every figure of a step.
        losses: Steps and finite losses, the newest last.
        evaluation: The last evaluation; empty before the first.
        first_evaluation: The one before training; empty without it.
        alarm: The last alarm; empty as long as there is none.
        num_alarms: How many there were.
        training_seconds: Time of all steps and evaluations that were taken.
        expected: What the estimator says: ``tokens_per_second`` and ``memory_bytes``.
    """

    def __init__(self, num_steps: int = 0) -> None:
        self.num_steps = num_steps
        self.step = self.num_alarms = 0
        self.latest: dict = {}
        self.losses: deque[tuple[int, float]] = deque(maxlen=_KEPT_LOSSES)
        self.evaluation: dict = {}
        self.first_evaluation: dict = {}
        self.alarm: dict = {}
        self.training_seconds = 0.0
        self.expected: dict[str, float | None] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._num_timed = 0
        self._evaluation_seconds = 0.0

    def take(self, record: dict) -> None:
        """Takes a record."""
        if "alarm" in record:
            self.alarm = record
            self.num_alarms += 1
        elif "eval_loss" in record:
            self._take_evaluation(record)
        elif "loss" in record and isinstance(record.get("step"), int):
            self._take_step(record)

    def _take_evaluation(self, record: dict) -> None:
        self.evaluation = record
        if not record.get("step"):
            self.first_evaluation = record
        elif is_number(seconds := record.get("eval_seconds")):
            self._evaluation_seconds += seconds
            self.training_seconds += seconds

    def _take_step(self, record: dict) -> None:
        step = record["step"]
        if step <= self.step:  # the run went back to a checkpoint
            kept = [one for one in self.losses if one[0] < step]
            self.losses.clear()
            self.losses.extend(kept)
        self.step = step
        if is_number(seconds := record.get("seconds")):
            self._recent.append(seconds)
            self._num_timed += 1
            self.training_seconds += seconds
        if not (record.get("skipped") or record.get("diverged")):
            if is_number(record["loss"]):
                self.losses.append((step, record["loss"]))
            self.latest |= {key: value for key, value in record.items() if value is not None}

    def seconds_left(self) -> float | None:
        """Returns the time that is left at the pace of the last steps; ``None`` if it cannot be told.

        The very first step is left out, as it warms up. Evaluations count with their mean share per step so far.
        """
        recent = list(self._recent)
        if len(recent) > 3 and self._num_timed == len(recent):
            recent = recent[1:]
        if not recent or not self.num_steps:
            return None
        pace = sum(recent) / len(recent) + self._evaluation_seconds / self._num_timed
        return pace * max(self.num_steps - self.step, 0)

    def list_losses(self) -> list[float]:
        """Lists the kept losses; another thread may take records meanwhile."""
        return [loss for _, loss in list(self.losses)]

    def trend(self) -> str:
        """Compares the last quarter of the kept losses with the one before it: ``falling``, ``level``, ``rising``."""
        losses = self.list_losses()
        quarter = len(losses) // 4
        if quarter < 2:
            return ""
        now, before = sum(losses[-quarter:]) / quarter, sum(losses[-2 * quarter : -quarter]) / quarter
        if abs(now - before) < 0.01 * abs(before):
            return "level"
        return "falling" if now < before else "rising"


class PlainReporter:
    """Writes lines: for pipes, CI and Python callers.

    Args:
        every_steps: Steps between lines of figures.
        stream: Where to write; ``None`` is stderr, whose reader may go.
    """

    def __init__(self, every_steps: int = 10, stream: TextIO | None = None) -> None:
        self.every_steps = every_steps
        self.stream = stream
        self.progress = Progress()

    def say(self, text: str) -> None:
        """Writes the line; an empty one says nothing."""
        if text and self.stream is not None:
            print(printable_lines(text), file=self.stream, flush=True)
        elif text:
            # Whoever read it may be gone (head, a terminal); the run is not to end with them.
            with contextlib.suppress(OSError, ValueError):
                print(printable_lines(text), file=sys.stderr, flush=True)

    def expect(self, *, first_step: int = 0, **expected: float | None) -> None:
        """Notes how many steps of a resumed run are done, and what :func:`gather_expectations` found."""
        self.progress.step = first_step
        self.progress.expected = expected

    def start(self, num_steps: int) -> None:
        """Notes how many steps there will be."""
        self.progress.num_steps = num_steps

    def take_up(self, progress: Progress, age_seconds: float) -> None:
        """Goes on from where a run stands, whose last record is so old."""
        self.progress = progress

    def record(self, record: dict) -> None:
        """Writes alarms and evaluations, and every few steps a line of figures."""
        self.progress.take(record)
        if "alarm" in record or "eval_loss" in record:
            self.say(format_event(record, self.progress.num_steps))
        elif self._is_shown(record):
            self.say(format_step(record, self.progress.num_steps, self.progress.seconds_left()))

    def _is_shown(self, record: dict) -> bool:
        if record.get("loss") is None or record.get("diverged"):
            return False
        return record["step"] % self.every_steps == 0 or record["step"] in (1, self.progress.num_steps)

    def finish(self) -> None:
        """Nothing to close."""


class QuietReporter(PlainReporter):
    """Writes alarms only."""

    def say(self, text: str) -> None:
        """Writes nothing but alarms."""
        if text.startswith("alarm"):
            super().say(text)


class SilentReporter:
    """Says nothing: the first process speaks for all."""

    def say(self, text: str) -> None:
        """Says nothing."""

    def start(self, num_steps: int) -> None:
        """Shows nothing."""

    def record(self, record: dict) -> None:
        """Shows nothing."""

    def finish(self) -> None:
        """Has nothing to close."""


def is_number(value: object) -> bool:
    """Tells whether a figure of a record is a finite number; a lost one is NaN, or text in a file."""
    return isinstance(value, int | float) and math.isfinite(value)


def format_figure(value: object, form: str) -> str:
    """Formats a figure of a record, which may be text where a number was lost."""
    return format(value, form) if isinstance(value, int | float) else printable(str(value))


def format_event(record: dict, num_steps: int = 0) -> str:
    """Formats an alarm or an evaluation in one line."""
    if "alarm" in record:
        return printable(f"alarm at step {record.get('step')}: {record.get('message')}")
    when = f"step {_of(record['step'], num_steps)}" if record.get("step") else "before training"
    text = f"{when}  eval loss {format_figure(record['eval_loss'], '.4f')}"
    ema = record.get("eval_ema_loss")
    return text if ema is None else f"{text}, EMA {format_figure(ema, '.4f')}"


def format_step(record: dict, num_steps: int, seconds_left: float | None = None) -> str:
    """Formats one step: ``step 20/120  loss 1.2345  lr 1.9e-04  grad 0.71  3210 tokens/s  1:31 left``."""
    parts = [f"step {_of(record['step'], num_steps)}", f"loss {format_figure(record['loss'], '.4f')}"]
    if record.get("learning_rate") is not None:
        parts.append(f"lr {format_figure(record['learning_rate'], '.2e')}")
    if record.get("grad_norm") is not None:
        parts.append(f"grad {format_figure(record['grad_norm'], '.3g')}")
    if record.get("tokens_per_second"):
        parts.append(f"{format_figure(record['tokens_per_second'], '.0f')} tokens/s")
    if seconds_left and record["step"] < num_steps:
        parts.append(f"{format_clock(seconds_left)} left")
    return "  ".join(parts)


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """Draws values as a line of bars, the latest on the right; empty for fewer than two."""
    if len(values) < 2:
        return ""
    step = max(1, -(-len(values) // width))
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def format_clock(duration_seconds: float) -> str:
    """Formats seconds as ``0:04``, ``12:03`` or ``1:02:03``: of one width while it ticks."""
    minutes, seconds = divmod(round(duration_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _of(step: int, num_steps: int) -> str:
    return f"{step}/{num_steps}" if num_steps else str(step)
