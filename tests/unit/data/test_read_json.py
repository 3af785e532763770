"""A JSON list is read row by row, wherever the blocks of the file end."""

from __future__ import annotations

import io
import json
import random
import tracemalloc

import pytest

from forge_cli.data.read_json import read_json
from forge_cli.data.read_row import BadRow, Row
from forge_cli.errors import DataError

MIB = 1024**2


class Blocks(io.BytesIO):
    """A file that gives a few bytes at a time, however many are asked for."""

    def __init__(self, content: bytes, size: int) -> None:
        super().__init__(content)
        self.size = size

    def read(self, size: int = -1) -> bytes:
        return super().read(self.size)


def read(content: str | bytes, size: int = 2**30) -> list[Row | BadRow]:
    return list(read_json(Blocks(content.encode() if isinstance(content, str) else content, size), "f.json"))


def refusal(content: str | bytes, size: int = 2**30) -> str:
    with pytest.raises(DataError) as caught:
        read(content, size)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_rows_do_not_depend_on_where_blocks_end(size):
    draw = random.Random(0)
    words = ["\u00e9", "\U0001f600", "\\", '"', "]", "},", "\n", "plain", "\u2028"]
    rows = [{"t": "".join(draw.choices(words, k=9)), "n": [1.5e-3, -7, None, True, {"a": []}]} for _ in range(20)]
    wanted = [Row(number, row) for number, row in enumerate(rows, 1)]
    for text in (json.dumps(rows), "\ufeff \n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n\n"):
        assert read(text, size) == wanted


@pytest.mark.parametrize("size", [1, 5, 2**30])
def test_a_row_that_is_wrong_costs_only_itself(size):
    text = '[{"a": 1}, 12345, {"a": NaN}, [{"b": 1, "b": 2}], null, {"n": ' + "1" * 5000 + '}, {"a": 2}]'
    assert read(text, size) == [
        Row(1, {"a": 1}),
        BadRow(2, 0, "a row is a mapping, not a number", 'write {"text": ...}'),
        BadRow(3, 0, "NaN is not JSON", "write a number or null"),
        BadRow(4, 0, "the key 'b' is written twice", "keep one of them"),
        BadRow(5, 0, "a row is a mapping, not null", 'write {"text": ...}'),
        BadRow(6, 0, "not JSON: a whole number of more than 4300 digits", "write it as a text, in quotes"),
        Row(7, {"a": 2}),
    ]


@pytest.mark.parametrize("size", [1, 5, 2**30])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"text": "a"},\n {"text" "b"}]', "f.json:2:10: not JSON: Expecting ':' delimiter"),
        ('[{"text": "a"}\n {"text": "b"}]', "f.json:2:2: not JSON: Expecting ',' delimiter"),
        ('[{"text": "a"},\n]', "f.json:2:1: not JSON: Expecting value"),
        ("[{}] []", "f.json:1:6: not JSON: Extra data"),
        ("[] x", "f.json:1:4: not JSON: Extra data"),
        ("[" * 100_000, "f.json:1:2: not JSON: too deeply nested"),
        ('{"text": "a"}\n{}', 'f.json:1:1: the file is not a list of rows; write [{"messages": [...]}, ...]; a file w'),
        ('\n {"data": []}', "f.json:2:2: the file is not a list of rows"),
        (b'[{"a": "\xc3\xa9"},\n{"a": "\xc3\xa9\xe9"}]', "f.json:2:9: not UTF-8: invalid continuation byte; save the"),
        (b'[{"a": "\xc3', "f.json:1:9: not UTF-8: unexpected end of data; save the file as UTF-8"),
    ],
)
def test_what_is_not_a_list_is_said_with_its_place(text, wanted, size):
    if len(text) > 1000 and size < 1000:
        size = 1000
    assert refusal(text, size).startswith(wanted)


def test_a_list_that_breaks_off_seems_cut_off():
    text = json.dumps([{"text": "a"}, {"messages": [{"role": "user", "content": "b", "n": -1.5}]}])
    assert len(read(text)) == 2
    for size in range(1, len(text)):
        assert refusal(text[:size]).endswith("the list does not end: the file seems cut off"), text[:size]


def test_a_row_that_is_too_long_ends_the_reading():
    text = '[{"a": 1},\n{"text": "' + "a" * (40 * MIB) + '"}]'
    assert refusal(text, MIB) == (
        "f.json:2:1: a row that is not JSON, or longer than 16.0 MiB; split the row, or leave it out"
    )


def test_a_long_list_is_not_held():
    row = json.dumps({"text": "a" * 100_000}).encode()
    content = b"[" + b",\n".join([row] * 600) + b"]"
    stream = io.BytesIO(content)
    tracemalloc.start()
    assert sum(1 for _ in read_json(stream, "f.json")) == 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * MIB < 50 * MIB < len(content)
