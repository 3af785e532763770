"""Reads rows from files, the hub and Forge's own examples, and tells their format."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from forge_cli.errors import DataError, Problem
from forge_cli.resolve.sources import DATA_SUFFIXES, find_embedded_data, is_data_file, is_embedded_data

LISTED_ROWS = 20

# Columns that a row of each format has; the first match decides.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Rows:
    """Rows as they were read.

    Attributes:
        name: What the run file calls them.
        rows: The rows, in order.
        places: Where each row stands: a line of a file, or its number.
    """

    name: str
    rows: list[Mapping[str, object]]
    places: list[str]


def read_rows(name: str, split: str = "train") -> Rows:
    """Reads all rows of a file, a hub data set or an example of Forge's own.

    Raises:
        DataError: A line is not valid, the file is empty, or the data set cannot be loaded. Every bad line of a
            file is reported at once (the first 20).
    """
    if is_embedded_data(name):
        return _read_file(name, find_embedded_data(name) or Path(name))
    if is_data_file(name) or Path(name).exists():
        return _read_file(name, Path(name).expanduser())
    return _read_hub(name, split)


def find_format(rows: Rows, wanted: str = "auto") -> str:
    """Tells the format from the columns of all rows.

    Raises:
        DataError: Rows differ, or have none of the known columns; names rows.
    """
    found: dict[str, str] = {}
    strangers: dict[str, list[str]] = {}
    for row, place in zip(rows.rows, rows.places, strict=True):
        kind = wanted if wanted != "auto" else next((k for k, c in FORMATS.items() if all(x in row for x in c)), "")
        missing = [column for column in FORMATS.get(kind, ()) if column not in row]
        if not kind or missing:
            lacks = f"; {', '.join(missing)} is missing" if missing else ""
            strangers.setdefault(f"columns {', '.join(map(str, row)) or 'none'}{lacks}", []).append(place)
        else:
            found.setdefault(kind, place)
    if strangers:
        problems = []
        for what, places in strangers.items():
            more = f" (and {len(places) - 1} more rows)" if len(places) > 1 else ""
            problems.append(Problem(f"{rows.name} {places[0]}{more}", "", what, "", _wanted_columns(wanted, what)))
        refuse_rows(rows.name, problems)
    if len(found) > 1:
        shown = ", ".join(f"{kind} at {place}" for kind, place in found.items())
        raise DataError(
            f"rows of different formats: {shown}",
            where=rows.name,
            why="a file is read as one format; guessing row by row would train on the wrong columns",
            fix="split the file by format, or set data.format",
        )
    return next(iter(found))


def refuse_rows(name: str, problems: list[Problem]) -> NoReturn:
    """Raises one error that lists the first 20 bad rows and counts the others."""
    listed, more = problems[:LISTED_ROWS], len(problems) - LISTED_ROWS
    if more > 0:
        listed.append(Problem(name, "", f"and {more} more rows"))
    raise DataError.from_problems(listed)


def _wanted_columns(wanted: str, what: str) -> str:
    if "conversations" in what:
        return 'write messages: [{"role": "user", "content": ...}, ...] instead of conversations with from and value'
    kinds = [wanted] if wanted != "auto" else list(FORMATS)
    return "wanted: " + " or ".join(" + ".join(FORMATS[kind]) for kind in kinds) + "; rename the columns"


def _read_file(name: str, path: Path) -> Rows:
    if path.is_dir():
        raise DataError("a folder, where a file is wanted", where=name, fix=f"name a {', '.join(DATA_SUFFIXES)} file")
    if not path.is_file():
        raise DataError("no such file", where=name, fix="check the path; it is relative to the current folder")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=name)
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise DataError(
            f"{suffix or 'no suffix'} is not a known format", where=name, fix=f"use {', '.join(DATA_SUFFIXES)}"
        )
    try:
        if suffix == ".parquet":
            return _number(name, _read_parquet(path))
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".jsonl":
                return _read_lines(name, file)
            rows = json.load(file) if suffix == ".json" else _read_csv(name, file)
    except UnicodeDecodeError as error:
        place, fix = _find_bad_byte(path), "save the file as UTF-8"
        raise DataError("not UTF-8", where=f"{name}:{place}", why=error.reason, fix=fix) from error
    except (ValueError, RecursionError) as error:
        place = f"{name}:{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else name
        fix = "one row per line is .jsonl" if _reason(error) == "Extra data" else ""
        raise DataError(f"not JSON: {_reason(error)}", where=place, fix=fix) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("the file is not a list of rows", where=name, fix='write [{"messages": [...]}, ...]')
    return _number(name, rows)


def _read_lines(name: str, file: Iterator[str]) -> Rows:
    rows: list[Mapping[str, object]] = []
    places: list[str] = []
    problems: list[Problem] = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            what, shown = f"not JSON: {_reason(error)}", ascii(line.strip()[:60])
            place = f"{name}:{number}:{getattr(error, 'colno', 1)}"
            problems.append(Problem(place, "", what, "", f"the line is {shown}"))
            continue
        if not isinstance(row, dict):
            problems.append(Problem(f"{name}:{number}:1", "", f"a row is a mapping, not {type(row).__name__}"))
            continue
        rows.append(row)
        places.append(f"line {number}")
    if problems:
        refuse_rows(name, problems)
    return _checked(Rows(name, rows, places))


def _reason(error: Exception) -> str:
    """What a JSON reader says, without its own idea of the place."""
    if isinstance(error, RecursionError):
        return "too deeply nested"
    return getattr(error, "msg", None) or str(error)


def _read_csv(name: str, file: Iterator[str]) -> list[dict]:
    reader = csv.DictReader(file, strict=True)
    try:
        twice = [column for column, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if twice:
            raise DataError(f"two columns are called {twice[0]!a}", where=f"{name}:1")
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{name}:{reader.reader.line_num}") from error
    # csv.DictReader puts what is beyond the header under None, and None where a row ends early.
    ragged = [number for number, row in enumerate(rows, 1) if None in row or None in row.values()]
    if ragged:
        what = f"other than {len(reader.fieldnames)} columns, as the header has"
        fix = "put a text that contains a comma into double quotes"
        refuse_rows(name, [Problem(f"{name} row {number}", "", what, "", fix) for number in ragged])
    return rows


def _find_bad_byte(path: Path) -> str:
    """Returns ``line:byte`` of the first byte that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{number}:{error.start + 1}"
    return "1:1"


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:
        raise DataError(f"not a readable parquet file: {error}", where=str(path)) from error


def _read_hub(name: str, split: str) -> Rows:
    from datasets import load_dataset

    try:
        return _number(name, load_dataset(name, split=split).to_list())
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(
            f"the data set cannot be loaded: {first_line}",
            where=name,
            fix=f"check the name and the split ({split}); a file must end in {', '.join(DATA_SUFFIXES)}",
        ) from error


def _number(name: str, rows: list) -> Rows:
    return _checked(Rows(name, rows, [f"row {number}" for number in range(1, len(rows) + 1)]))


def _checked(rows: Rows) -> Rows:
    if not rows.rows:
        raise DataError("there are no rows", where=rows.name)
    return rows
