"""Ends a run that hangs, and leaves behind where: stacks of all threads, and of a crash in native code."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from forge_cli.errors import ConfigError, NoProgress
from forge_cli.run.ranks import Rank, name_file

VARIABLE = "FORGE_WATCHDOG_SECONDS"
LEAST_SECONDS = 300.0
MEDIAN_RATIO = 10.0
# The first step may compile kernels, and a save may go to a slow disk.
SLOW_RATIO = 6.0
OTHERS_SECONDS = 3.0
STACKS_FILE, CRASH_FILE = "stacks.txt", "crash.txt"


class Watchdog:
    """Measures how long a run has made no progress; a thread of its own looks.

    Args:
        logs: Folder for the stacks.
        limit_seconds: Use this limit always; else five minutes or ten times the median step, six times as much for
            the first step and for saves.
        rank: The process, of several.
    """

    def __init__(self, logs: Path, limit_seconds: float | None = None, rank: Rank | None = None) -> None:
        self.logs = logs
        # Processes that wait for one another hang together, and each is to leave its stacks.
        self.others_seconds = OTHERS_SECONDS if rank and rank.count > 1 else 0.0
        self.stacks = name_file(logs / STACKS_FILE, rank or Rank())
        self.fixed_seconds = limit_seconds
        self._steps: deque[float] = deque(maxlen=101)
        self._age_seconds = self._step_seconds = 0.0
        self._is_slow = True
        self._over = threading.Event()

    def mark(self, event: str) -> None:
        """Notes progress: ``step``, ``batch`` (of an evaluation), ``save`` (begins) or ``saved``."""
        self._age_seconds = 0.0
        if event == "step":
            self._steps.append(self._step_seconds)
            self._step_seconds = 0.0
        self._is_slow = event == "save" or not self._steps

    @property
    def limit_seconds(self) -> float:
        """Time without progress after which the run is taken to hang."""
        if self.fixed_seconds is not None:
            return self.fixed_seconds
        limit = max(LEAST_SECONDS, MEDIAN_RATIO * statistics.median(self._steps or [0.0]))
        return limit * (SLOW_RATIO if self._is_slow else 1.0)

    def age(self, seconds: float, nap_seconds: float) -> bool:
        """Counts time that went by; tells whether the limit is reached.

        Args:
            seconds: By the clock.
            nap_seconds: That were meant to go by: a process that was stopped (SIGSTOP, a closed lid) does not age.
        """
        counted = min(seconds, 2 * nap_seconds)
        self._age_seconds += counted
        self._step_seconds += counted
        return self._age_seconds > self.limit_seconds

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches a block."""
        self._over.clear()
        self._age_seconds = 0.0
        thread = threading.Thread(target=self._watch, name="forge-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        nap_seconds = min(1.0, self.limit_seconds / 10)
        before = time.monotonic()
        while not self._over.wait(nap_seconds):
            now = time.monotonic()
            if self.age(now - before, nap_seconds):
                self._fire()
            before = now

    def _fire(self) -> None:
        """Writes the stacks and ends the process: the thread that hangs cannot be made to raise anything."""
        path = self.stacks
        error = NoProgress(
            f"no step, evaluation batch or save was finished for {self._age_seconds:.0f} s",
            where=str(path),
            why="the stacks of all threads are in this file",
            fix=f"look where it hangs, then: forge resume {self.logs.parent}",
        )
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        (problem,) = error.problems
        with contextlib.suppress(OSError):  # not print: the thread that hangs may hold its lock
            os.write(2, f"error: {problem.describe()}\n  fix: {problem.fix}\n".encode())
        time.sleep(self.others_seconds)
        os._exit(error.exit_code)


def read_limit() -> float | None:
    """Reads the limit from the environment.

    Raises:
        ConfigError: It is no number of seconds.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise ConfigError(f"{text!r} is no number of seconds", where=VARIABLE, fix=f"write {VARIABLE}=600")


@contextlib.contextmanager
def crash_stacks(logs: Path) -> Iterator[None]:
    """Writes stacks to a file if native code crashes within the block; leaves one that watches already alone."""
    if faulthandler.is_enabled():
        yield
        return
    path = logs / CRASH_FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            faulthandler.enable(file)
            try:
                yield
            finally:
                faulthandler.disable()
    finally:
        with contextlib.suppress(OSError):
            if not path.stat().st_size:
                path.unlink()
