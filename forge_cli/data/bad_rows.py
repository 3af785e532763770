"""Rows that cannot be used, folded into kinds of faults."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from forge_cli.errors import DataError, Problem
from forge_cli.resolve.wording import printable
from forge_cli.schema.data import DataSection
from forge_cli.units import count_of

LISTED_KINDS = 20
_NUMBER = re.compile(r"\d+")


class BadRows:
    """Rows that cannot be used: the first of each kind of fault in words, all of them counted.

    Args:
        data: Says whether bad rows end the run, and how many may be skipped.
    """

    def __init__(self, data: DataSection) -> None:
        self.data = data
        self.count = 0
        self._kinds: dict[str, tuple[Problem, int]] = {}

    def add(self, place: str, what: str, fix: str = "") -> None:
        """Notes a row."""
        self.count += 1
        kind = _NUMBER.sub("0", what)  # turn 1 of one row and turn 3 of another have the same fault
        if kind in self._kinds:
            problem, count = self._kinds[kind]
            self._kinds[kind] = problem, count + 1
        elif len(self._kinds) < LISTED_KINDS:
            self._kinds[kind] = Problem(printable(place), "", printable(what), "", fix), 1

    def list_problems(self) -> list[Problem]:
        """Lists the kinds of faults: each with its first row, and how many rows are like it."""
        return [
            replace(one, what=f"{one.what} (and {count_of(count - 1, 'more row', 'more rows')} like this)")
            if count > 1
            else one
            for one, count in self._kinds.values()
        ]

    def settle(self, num_rows: int) -> None:
        """Ends the run if there are more bad rows than the run file allows.

        Raises:
            DataError: Lists the kinds of faults.
        """
        skips, most = self.data.on_bad_row == "skip", self.data.max_bad_ratio
        ratio = self.count / max(num_rows, 1)
        if not self.count or (skips and ratio <= most):
            return
        problems = self.list_problems()
        if more := self.count - sum(count for _, count in self._kinds.values()):
            what = f"and {count_of(more, 'more row has another fault', 'more rows have other faults')}"
            problems.append(Problem("", "", what))
        what = f"{self.count} of {count_of(num_rows, 'row', 'rows')} {'is' if self.count == 1 else 'are'} bad"
        if skips:
            what += f", more than data.max_bad_ratio {most:g}"
        settings = [] if skips else ["data.on_bad_row: skip"]
        if ratio > most:
            settings.append(f"data.max_bad_ratio: {min(1, math.ceil(100 * ratio) / 100):g}")
        # Without these rows nothing would be left.
        fix = "mend them" if self.count == num_rows else f"mend them, or set {' and '.join(settings)}"
        raise DataError.from_problems([*problems, Problem("", "", what, "", fix)])
