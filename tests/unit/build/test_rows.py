"""Rows are read as they stand in the file, or the file says where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from forge_cli.build.rows import Rows, find_format, read_rows
from forge_cli.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file and returns its name."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(name: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_rows(name)
    return [str(problem).replace(name, "FILE") for problem in caught.value.problems]


def of(*rows: dict) -> Rows:
    return Rows("f.jsonl", list(rows), [f"line {number}" for number in range(1, len(rows) + 1)])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_keep_their_numbers(write, end, mark):
    lines = ['{"text": "a\\nb"}', "", '{"text": "\u2028 \u00e9"}', "  ", '{"text": "c"}']
    rows = read_rows(write("f.jsonl", mark + end.join(lines) + end))
    assert rows.rows == [{"text": "a\nb"}, {"text": "\u2028 \u00e9"}, {"text": "c"}]
    assert rows.places == ["line 1", "line 3", "line 5"]


def test_every_format_of_file_gives_the_same_rows(write, tmp_path):
    rows = [{"prompt": "1,\n2", "completion": '"x"'}, {"prompt": "\u00e9", "completion": "y"}]
    names = [
        write("f.jsonl", "\n".join(json.dumps(row) for row in rows)),
        write("f.json", json.dumps(rows, indent=1)),
        write("f.csv", 'prompt,completion\r\n"1,\n2","""x"""\r\n\u00e9,y\r\n'),
        str(tmp_path / "f.parquet"),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), names[-1])
    for name in names:
        found = read_rows(name)
        assert found.rows == rows, name
        assert found.name == name
        assert found.places == (["line 1", "line 2"] if name.endswith(".jsonl") else ["row 1", "row 2"])


def test_conversations_come_out_of_parquet_as_they_went_in(tmp_path):
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": TURNS}]), path)
    assert read_rows(str(path)).rows == [{"messages": TURNS}]


def test_the_examples_are_there():
    rows = read_rows("forge:quickstart/train")
    assert len(rows.rows) >= 200
    assert find_format(rows) == "messages"


def test_all_bad_lines_are_said_at_once_each_with_line_and_column(write):
    lines = ['{"text": "a"}', '{"text": "a" "b"}', "[1]", '{"text": ', "", '{"text": "b"} {}', "[" * 100_000]
    problems = refusal(write("f.jsonl", "\n".join(lines)))
    assert problems == [
        """FILE:2:14: not JSON: Expecting ',' delimiter; the line is '{"text": "a" "b"}'""",
        "FILE:3:1: a row is a mapping, not list",
        """FILE:4:10: not JSON: Expecting value; the line is '{"text":'""",
        """FILE:6:15: not JSON: Extra data; the line is '{"text": "b"} {}'""",
        f"FILE:7:1: not JSON: too deeply nested; the line is '{'[' * 60}'",
    ]


def test_a_number_too_long_to_read_is_one_of_our_errors(write):
    assert "FILE:1:1: not JSON: Exceeds the limit" in refusal(write("f.jsonl", '{"text": ' + "1" * 5000 + "}"))[0]


def test_many_bad_lines_are_counted(write):
    problems = refusal(write("f.jsonl", "nonsense\n" * 30))
    assert len(problems) == 21
    assert problems[-1] == "FILE: and 10 more rows"


@pytest.mark.parametrize("before", [0, 100_000])
def test_what_is_not_utf8_is_found_wherever_it_stands(write, before):
    """A decoder counts from the start of its buffer, which is no place a person can look up."""
    content = b'{"text": "a"}\n' * before + b'{"text": "caf\xe9"}\n'
    for suffix in ("jsonl", "csv"):
        problems = refusal(write(f"f.{suffix}", content))
        assert problems == [f"FILE:{before + 1}:14: not UTF-8; invalid continuation byte; save the file as UTF-8"]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("f.jsonl", "", "FILE: the file is empty"),
        ("f.jsonl", "\n \n", "FILE: there are no rows"),
        ("f.json", "[]", "FILE: there are no rows"),
        ("f.csv", "prompt,completion\n", "FILE: there are no rows"),
        ("f.json", '[{"text": "a"},\n {"text" "b"}]', "FILE:2:10: not JSON: Expecting ':' delimiter"),
        ("f.json", '{"text": "a"}\n{}', "FILE:2:1: not JSON: Extra data; one row per line is .jsonl"),
        ("f.json", "[" * 100_000, "FILE: not JSON: too deeply nested"),
        ("f.json", '{"text": "a"}', 'FILE: the file is not a list of rows; write [{"messages": [...]}, ...]'),
        ("f.json", '["a"]', 'FILE: the file is not a list of rows; write [{"messages": [...]}, ...]'),
        ("f.csv", "text,text\na,b\n", "FILE:1: two columns are called 'text'"),
        ("f.csv", 'text\n"a', "FILE:2: not CSV: unexpected end of data"),
        ("f.csv", f"text\n{'a' * 200_000}\n", "FILE:2: not CSV: field larger than field limit (131072)"),
        ("f.parquet", "PAR1", "not a readable parquet file"),
    ],
)
def test_files_that_are_not_rows(write, name, content, wanted):
    (problem,) = refusal(write(name, content))
    assert wanted in problem


def test_a_comma_without_quotes_does_not_cut_a_text(write):
    content = 'prompt,completion\na,"b, c"\na,b, c\na\n'
    fix = "put a text that contains a comma into double quotes"
    assert refusal(write("f.csv", content)) == [
        f"FILE row {number}: other than 2 columns, as the header has; {fix}" for number in (2, 3)
    ]


def test_a_missing_file_is_said(tmp_path):
    assert "FILE: no such file" in refusal(str(tmp_path / "none.jsonl"))[0]
    assert "FILE: no such file" in refusal("forge:none")[0]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": TURNS, "id": 1}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction"),
        ({"text": "a"}, "text"),
    ],
)
def test_columns_tell_the_format(row, kind):
    assert find_format(of(row, row)) == find_format(of(row), kind) == kind


def test_a_wanted_format_decides_between_columns():
    rows = of({"messages": TURNS, "text": "a"})
    assert find_format(rows) == "messages"
    assert find_format(rows, "text") == "text"


def test_mixed_formats_are_refused_with_a_row_of_each():
    with pytest.raises(DataError, match="rows of different formats: messages at line 1, text at line 3") as caught:
        find_format(of({"messages": TURNS}, {"messages": TURNS}, {"text": "a"}))
    assert "data.format" in caught.value.problems[0].fix


def test_rows_without_the_columns_are_all_named():
    with pytest.raises(DataError) as caught:
        find_format(of({"prompt": "a"}, {"text": "a"}, {}))
    assert [problem.where for problem in caught.value.problems] == ["f.jsonl line 1", "f.jsonl line 3"]
    assert caught.value.problems[0].what == "columns prompt"
    assert caught.value.problems[1].what == "columns none"
    assert "prompt + completion" in caught.value.problems[0].fix

    with pytest.raises(DataError, match="columns prompt; completion is missing; wanted: prompt \\+ completion"):
        find_format(of({"prompt": "a"}), "prompt_completion")
