"""Which known name somebody meant. Imported only when a name is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def find_nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate a word was probably meant to be: one or two edits away, or a part of it."""
    best, best_distance = None, 99
    lowered = word.lower().replace("-", "_")
    for candidate in candidates:
        target = candidate.lower().replace("-", "_")
        allowed = 2 if len(target) >= 5 else 1
        squeezed = lowered.replace("_", "") == target.replace("_", "")
        distance = 0 if squeezed else count_edits(lowered, target, allowed)
        if distance <= allowed and distance < best_distance:
            best, best_distance = candidate, distance
    return best or _find_part(lowered, candidates)


def _find_part(word: str, candidates: Iterable[str]) -> str | None:
    """Returns the shortest candidate that contains the word whole, or is contained in it."""
    if len(word) < 4:
        return None
    parts = [one for one in candidates if word in one.lower() or (len(one) >= 4 and one.lower() in word)]
    return min(parts, key=len, default=None)


def count_edits(first: str, second: str, most: int) -> int:
    """Counts insertions, deletions, changes and swaps of neighbours between two words; stops above ``most``."""
    if abs(len(first) - len(second)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def find_near_file(path: Path) -> str | None:
    """Returns the name of a file beside a missing one that it was probably meant to be."""
    try:
        names = sorted(one.name for one in path.parent.iterdir())[:1000]
    except OSError:
        return None
    near = find_nearest(path.name, names)
    return str(path.with_name(near)) if near else None
