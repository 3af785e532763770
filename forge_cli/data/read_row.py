"""What reading yields: rows, rows that cannot be read, and the files they stand in."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

# Kinds of file whose rows are found again by a line; rows of the others have a number.
LINE_KINDS = frozenset({"jsonl", "csv", "tsv", "txt"})


class Row(NamedTuple):
    """A row as it stands in its file.

    Attributes:
        number: Line of the file it begins in, or its number in the file; both count from 1.
        values: Columns to values.
    """

    number: int
    values: dict[str, object]


class BadRow(NamedTuple):
    """A row that cannot be read.

    Attributes:
        number: Line or number, as of a ``Row``.
        column: Character of the line (byte, where the line is not UTF-8), from 1; 0 if unknown.
        what: What is wrong.
        fix: What to write instead; may be empty.
    """

    number: int
    column: int
    what: str
    fix: str


class DataFile(NamedTuple):
    """One file of a source, or a data set of the hub.

    Attributes:
        name: What people call it.
        path: The file; ``None`` for a data set of the hub.
        kind: ``jsonl``, ``json``, ``csv``, ``tsv``, ``txt``, ``parquet``, ``arrow`` or ``hub``.
    """

    name: str
    path: Path | None
    kind: str


def describe_place(file: DataFile, number: int, column: int = 0) -> str:
    """Writes where a row stands: ``train.jsonl:12:7`` in a file of lines, ``x.parquet row 12`` in another."""
    if file.kind not in LINE_KINDS:
        return f"{file.name} row {number}"
    return f"{file.name}:{number}:{column}" if column else f"{file.name}:{number}"
