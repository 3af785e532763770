"""Follows a run from outside: what it writes, and whether it goes on. Reads only, and takes no lock."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from forge_cli.checkpoints.lock import find_holder
from forge_cli.results.find import Run
from forge_cli.run.folder import METRICS_FILE
from forge_cli.run.resume import parse_record

_KEPT_BYTES = 64


class Sight(NamedTuple):
    """What one look at a run found.

    Attributes:
        state: ``running``, ``finished``, ``ended`` (no process has it, and it is not finished) or ``gone``.
        holder: The process that has it; empty if none does.
        is_other: The records start anew: the file was written again, by a resumed run or by another one.
        records: What was written since the last look; all of it where they start anew.
    """

    state: str
    holder: str
    is_other: bool
    records: list[dict]


class Follower:
    """Looks at a run again and again.

    Args:
        path: The run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = Tail(path / METRICS_FILE)

    def look(self) -> Sight:
        """Looks once."""
        # In this order: a process notes that a run is finished before it lets go of the folder, and writes the last
        # record before that.
        holder = find_holder(self.path)
        facts = Run(self.path).facts
        is_other, records = self._metrics.read()
        state = "finished" if facts.get("finished") else "running" if holder else "ended" if facts else "gone"
        return Sight(state, holder, is_other, records)

    def seconds_silent(self) -> float:
        """Returns how long ago a record was written; 0 before the first."""
        try:
            return max(time.time() - self._metrics.path.stat().st_mtime, 0.0)
        except OSError:
            return 0.0


class Tail:
    """Reads what is added to a file of JSON lines.

    Args:
        path: The file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = (0, 0)
        self._offset = 0
        self._last = b""

    def read(self) -> tuple[bool, list[dict]]:
        """Reads what is new.

        Returns:
            Whether the file is another one than before, and its whole lines: the new ones, or all of another file. A
            line that is half written waits for its end; one that is no JSON object is left out.
        """
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                identity = (facts.st_dev, facts.st_ino)
                is_other = self._offset > 0 and (identity != self._identity or not self._continues(file))
                if is_other:
                    self._offset, self._last = 0, b""
                self._identity = identity
                file.seek(self._offset)
                whole, mark, _ = file.read().rpartition(b"\n")
        except OSError:
            return self._forget(), []
        if mark:
            self._offset += len(whole) + 1
            self._last = (self._last + whole + mark)[-_KEPT_BYTES:]
        return is_other, [record for line in whole.splitlines() if (record := parse_record(line)) is not None]

    def _continues(self, file) -> bool:
        """Tells whether what was read last is still there; a file may be cut and written again in place."""
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last

    def _forget(self) -> bool:
        was_there, self._offset, self._last = self._offset > 0, 0, b""
        return was_there
