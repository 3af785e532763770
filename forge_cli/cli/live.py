"""Live progress in a terminal: one calm block that is redrawn in place, log lines above it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque

from forge_cli.run.reporter import PlainReporter, QuietReporter, Reporter
from forge_cli.units import format_bytes, format_duration

_BARS = "▁▂▃▄▅▆▇█"
_WINDOW = 60


def choose_reporter(quiet: bool, every_steps: int) -> Reporter:
    """Chooses a live view for terminals, plain lines for everything else."""
    if quiet:
        return QuietReporter()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveReporter()
    return PlainReporter(every_steps)


class _Terminal:
    """Standard error, which may be gone in the middle of a run: what is written then is lost, and nothing else."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Writes, or does nothing."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or does nothing."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """The live view is for terminals."""
        return True

    def fileno(self) -> int:
        """Tells rich where the size of the terminal is to be asked."""
        return 2


class LiveReporter:
    """Draws step, loss with trend, learning rate, gradient norm, tokens per second, memory and remaining time."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=_Terminal(), highlight=False)
        self._live = None
        self._num_steps = 0
        self._began = 0.0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._latest: dict = {}
        self._evaluation = ""

    def say(self, text: str) -> None:
        """Prints a line above the block; an empty one says nothing."""
        if text:
            self._console.print(text, markup=False)

    def start(self, num_steps: int) -> None:
        """Opens the block."""
        from rich.live import Live

        self._num_steps = num_steps
        self._began = time.perf_counter()
        self._live = Live(self._draw(), console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def record(self, record: dict) -> None:
        """Takes a record and redraws."""
        if "alarm" in record:
            self.say(f"alarm at step {record['step']}: {record['message']}")
        elif "eval_loss" in record:
            self._evaluation = f"{record['eval_loss']:.4f}"
            if record.get("eval_ema_loss") is not None:
                self._evaluation += f"  with EMA weights {record['eval_ema_loss']:.4f}"
            if not record["step"]:
                self.say(f"before training  eval loss {self._evaluation}")
        elif record.get("loss") is not None and not (record.get("skipped") or record.get("diverged")):
            self._losses.append(record["loss"])
            self._latest |= {key: value for key, value in record.items() if value is not None}
        if self._live is not None:
            self._live.update(self._draw())

    def finish(self) -> None:
        """Closes the block; what it last showed stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self):
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        latest, step = self._latest, self._latest.get("step", 0)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", justify="right", min_width=7)
        table.add_column(no_wrap=True)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=max(self._num_steps, 1), completed=step, width=32), self._progress_text(step))
        table.add_row("step", bar)
        if latest:
            table.add_row("loss", Text(f"{latest['loss']:.4f}  {sparkline(list(self._losses))}  {self._trend()}"))
            rate = f"lr {latest['learning_rate']:.2e}   " if "learning_rate" in latest else ""
            table.add_row("", Text(f"{rate}gradient norm {latest['grad_norm']:.3g}"))
            speed = f"{latest.get('tokens_per_second', 0):.0f} real tokens/s"
            memory = f"   memory {format_bytes(latest['peak_memory_bytes'])}" if "peak_memory_bytes" in latest else ""
            table.add_row("speed", Text(speed + memory))
        if self._evaluation:
            table.add_row("eval", Text(self._evaluation))
        return table

    def _progress_text(self, step: int) -> str:
        elapsed = time.perf_counter() - self._began
        left = f", {format_duration(elapsed / step * (self._num_steps - step))} left" if step else ""
        return f"{step}/{self._num_steps}  {format_duration(elapsed)}{left}"

    def _trend(self) -> str:
        """Compares the last quarter of the shown losses with the quarter before it."""
        quarter = len(self._losses) // 4
        if quarter < 2:
            return ""
        losses = list(self._losses)
        now, before = sum(losses[-quarter:]) / quarter, sum(losses[-2 * quarter : -quarter]) / quarter
        if abs(now - before) < 0.01 * abs(before):
            return "level"
        return "falling" if now < before else "rising"


def sparkline(values: list[float], width: int = 30) -> str:
    """Draws values as a line of bars, the latest on the right; empty for fewer than two."""
    if len(values) < 2:
        return ""
    step = max(1, -(-len(values) // width))
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)
