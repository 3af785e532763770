"""Reads a JSON file that is one list of rows, row by row: the list is never held."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from forge_cli.data.read_row import BadRow, Row
from forge_cli.data.read_text import LONGEST_ROW_BYTES, STRICT_JSON, explain_fault, explain_value
from forge_cli.errors import DataError
from forge_cli.units import MIB, format_bytes

# Reads over what only the strict reader refuses, and so finds where such a value ends.
_LENIENT_JSON = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")


def _decode_value(text: str, at: int) -> tuple[object, int]:
    """Returns a value and where it ends; what only the strict reader refuses is returned as its exception."""
    try:
        return STRICT_JSON.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError as fault:
        return fault, _LENIENT_JSON.raw_decode(text, at)[1]


class _Text:
    """The part of a file around the row that is being read.

    Attributes:
        held: Characters that are held; grows at the end and is dropped before ``at``.
        at: Position in ``held`` of what comes next.
        line: Line of the file that ``held`` begins in, from 1.
        column: Characters of that line before ``held``.
        ended: Whether ``held`` goes to the end of the file.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.held, self.at, self.line, self.column, self.ended = "", 0, 1, 0, False

    def find_place(self, at: int) -> tuple[int, int]:
        """Returns line and column, from 1, of a position in ``held``."""
        lines = self.held.count("\n", 0, at)
        return self.line + lines, at - self.held.rfind("\n", 0, at) + (0 if lines else self.column)

    def fail(self, at: int, what: str, fix: str = "") -> DataError:
        """Builds the error for a position in ``held``."""
        line, column = self.find_place(at)
        seen = self.held.rstrip()
        if self.ended and (at >= len(seen) or not seen.endswith("]")):
            fix = fix or "the list does not end: the file seems cut off"
        return DataError(what, where=f"{self.name}:{line}:{column}", fix=fix)

    def grow(self) -> None:
        """Drops what was read and doubles the rest, so that a long row costs a few attempts and not thousands."""
        line, column = self.find_place(self.at)
        self.held, self.at, self.line, self.column = self.held[self.at :], 0, line, column - 1
        block = self.stream.read(max(MIB, len(self.held)))
        self.ended = not block
        try:
            self.held += self.decoder.decode(block, self.ended)
        except UnicodeDecodeError as error:
            self.held += error.object[: error.start].decode()
            raise self.fail(len(self.held), f"not UTF-8: {error.reason}", "save the file as UTF-8") from error

    def peek(self) -> str:
        """Returns the next character that is no white space; empty at the end of the file."""
        while True:
            self.at = _SPACE.match(self.held, self.at).end()
            if self.at < len(self.held) or self.ended:
                return self.held[self.at : self.at + 1]
            self.grow()

    def take_value(self) -> object:
        """Reads the value that comes next; a ``ValueError`` stands for one that only the strict reader refuses."""
        self.peek()
        while True:
            try:
                value, end = _decode_value(self.held, self.at)
            except RecursionError as error:
                raise self.fail(self.at, explain_fault(error)[0]) from error
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.fail(error.pos, explain_fault(error)[0]) from error
                end = len(self.held)
            # A number may go on in what is not read yet.
            if end < len(self.held) or self.ended:
                self.at = end
                return value
            if len(self.held) - self.at > LONGEST_ROW_BYTES:
                what = f"a row that is not JSON, or longer than {format_bytes(LONGEST_ROW_BYTES)}"
                raise self.fail(self.at, what, "split the row, or leave it out")
            self.grow()


def read_json(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Reads the rows of one JSON list.

    Raises:
        DataError: The file is not a list, or not JSON from some place on: where the next row begins is unknown then.
    """
    text = _Text(stream, name)
    first = text.peek()
    if not first:
        return
    if first != "[":
        fix = 'write [{"messages": [...]}, ...]; a file with one row per line is called .jsonl'
        raise text.fail(text.at, "the file is not a list of rows", fix)
    text.at += 1
    number, more = 0, text.peek() != "]"
    while more:
        number += 1
        value = text.take_value()
        if isinstance(value, ValueError):
            yield BadRow(number, 0, *explain_fault(value))
        else:
            yield Row(number, value) if type(value) is dict else BadRow(number, 0, *explain_value(value))
        if text.peek() not in (",", "]"):
            raise text.fail(text.at, "not JSON: Expecting ',' delimiter")
        more = text.peek() == ","
        text.at += more
    text.at += 1
    if text.peek():
        raise text.fail(text.at, "not JSON: Extra data")
