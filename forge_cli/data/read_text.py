"""Reads rows from text: JSON lines, comma- and tab-separated tables, plain text."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from forge_cli.data.read_row import BadRow, Row
from forge_cli.errors import DataError
from forge_cli.resolve.wording import printable
from forge_cli.units import MIB, format_bytes

LONGEST_ROW_BYTES = 16 * MIB
_BUFFER_BYTES = MIB
_SHOWN_CHARACTERS = 80
_UTF8 = "save the file as UTF-8"
_NUL = "a NUL byte: the file is binary, or was damaged when it was written"
_JSON_NAMES = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}


class RowFault(ValueError):
    """What a JSON reader lets pass and Forge does not; ``args`` are what and fix."""


def _build_mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowFault(f"the key {printable(twice)[:60]!a} is written twice", "keep one of them")
    return mapping


def _refuse_constant(name: str) -> None:
    raise RowFault(f"{name} is not JSON", "write a number or null")


# The first hook costs a quarter of the parser's speed; the reader still does three times what it has to.
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_build_mapping, parse_constant=_refuse_constant)


def open_text(path: Path) -> BinaryIO:
    """Opens a file for reading bytes, unpacked if its name ends in ``.gz`` or ``.zst``."""
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path), _BUFFER_BYTES)
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), _BUFFER_BYTES)
    return path.open("rb", buffering=_BUFFER_BYTES)


def iterate_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    """Yields number, bytes and length of every line; of one over ``LONGEST_ROW_BYTES`` only the beginning is held."""
    number = 0
    while line := stream.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        size_bytes = len(line)
        rest = b"" if size_bytes <= LONGEST_ROW_BYTES or line.endswith(b"\n") else stream.readline(_BUFFER_BYTES)
        while rest:
            size_bytes += len(rest)
            rest = b"" if rest.endswith(b"\n") else stream.readline(_BUFFER_BYTES)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, size_bytes


def read_jsonl(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Reads one JSON mapping per line; blank lines are passed over."""
    for number, line, size_bytes in iterate_lines(stream):
        if size_bytes > LONGEST_ROW_BYTES:
            yield BadRow(number, 0, *_explain_length("the line", size_bytes))
            continue
        try:
            values = STRICT_JSON.decode(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if line.strip():
                yield _explain_line(number, line, error)
            continue
        yield Row(number, values) if type(values) is dict else BadRow(number, 1, *explain_value(values))


def explain_value(value: object) -> tuple[str, str]:
    """Says what is wrong with a row that is no mapping, and what to write."""
    fix = "a file that is one list of rows is called .json" if isinstance(value, list) else 'write {"text": ...}'
    return f"a row is a mapping, not {_JSON_NAMES.get(type(value), 'a number')}", fix


def explain_fault(error: Exception) -> tuple[str, str]:
    """Says what is wrong with a JSON value, without a place, and what to write."""
    if isinstance(error, RowFault):
        return error.args
    if isinstance(error, RecursionError):
        return "not JSON: too deeply nested", ""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at').removesuffix(' starting')}", ""
    return "not JSON: a whole number of more than 4300 digits", "write it as a text, in quotes"


def _explain_length(thing: str, size_bytes: int) -> tuple[str, str]:
    longest = format_bytes(LONGEST_ROW_BYTES)
    return f"{thing} is {format_bytes(size_bytes)} long, more than {longest}", "split the row, or leave it out"


def _explain_line(number: int, line: bytes, error: Exception) -> BadRow:
    """Turns what a JSON reader says about a line into a bad row with its place."""
    if isinstance(error, UnicodeDecodeError):
        cut = _find_cut(line) if error.reason == "unexpected end of data" else ""
        return BadRow(number, error.start + 1, f"not UTF-8: {error.reason}", cut or _UTF8)
    if b"\0" in line:
        return BadRow(number, line.index(b"\0") + 1, _NUL, "write the file again")
    what, fix = explain_fault(error)
    text = line.decode("utf-8").rstrip("\r\n")
    column, cut = 0, ""
    if isinstance(error, json.JSONDecodeError):
        # A reader's position may lie in the line break behind the text.
        column = min(error.pos, len(text)) + 1
        unfinished = column > len(text) or error.msg.startswith("Unterminated") or not text.endswith("}")
        cut = _find_cut(line) if unfinished else ""
    shown = f"the line is '{printable(text[: 4 * _SHOWN_CHARACTERS].strip())[:_SHOWN_CHARACTERS]}'"
    hint = "a file that is one list of rows is called .json" if text.strip() == "[" else ""
    return BadRow(number, column, what, "; ".join(part for part in (fix, shown, cut, hint) if part))


def _find_cut(line: bytes) -> str:
    """Says that a row which breaks off is the last; empty if it is not."""
    if line.endswith(b"\n") or not line.lstrip().startswith(b"{"):
        return ""
    return "it is the last line and does not end: the file seems cut off"


def read_csv(stream: BinaryIO, name: str, delimiter: str = ",") -> Iterator[Row | BadRow]:
    """Reads a table with a header; quotes as in RFC 4180, every value is a text, blank lines are passed over.

    Raises:
        DataError: Two columns have one name, or the quotes do not match; what follows could not be told apart.
    """
    # One setting for the whole process, 128 KiB by default: fewer characters than a long document has.
    csv.field_size_limit(LONGEST_ROW_BYTES)
    faults: list[BadRow] = []
    reader = csv.reader(_decode_lines(stream, faults), delimiter=delimiter, strict=True)
    begins = 1
    try:
        header = next((fields for fields in reader if fields), [])
        twice = [column for column, count in Counter(header).items() if count > 1]
        if twice:
            raise DataError(f"two columns are called {printable(twice[0])!a}", where=f"{name}:1", fix="rename one")
        if faults:
            raise DataError(faults[0].what, where=f"{name}:{faults[0].number}:{faults[0].column}", fix=faults[0].fix)
        begins = reader.line_num + 1
        for fields in reader:
            if faults:
                yield faults[0]
                faults.clear()
            elif fields and len(fields) != len(header):
                what = f"the number of columns is {len(fields)}; the header has {len(header)}"
                yield BadRow(begins, 0, what, "put a text that contains the separator into double quotes")
            elif fields:
                yield Row(begins, dict(zip(header, fields, strict=True)))
            begins = reader.line_num + 1
    except csv.Error as error:
        fix = "close the quotes, and write a quote inside a text twice; a text that never ends may be a file cut off"
        raise DataError(f"not CSV: {printable(str(error))}", where=f"{name}:{begins}", fix=fix) from error


def read_tsv(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Reads a table whose columns are separated by tabs."""
    return read_csv(stream, name, "\t")


def _decode_lines(stream: BinaryIO, faults: list[BadRow]) -> Iterator[str]:
    """Yields lines for a table's reader, which must see all of them; notes what is wrong with them."""
    for number, line, size_bytes in iterate_lines(stream):
        if size_bytes > LONGEST_ROW_BYTES:
            faults.append(BadRow(number, 0, *_explain_length("the line", size_bytes)))
            line = b"\n"
        elif b"\0" in line:
            faults.append(BadRow(number, line.index(b"\0") + 1, _NUL, "write the file again"))
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            faults.append(BadRow(number, error.start + 1, f"not UTF-8: {error.reason}", _UTF8))
            yield line.decode("utf-8", "replace")


def read_txt(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Reads a text file as one row ``{"text": ...}``, as it stands: a paragraph is not a document.

    A file over ``LONGEST_ROW_BYTES`` becomes several rows of at most that size, which together are the file:
    each ends at the last blank line that fits, or else at the last line break. A file of white space has no row.
    """
    lines: list[bytes] = []
    begins, held_bytes, blank = 1, 0, 0
    for number, line, size_bytes in iterate_lines(stream):
        if size_bytes > LONGEST_ROW_BYTES:
            yield from _read_piece(begins, lines)
            yield BadRow(number, 0, *_explain_length("the line", size_bytes))
            lines, begins, held_bytes, blank = [], number + 1, 0, 0
            continue
        while lines and held_bytes + len(line) > LONGEST_ROW_BYTES:
            cut = blank or len(lines)
            yield from _read_piece(begins, lines[:cut])
            lines, begins, blank = lines[cut:], begins + cut, 0
            held_bytes = sum(map(len, lines))
        lines.append(line)
        held_bytes += len(line)
        if line.isspace():
            blank = len(lines)
    yield from _read_piece(begins, lines)


def _read_piece(begins: int, lines: list[bytes]) -> Iterator[Row | BadRow]:
    piece = b"".join(lines)
    try:
        text = piece.decode("utf-8")
        where, what, fix = piece.find(b"\0"), _NUL, "write the file again"
    except UnicodeDecodeError as error:
        text, where, what, fix = "", error.start, f"not UTF-8: {error.reason}", _UTF8
    if where >= 0:
        line = begins + piece.count(b"\n", 0, where)
        yield BadRow(line, where - piece.rfind(b"\n", 0, where), what, fix)
    elif text and not text.isspace():
        yield Row(begins, {"text": text})
