"""Finds rows whose tokens are equal, in memory that does not grow with their number."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Rows that are compared at once: 16 bytes each, and twice that while they are sorted.
PART_ROWS = 2**18
_BLOCK_BYTES = 2**20
_ROW_BYTES = 16
_ROW = [("digest", "<u8"), ("number", "<i8")]
Pair = tuple[int, int]


class RowDigests:
    """Digests and numbers of rows: 16 bytes a row on disk, of which memory holds a part at a time.

    Args:
        folder: Where their file lies; it has no name there. ``None`` is the system's place for such files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the rows come
        self.num_rows = 0

    @property
    def size_bytes(self) -> int:
        """Size on disk."""
        return _ROW_BYTES * self.num_rows

    def add(self, number: int, rows: tuple[Mapping[str, object], ...]) -> None:
        """Adds a row, given what became of it: one mapping from column to ids (``array``) per new row."""
        digest = hashlib.blake2b(digest_size=8)
        for columns in rows:
            for ids in (value for name, value in columns.items() if name.endswith("_ids")):
                digest.update(ids.tobytes() + b"|")
        self._file.write(digest.digest() + number.to_bytes(8, "little"))
        self.num_rows += 1

    def close(self) -> None:
        """Gives the disk back."""
        self._file.close()

    def read_part(self, part: int, parts: int):
        """Reads the rows of one part in their order; equal rows are in the same."""
        import numpy as np

        self._file.seek(0)
        found = [np.zeros(0, _ROW)]
        while block := self._file.read(_BLOCK_BYTES):
            rows = np.frombuffer(block, _ROW)
            found.append(rows[rows["digest"] % parts == part])
        return np.concatenate(found)


def find_repeats(rows: RowDigests, most: int) -> tuple[int, list[Pair]]:
    """Counts the rows that equal an earlier one; names the first of them (row, earlier row), one for each text."""
    import numpy as np

    count, pairs = 0, []
    parts = 1 + rows.num_rows // PART_ROWS
    for part in range(parts):
        found = rows.read_part(part, parts)
        found = found[np.argsort(found["digest"], kind="stable")]
        is_repeat = found["digest"][1:] == found["digest"][:-1]
        count += int(is_repeat.sum())
        is_first = is_repeat & ~np.concatenate([[False], is_repeat[:-1]])[: len(is_repeat)]
        earlier = np.nonzero(is_first)[0]
        numbers = found["number"]
        earlier = earlier[np.argsort(numbers[earlier + 1])[:most]]
        pairs += zip(numbers[earlier + 1].tolist(), numbers[earlier].tolist(), strict=True)
    return count, sorted(pairs)[:most]


def find_in_both(rows: RowDigests, others: RowDigests, most: int) -> tuple[int, list[Pair]]:
    """Counts the rows that equal one of others; names the first of them (row, other row)."""
    import numpy as np

    count, pairs = 0, []
    parts = 1 + (rows.num_rows + others.num_rows) // PART_ROWS
    for part in range(parts):
        ours, theirs = rows.read_part(part, parts), others.read_part(part, parts)
        both = ours[np.isin(ours["digest"], theirs["digest"])]
        count += len(both)
        for digest, number in both[:most].tolist():
            pairs.append((number, int(theirs["number"][theirs["digest"] == digest][0])))
    return count, sorted(pairs)[:most]
