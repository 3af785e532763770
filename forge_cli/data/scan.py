"""The first pass over the rows: every row is read and judged by its form, before a tokenizer is loaded."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from forge_cli.data.bad_rows import BadRows
from forge_cli.data.formats import (
    COLUMNS,
    drop_nulls,
    find_kind,
    find_system,
    list_unused,
    list_wanted,
    read_example,
    rename_columns,
    suggest_columns,
)
from forge_cli.data.read_row import BadRow, DataFile, Row, describe_place
from forge_cli.data.reading import find_files, read_file
from forge_cli.errors import DataError
from forge_cli.parts.turns import RowError
from forge_cli.schema.data import DataSection, Source

_METHODS = {"preference": "dpo", "unpaired_preference": "kto"}
# Kinds of file whose columns have one shape for all rows.
COLUMN_KINDS = frozenset({"parquet", "arrow", "hub"})


class Place(NamedTuple):
    """A file and how many rows stand before it in all files, so that one number names a row of any of them."""

    base: int
    file: DataFile


def find_method(path: str) -> str:
    """Tells from the first row that can be read which method trains such rows: ``sft``, ``dpo`` or ``kto``."""
    rows = (row for file in find_files(path) for row in read_file(file) if isinstance(row, Row))
    first = next(rows, None)
    return _METHODS.get(find_kind(tuple(first.values)) or "", "sft") if first else "sft"


def find_place(places: Sequence[Place], row: int, column: int = 0) -> str:
    """Writes where the row of a number stands: ``train.jsonl:12``."""
    place = places[bisect_right([one.base for one in places], row - 1) - 1]
    return describe_place(place.file, row - place.base, column)


@dataclass
class Scan:
    """What the first pass found out about one split.

    Attributes:
        name: ``train`` or ``eval``.
        sources: Where its rows come from.
        kind: Their format.
        counts: Good rows per source.
        places: The files, in order.
        bad: Rows that cannot be used.
        num_rows: All rows, bad ones included.
        unused: Columns that nothing reads.
        skipped: Numbers of the bad rows, ascending.
        has_plain_prompts: Prompts are text, not turns.
        systems: System prompts; two are enough to know that there is not one.
    """

    name: str
    sources: list[Source]
    bad: BadRows
    kind: str = ""
    counts: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    num_rows: int = 0
    unused: list[str] = field(default_factory=list)
    skipped: array = field(default_factory=lambda: array("q"))
    systems: set[str] = field(default_factory=set)
    has_plain_prompts: bool = False

    def describe(self, row: int, column: int = 0) -> str:
        """Writes where the row of a number stands: ``train.jsonl:12``."""
        return find_place(self.places, row, column)

    @property
    def system_prompt(self) -> str | None:
        """What all conversations begin with; ``None`` if they differ or begin with nothing."""
        return next(iter(self.systems)) or None if len(self.systems) == 1 else None

    def is_skipped(self, row: int) -> bool:
        """Tells whether the row of a number is bad."""
        at = bisect_left(self.skipped, row)
        return at < len(self.skipped) and self.skipped[at] == row

    def refuse(self, row: int, what: str, fix: str = "", column: int = 0) -> None:
        """Counts a row as bad."""
        insort(self.skipped, row)
        self.bad.add(self.describe(row, column), what, fix)


def scan_rows(name: str, sources: Sequence[Source], data: DataSection, method: str) -> Scan:
    """Reads all rows of a split and tells their format.

    Args:
        name: ``train`` or ``eval``.
        sources: Where its rows come from.
        data: The section.
        method: Training method; it decides which formats will do.

    Raises:
        DataError: A row cannot be used (each kind of fault is listed), rows are of different formats or of one that the
            method does not take, or there are none.
    """
    scan = Scan(name, list(sources), BadRows(data))
    kinds: dict[str, dict[str, str]] = {}  # format to file to its first row
    shapes: dict[tuple[str, ...], str] = {}
    for index, number, row in _read_all(scan):
        if isinstance(row, BadRow):
            scan.refuse(number, row.what, row.fix, row.column)
            continue
        columns = tuple(row)
        kind = shapes.get(columns)
        if kind is None:
            kind = shapes[columns] = _judge_columns(columns, data.format)
        if not kind:
            scan.refuse(number, *_explain_columns(columns, data.format, method))
            continue
        firsts, file = kinds.setdefault(kind, {}), scan.places[-1].file.name
        if file not in firsts:
            firsts[file] = scan.describe(number)
        try:
            example = read_example(row, kind)
        except RowError as error:
            scan.refuse(number, str(error))
            continue
        scan.counts[index] += 1
        scan.has_plain_prompts |= isinstance(example.prompt, str) and example.prompt != ""
        if len(scan.systems) < 2:
            scan.systems.add(find_system(example))
    _judge_kinds(scan, kinds, method)
    scan.bad.settle(scan.num_rows)
    if empty := [source.path for source, count in zip(sources, scan.counts, strict=True) if not count]:
        whole = len(empty) == len(sources)
        why = f"{scan.num_rows} rows were read, none can be used" if whole else "the others alone are another mixture"
        raise DataError("there are no rows", where=", ".join(empty), why=why)
    unused = Counter(column for columns in shapes for column in list_unused(scan.kind, columns))
    scan.unused = sorted(unused)
    return scan


def _judge_columns(columns: tuple[str, ...], wanted: str) -> str:
    if wanted == "auto":
        return find_kind(columns) or ""
    return wanted if all(one in columns for one in COLUMNS[wanted]) else ""


def _explain_columns(columns: tuple[str, ...], wanted: str, method: str) -> tuple[str, str]:
    """Says what is wrong with columns that are of no format, and what to write."""
    missing = [one for one in COLUMNS.get(wanted, ()) if one not in columns]
    lacks = f"; {', '.join(missing)} is missing" if missing else ""
    what = f"the columns are {', '.join(map(str, columns)) or 'none'}{lacks}"
    return what, suggest_columns(columns, list_wanted(method) if wanted == "auto" else (wanted,))


def _explain_mixture(name: str, kinds: dict[str, dict[str, str]]) -> DataError:
    """Builds the error for rows of several formats: says which files, or which rows where a file itself is mixed."""
    why = "a set is read as one format; guessing row by row would train on the wrong columns"
    files = [file for firsts in kinds.values() for file in firsts]
    if len({*files}) < len(files):
        shown = ", ".join(f"{kind} at {next(iter(firsts.values()))}" for kind, firsts in kinds.items())
        what, fix = f"rows of different formats: {shown}", "split the file by format, or set data.format"
        return DataError(what, why=why, fix=fix)
    shown = "; ".join(
        f"{next(iter(firsts))}{f' and {len(firsts) - 1} more' if len(firsts) > 1 else ''}: {kind}"
        for kind, firsts in kinds.items()
    )
    # Turns of these two are read alike: a name is all that keeps one from being the other.
    alike = ("messages", "conversations")
    is_name = {*alike} <= {*kinds}
    target, other = alike if is_name else [*kinds][:2]
    columns = ", ".join(f"{column}: {other if is_name else '...'}" for column in COLUMNS[target])
    file = next(iter(kinds[other]))
    return DataError(
        f"files of different formats: {shown}",
        why=why,
        fix=f"name files of one format in data.{name}; where only names of columns differ, a source of its own "
        f"renames those of a file: {{path: {file}, columns: {{{columns}}}}}",
    )


def _judge_kinds(scan: Scan, kinds: dict[str, dict[str, str]], method: str) -> None:
    """Refuses a mixed set, and a format that the training method does not take."""
    if len(kinds) > 1:
        raise _explain_mixture(scan.name, kinds)
    for kind, firsts in kinds.items():
        scan.kind = kind
        if kind not in list_wanted(method):
            wanted = " or ".join("+".join(COLUMNS[one]) for one in list_wanted(method))
            other = next((one for one in ("sft", "dpo", "kto") if kind in list_wanted(one)), "sft")
            raise DataError(
                f"method {method} needs rows with {wanted}; these are {kind} ({'+'.join(COLUMNS[kind])})",
                where=next(iter(firsts.values())),
                fix=f"use other rows, or method: {other}",
            )


def _read_all(scan: Scan) -> Iterator[tuple[int, int, dict[str, object] | BadRow]]:
    """Yields source, number and columns of every row, and notes where each file begins."""
    base = 0
    for index, source in enumerate(scan.sources):
        scan.counts.append(0)
        for file in find_files(source.path):
            scan.places.append(Place(base, file))
            last = 0
            for row in read_file(file, source.split):
                scan.num_rows += 1
                last = row.number
                yield index, base + last, _name_columns(row, source, file)
            base += last


def read_again(scan: Scan) -> Iterator[tuple[int, int, dict[str, object]]]:
    """Yields source, number and columns of every good row, as the first pass did.

    Raises:
        DataError: Somebody wrote to a file meanwhile: there are other rows than the first pass read.
    """
    places, total = iter(scan.places), sum(scan.counts)
    num_rows = num_good = 0
    for index, source in enumerate(scan.sources):
        for file in find_files(source.path):
            base, known = next(places, (0, None))
            if file != known:
                raise explain_change(source.path)
            for row in read_file(file, source.split):
                num_rows += 1
                if scan.is_skipped(base + row.number):
                    continue
                num_good += 1
                values = _name_columns(row, source, file)
                is_known = not isinstance(values, BadRow) and all(one in values for one in COLUMNS[scan.kind])
                if not is_known or num_rows > scan.num_rows or num_good > total:
                    raise explain_change(file.name)
                yield index, base + row.number, values
    if num_rows < scan.num_rows or next(places, None):
        raise explain_change(", ".join(source.path for source in scan.sources))


def explain_change(name: str) -> DataError:
    """Builds the error for rows that changed between two passes."""
    what = "the file changed while it was read"
    return DataError(what, where=name, fix="run again when nothing writes to it")


def _name_columns(row: Row | BadRow, source: Source, file: DataFile) -> dict[str, object] | BadRow:
    if isinstance(row, BadRow):
        return row
    values = row.values
    if file.kind in COLUMN_KINDS:
        values = {name: drop_nulls(one) for name, one in values.items()}
    try:
        return rename_columns(values, source.columns) if source.columns else values
    except RowError as error:
        return BadRow(row.number, 0, str(error), "")
