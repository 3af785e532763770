"""Live progress in a terminal: one calm block that is redrawn in place, log lines above it.

The cursor rests on an empty line above the block. A terminal that changes its width moves the cursor with that line,
so the block is found again however its lines were wrapped; and what somebody else writes (a signal's message, a
library) begins on a line of its own. The cursor is hidden only while the block is written, so that a process that is
killed leaves a terminal that can be used.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from forge_cli.redaction import printable, printable_lines
from forge_cli.run.reporter import (
    PlainReporter,
    Progress,
    QuietReporter,
    Reporter,
    format_clock,
    format_event,
    format_figure,
    is_number,
    sparkline,
)
from forge_cli.units import format_bytes

_TICK_SECONDS = 0.25
_MOST_BAR, _LEAST_BAR, _LABEL = 40, 8, 8
_HIDE, _SHOW, _ERASE_LINE, _ERASE_BELOW = "\x1b[?25l", "\x1b[?25h", "\x1b[K", "\x1b[J"
_DIM, _YELLOW, _PLAIN = "\x1b[2m", "\x1b[33m", "\x1b[0m"
# Which rows stay where there is no room for all of them.
_WORTH = ("step", "loss", "alarm", "eval", "speed", "run", "memory", "update", "reward")


def choose_reporter(quiet: bool, every_steps: int) -> Reporter:
    """Chooses a live view for terminals, plain lines for everything else."""
    return QuietReporter() if quiet else LiveReporter() if can_draw() else PlainReporter(every_steps)


def can_draw() -> bool:
    """Tells whether stderr is a terminal that a block can be redrawn in: not a pipe, not CI, not a dumb one."""
    is_seen = sys.stderr.isatty() and os.environ.get("CI", "").casefold() in ("", "0", "false")
    has_bars = (sys.stderr.encoding or "").casefold() in ("utf-8", "utf8")
    return is_seen and has_bars and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class LiveReporter:
    """Draws where the run stands, from what :class:`Progress` gathers; a thread of its own redraws what changed.

    Attributes:
        progress: What is drawn.
        note: A row of text above the others; empty for none.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self.note = ""
        self._lock = threading.RLock()
        self._ended: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self._began, self._taken_at = None, 0.0
        self._painted = ""

    def say(self, text: str) -> None:
        """Prints lines above the block; an empty text says nothing."""
        if text:
            self._paint(printable_lines(text) + "\n")

    def expect(self, *, first_step: int = 0, **expected: float | None) -> None:
        """Notes how many steps of a resumed run are done, and what the estimator says."""
        self.progress.step = first_step
        self.progress.expected = expected

    def start(self, num_steps: int) -> None:
        """Opens the block."""
        self.progress.num_steps = num_steps
        self._began = self._taken_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, args=(self._ended,), name="forge-live", daemon=True)
        self._thread.start()

    def take_up(self, progress: Progress, age_seconds: float) -> None:
        """Shows what happened before this view was opened.

        Args:
            progress: Where the run stands.
            age_seconds: How long ago its last record was written.
        """
        self.progress = progress
        self._taken_at = time.monotonic() - age_seconds
        # Not from the last record on: a run that was stopped and resumed did nothing in between.
        self._began = time.monotonic() - progress.training_seconds if progress.training_seconds else None

    def record(self, record: dict) -> None:
        """Takes a record; the block shows it a moment later."""
        self.progress.take(record)
        self._taken_at = time.monotonic()
        if "alarm" in record or ("eval_loss" in record and not record.get("step")):
            self.say(format_event(record))

    def finish(self) -> None:
        """Closes the block; what it last showed stays."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended.set()
            self._thread.join(timeout=1)
            self._paint(is_last=True)

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(_TICK_SECONDS):
            self._paint()

    def _paint(self, above: str = "", *, is_last: bool = False) -> None:
        """Writes lines and, below them, the block, in one go; nothing if nothing changed."""
        # Not for ever: a stopped terminal (Ctrl-S) may hold up the other thread, and a run is not to wait for it.
        if not self._lock.acquire(timeout=1):
            return
        try:
            is_open = is_last or (self._ended is not None and _in_foreground())
            block = self._compose(is_last) if is_open else ""
            if block and (above or is_last or block != self._painted):
                _write(f"{_HIDE}\r{_ERASE_BELOW if above else ''}{above}{block}{_SHOW}")
            elif above:
                _write(above)
            self._painted = block
        finally:
            self._lock.release()

    def _compose(self, is_last: bool) -> str:
        width, height = _terminal_size()
        now = time.monotonic()
        left = self.progress.seconds_left()
        if left and (remaining := self.progress.num_steps - self.progress.step):
            # It counts down between records, as far as one step explains.
            left = max(left - (now - self._taken_at), left * (remaining - 1) / remaining)
        elapsed = None if self._began is None else now - self._began
        rows = draw_rows(self.progress, width, elapsed_seconds=elapsed, left_seconds=left, note=self.note)
        kept = sorted(rows, key=lambda row: _WORTH.index(row[0]))[: max(height - 2, 0)]
        lines = [style_row(label, text, width) for label, text in rows if (label, text) in kept]
        text = "".join(f"\n{line}{_ERASE_LINE}" for line in lines)
        back = "\n" if is_last else f"\r\x1b[{len(lines)}A" if lines else ""
        return f"{_ERASE_LINE}{text}{_ERASE_BELOW}{back}"


def draw_rows(
    progress: Progress,
    width: int,
    *,
    elapsed_seconds: float | None = None,
    left_seconds: float | None = None,
    note: str = "",
    pictures: bool = True,
) -> list[tuple[str, str]]:
    """Writes the rows of the block as labels and texts, each cropped to the width.

    Args:
        progress: Where the run stands.
        width: Columns of the terminal; what has no room in them is left out, the least important first.
        elapsed_seconds, left_seconds: Time since training began, and to its end; ``None`` leaves it out.
        note: A row of text above the others.
        pictures: Whether to draw the bar and the line of losses.
    """
    room = width - 1 - (_LABEL if width >= 36 else 0)
    latest, step = progress.latest, _step_parts(progress, room, elapsed_seconds, left_seconds, pictures)
    rows: list[tuple[str, Sequence[str]]] = [("run", [note]), ("step", step)]
    if "loss" in latest:
        loss, trend = format_figure(latest["loss"], ".4f"), progress.trend()
        width_left = min(room - cell_len(loss) - cell_len(trend) - 4, _MOST_BAR)
        line = sparkline(progress.list_losses(), width_left) if pictures and width_left > 0 else ""
        rows.append(("loss", [loss, line, trend]))
        rate = f"lr {format_figure(latest['learning_rate'], '.2e')}" if "learning_rate" in latest else ""
        rows.append(("update", [rate, f"gradient norm {format_figure(latest.get('grad_norm'), '.3g')}"]))
    if is_number(speed := latest.get("tokens_per_second")):
        roof = progress.expected.get("tokens_per_second")
        rows.append(("speed", [f"{speed:.0f} real tokens/s", f"{speed / roof:.0%} of the roofline" if roof else ""]))
    if is_number(peak := latest.get("peak_memory_bytes")):
        most = progress.expected.get("memory_bytes")
        rows.append(("memory", [f"peak {format_bytes(peak)}", f"estimated {format_bytes(most)}" if most else ""]))
    if is_number(margin := latest.get("rewards/margins")):
        wins = latest.get("rewards/accuracies")
        rows.append(("reward", [f"margin {margin:.3f}", f"better wins {wins:.0%}" if is_number(wins) else ""]))
    if progress.evaluation:
        rows.append(("eval", _evaluation_parts(progress.evaluation, progress.first_evaluation)))
    if progress.alarm:
        count = f"({progress.num_alarms} alarms)  " if progress.num_alarms > 1 else ""
        rows.append(
            ("alarm", [printable(f"{count}step {progress.alarm.get('step')}: {progress.alarm.get('message')}")])
        )
    return [(label, text) for label, parts in rows if (text := fit(parts, room))]


def _step_parts(
    progress: Progress, room: int, elapsed: float | None, left: float | None, pictures: bool
) -> Sequence[str]:
    step, num_steps = progress.step, progress.num_steps
    head = f"{step}/{num_steps}" if num_steps else str(step)
    tail = f"{format_clock(left)} left" if left is not None and step < num_steps else ""
    spent = f"{format_clock(elapsed)} so far" if elapsed is not None else ""
    if len(head + tail + spent) + _LEAST_BAR + 6 <= room:
        tail = ", ".join(filter(None, (tail, spent)))
    width = min(room - len(head) - len(tail) - 4, _MOST_BAR)
    if not pictures or not num_steps or width < _LEAST_BAR:
        return [head, tail]
    filled = min(width * step // num_steps, width)
    return [head, "━" * filled + "─" * (width - filled), tail]


def _evaluation_parts(latest: dict, first: dict) -> Sequence[str]:
    loss, ema = format_figure(latest["eval_loss"], ".4f"), latest.get("eval_ema_loss")
    if not latest.get("step"):
        return [loss, "before training"]
    before = f"{format_figure(first['eval_loss'], '.4f')} before" if first else ""
    return [loss, f"EMA {format_figure(ema, '.4f')}" if ema is not None else "", f"at step {latest['step']}", before]


def fit(parts: Sequence[str], room: int) -> str:
    """Joins what has room, the first parts first; the first of all is cropped if need be."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text and part else text + part
        if not text or cell_len(longer) <= room:
            text = longer
    return text if cell_len(text) <= room else set_cell_size(text, max(room - 1, 0)) + "…"


def style_row(label: str, text: str, width: int) -> str:
    """Puts a label before a text, where there is room for both; without colours under ``NO_COLOR``."""
    column = f"{label:>{_LABEL - 2}}  " if width >= 36 else ""
    if os.environ.get("NO_COLOR"):
        return column + text
    return f"{_DIM}{column}{_PLAIN}{_YELLOW if label == 'alarm' else ''}{text}{_PLAIN}"


def _write(text: str) -> None:
    """Writes to stderr, which may be gone in the middle of a run: what is written then is lost, and nothing else."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _terminal_size() -> tuple[int, int]:
    with contextlib.suppress(OSError, ValueError):
        width, height = os.get_terminal_size(sys.stderr.fileno())
        if width and height:
            return width, height
    return 80, 24


def _in_foreground() -> bool:
    """Tells whether the terminal is this process's: a block must not be drawn over what another one shows."""
    with contextlib.suppress(OSError, ValueError):
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    return True
