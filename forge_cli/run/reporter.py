"""What a run says while it goes on. The command line draws it; Python callers may pass their own."""

from __future__ import annotations

import contextlib
import sys
from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of a run."""

    def say(self, text: str) -> None:
        """Takes a line about a stage."""

    def start(self, num_steps: int) -> None:
        """Training starts."""

    def record(self, record: dict) -> None:
        """Takes a step, an evaluation or an alarm, as written to ``metrics.jsonl``."""

    def finish(self) -> None:
        """Training ended, well or not."""


class PlainReporter:
    """Writes lines to stderr: for pipes, CI and Python callers."""

    def __init__(self, every_steps: int = 10) -> None:
        self.every_steps = every_steps
        self.num_steps = 0

    def say(self, text: str) -> None:
        """Writes the line; an empty one says nothing."""
        if text:
            # Whoever read it may be gone (head, a terminal); the run is not to end with them.
            with contextlib.suppress(OSError, ValueError):
                print(text, file=sys.stderr, flush=True)

    def start(self, num_steps: int) -> None:
        """Notes how many steps there will be."""
        self.num_steps = num_steps

    def record(self, record: dict) -> None:
        """Writes alarms and evaluations, and every few steps a line of figures."""
        if "alarm" in record:
            self.say(f"alarm at step {record['step']}: {record['message']}")
        elif "eval_loss" in record:
            ema = f", EMA {record['eval_ema_loss']:.4f}" if record.get("eval_ema_loss") is not None else ""
            when = f"step {record['step']}/{self.num_steps}" if record["step"] else "before training"
            self.say(f"{when}  eval loss {record['eval_loss']:.4f}{ema}")
        elif self._is_shown(record):
            self.say(format_step(record, self.num_steps))

    def _is_shown(self, record: dict) -> bool:
        if record.get("loss") is None or record.get("diverged"):
            return False
        return record["step"] % self.every_steps == 0 or record["step"] in (1, self.num_steps)

    def finish(self) -> None:
        """Nothing to close."""


class QuietReporter(PlainReporter):
    """Writes alarms only."""

    def say(self, text: str) -> None:
        """Writes nothing but alarms."""
        if text.startswith("alarm"):
            super().say(text)


def format_step(record: dict, num_steps: int) -> str:
    """Formats one step: ``step 20/120  loss 1.2345  lr 1.9e-04  grad 0.71  3210 tokens/s``."""
    parts = [f"step {record['step']}/{num_steps}", f"loss {record['loss']:.4f}"]
    if record.get("learning_rate") is not None:
        parts.append(f"lr {record['learning_rate']:.2e}")
    parts.append(f"grad {record['grad_norm']:.3g}")
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:.0f} tokens/s")
    return "  ".join(parts)
