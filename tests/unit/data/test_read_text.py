"""Text is read as it stands, or the reader says which line is wrong, and the other lines are still read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest

from forge_cli.data.read_row import BadRow, DataFile, Row, describe_place
from forge_cli.data.reading import find_files, read_file
from forge_cli.errors import DataError, MachineError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MIB = 1024**2


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file and returns it as found."""

    def write(name: str, content: str | bytes) -> DataFile:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        (file,) = find_files(str(path))
        return file._replace(name=name)

    return write


def faults(file: DataFile) -> list[str]:
    """Lists the bad rows of a file as a person would see them."""
    bad = [row for row in read_file(file) if isinstance(row, BadRow)]
    return [f"{describe_place(file, row.number, row.column)}: {row.what}; {row.fix}" for row in bad]


def refusal(file: DataFile, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        list(read_file(file))
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_keep_their_numbers(write, end, mark):
    lines = ['{"text": "a\\nb"}', "", '{"text": "\u2028 \u00e9\\u0000\\ud83d\\ude00"}', "  ", '{"text": "c"}']
    assert list(read_file(write("f.jsonl", mark + end.join(lines) + end))) == [
        Row(1, {"text": "a\nb"}),
        Row(3, {"text": "\u2028 \u00e9\0\U0001f600"}),
        Row(5, {"text": "c"}),
    ]


def test_every_format_of_text_gives_the_same_rows(write):
    rows = [{"prompt": "1,\t\n2", "completion": '"x"'}, {"prompt": "\u00e9", "completion": "y"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    table = 'prompt,completion\r\n"1,\t\n2","""x"""\r\n\u00e9,y\r\n'
    places = {
        "f.jsonl": (lines, [1, 2]),
        "f.NDJSON": (lines + "\n", [1, 2]),
        "f.json": (json.dumps(rows, indent=1), [1, 2]),
        "f.csv": (table, [2, 4]),
        "f.tsv": ('prompt\tcompletion\n"1,\t\n2"\t"""x"""\n\n\u00e9\ty', [2, 5]),
    }
    for name, (content, numbers) in places.items():
        wanted = [Row(number, row) for number, row in zip(numbers, rows, strict=True)]
        assert list(read_file(write(name, content))) == wanted, name
        assert list(read_file(write(f"{name}.gz", gzip.compress(content.encode())))) == wanted, name
        packed = pyarrow.Codec("zstd").compress(content.encode(), asbytes=True)
        assert list(read_file(write(f"{name}.zst", packed))) == wanted, name


def test_places_are_lines_or_numbers():
    assert describe_place(DataFile("a.jsonl", None, "jsonl"), 12, 7) == "a.jsonl:12:7"
    assert describe_place(DataFile("a.csv", None, "csv"), 12) == "a.csv:12"
    assert describe_place(DataFile("a.json", None, "json"), 12) == "a.json row 12"
    assert describe_place(DataFile("org/name", None, "hub"), 12) == "org/name row 12"


def test_every_bad_line_is_said_with_its_place_and_the_others_are_read(write):
    lines = [
        '{"text": "a"}',
        '{"text": "a" "b"}',
        "[1]",
        '{"text": ',
        "",
        '{"text": "b"} {}',
        "[" * 100_000,
        '"a"',
        '{"text": "hf_abcdefghijklmnop\\x1b[0m',
        '{"text": "good"}',
    ]
    file = write("f.jsonl", "\n".join(lines))
    assert faults(file) == [
        """f.jsonl:2:14: not JSON: Expecting ',' delimiter; the line is '{"text": "a" "b"}'""",
        "f.jsonl:3:1: a row is a mapping, not a list; a file that is one list of rows is called .json",
        """f.jsonl:4:10: not JSON: Expecting value; the line is '{"text":'""",
        """f.jsonl:6:15: not JSON: Extra data; the line is '{"text": "b"} {}'""",
        f"f.jsonl:7: not JSON: too deeply nested; the line is '{'[' * 80}'",
        'f.jsonl:8:1: a row is a mapping, not a text; write {"text": ...}',
        """f.jsonl:9:30: not JSON: Invalid \\escape; the line is '{"text": "***\\x1b[0m'""",
    ]
    assert [row for row in read_file(file) if isinstance(row, Row)] == [
        Row(1, {"text": "a"}),
        Row(10, {"text": "good"}),
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"text": "a", "n": NaN}', "f.jsonl:2: NaN is not JSON; write a number or null"),
        ('{"n": [-Infinity]}', "f.jsonl:2: -Infinity is not JSON; write a number or null"),
        ('{"text": "a", "b": {"c": 1, "c": 1}}', "f.jsonl:2: the key 'c' is written twice; keep one of them"),
        ('{"n": ' + "1" * 5000 + "}", "f.jsonl:2: not JSON: a whole number of more than 4300 digits; write it as a"),
        ('{"text": "\\ud800\\udc00"} ', ""),
        ('{"text": "a\x01"}', 'f.jsonl:2:12: not JSON: Invalid control character; the line is \'{"text": "a\\x01"}\''),
    ],
)
def test_values_that_python_takes_and_json_does_not(write, line, wanted):
    found = faults(write("f.jsonl", f'{{"text": "before"}}\n{line}\n'))
    assert found == [] if not wanted else found[0].startswith(wanted)


def test_a_row_that_breaks_off_says_that_the_file_seems_cut_off(write):
    row = json.dumps({"messages": TURNS, "caf\u00e9": True, "n": -1.5e3}, ensure_ascii=False).encode()
    for size in range(1, len(row)):
        file = write("f.jsonl", b'{"text": "a"}\n' + row[:size])
        first, second = read_file(file)
        assert isinstance(first, Row) and isinstance(second, BadRow) and second.number == 2
        assert "the file seems cut off" in second.fix, row[:size]
    assert faults(write("f.jsonl", row)) == []
    assert "cut off" not in faults(write("f.jsonl", row[:20] + b"\n"))[0]
    assert "cut off" not in faults(write("f.jsonl", row + b"}"))[0]


def test_a_list_in_a_file_of_lines_is_told_its_name(write):
    assert "called .json" in faults(write("f.jsonl", json.dumps([{"text": "a"}], indent=1)))[0]


def test_a_line_that_is_too_long_is_never_held(write):
    line = b'{"text": "' + b"a" * (96 * MIB) + b'"}\n'
    file = write("f.jsonl", b'{"text": "a"}\n' + line + b'{"text": "b"}\n')
    table = write("f.csv", b"text\n" + line + b"b\n")
    plain = write("f.txt", b"a\n" + line + b"b\n")
    size = len(line)
    del line
    tracemalloc.start()
    for one, last in ((file, Row(3, {"text": "b"})), (table, Row(3, {"text": "b"})), (plain, Row(3, {"text": "b\n"}))):
        rows = list(read_file(one))
        assert rows[-1] == last
        assert rows[-2].number == 2
        assert rows[-2].what == "the line is 96.0 MiB long, more than 16.0 MiB"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 * MIB < size


def test_the_longest_line_is_read(write):
    row = {"text": "a" * (16 * MIB - len('{"text": ""}\n'))}
    assert list(read_file(write("f.jsonl", json.dumps(row)))) == [Row(1, row)]
    assert list(read_file(write("f.jsonl", json.dumps(row) + "\n\n" + json.dumps(row)))) == [Row(1, row), Row(3, row)]
    assert [type(row) for row in read_file(write("f.jsonl", json.dumps(row) + "  \n{}"))] == [BadRow, Row]


@pytest.mark.parametrize("before", [1, 100_000])
def test_what_is_not_utf8_is_found_wherever_it_stands(write, before):
    """A decoder counts from the start of its buffer, which is no place a person can look up."""
    content = b'{"text": "a"}\n' * before + b'{"text": "caf\xe9"}\n{"text": "b"}\n'
    for name in ("f.jsonl", "f.csv", "f.txt"):
        assert faults(write(name, content)) == [
            f"{name}:{before + 1}:14: not UTF-8: invalid continuation byte; save the file as UTF-8"
        ]


def test_a_header_that_is_not_utf8_ends_the_table(write):
    assert refusal(write("f.csv", b"caf\xe9\na\n")) == (
        "f.csv:1:4: not UTF-8: invalid continuation byte; save the file as UTF-8"
    )


def test_surrogates_in_utf8_are_refused(write):
    assert faults(write("f.jsonl", b'{"text": "\xed\xa0\x80"}')) == [
        "f.jsonl:1:11: not UTF-8: invalid continuation byte; save the file as UTF-8"
    ]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("f.jsonl", b'{"text": "a\0"}\n', "f.jsonl:1:12"),
        ("f.jsonl", b'{"text": "a"}\n\0\0\0\0', "f.jsonl:2:1"),
        ("f.csv", b'text\na\n"b\n\0"\nc\n', "f.csv:4:1"),
        ("f.txt", b"a\nb\0", "f.txt:2:2"),
    ],
)
def test_nul_bytes_are_refused(write, name, content, place):
    (fault,) = faults(write(name, content))
    assert fault.startswith(f"{place}: a NUL byte")


@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.tsv", "f.json", "f.txt"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_nothing_is_no_rows(write, name, content):
    assert list(read_file(write(name, content))) == []


def test_a_comma_without_quotes_does_not_cut_a_text(write):
    file = write("f.csv", 'prompt,completion\na,"b\n, c"\na,b, c\na\nc,d\n')
    fix = "put a text that contains the separator into double quotes"
    assert faults(file) == [
        f"f.csv:4: the number of columns is 3; the header has 2; {fix}",
        f"f.csv:5: the number of columns is 1; the header has 2; {fix}",
    ]
    assert [row.number for row in read_file(file)] == [2, 4, 5, 6]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("text,text\na,b\n", "f.csv:1: two columns are called 'text'; rename one"),
        ('text\nb\n"a', "f.csv:3: not CSV: unexpected end of data; close the quotes"),
        ('text\n"a" b\nc\n', "f.csv:2: not CSV: ',' expected after '\"'; close the quotes"),
        ('text\n"' + ("a" * 99 + "\n") * (MIB // 5), "f.csv:2: not CSV: field larger than field limit (16777216)"),
    ],
)
def test_a_table_whose_quotes_do_not_match_ends_there(write, content, wanted):
    assert refusal(write("f.csv", content)).startswith(wanted)


def test_a_long_document_fits_into_a_table(write):
    assert list(read_file(write("f.csv", f"text\n{'a' * 200_000}\n"))) == [Row(2, {"text": "a" * 200_000})]


def test_a_text_file_is_one_document_as_it_stands(write):
    text = "One.\r\n\r\n  Two \u00e9.\n"
    assert list(read_file(write("f.txt", "\ufeff" + text))) == [Row(1, {"text": text})]


def test_a_large_text_file_is_cut_at_blank_lines(write):
    paragraph = "word " * 100 + "\n"
    text = (paragraph * 2000 + "\n") * 40
    rows = list(read_file(write("f.txt", text)))
    assert len(rows) == 3  # 38.2 MiB
    assert "".join(row.values["text"] for row in rows) == text
    assert all(row.values["text"].endswith("\n\n") for row in rows)
    assert all(len(row.values["text"].encode()) <= 16 * MIB for row in rows)
    assert [row.number for row in rows] == [1, 1 + 16 * 2001, 1 + 32 * 2001]

    rows = list(read_file(write("f.txt", paragraph * 60_000)))
    assert "".join(row.values["text"] for row in rows) == paragraph * 60_000
    assert all(row.values["text"].endswith(paragraph) for row in rows)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_that_is_cut_off_is_an_error_wherever_it_is_cut(write, suffix):
    content = "".join(f'{{"text": "{number * 7919}"}}\n' for number in range(300)).encode()
    packed = gzip.compress(content) if suffix == "gz" else pyarrow.Codec("zstd").compress(content, asbytes=True)
    assert len(list(read_file(write(f"f.jsonl.{suffix}", packed)))) == 300
    for size in range(len(packed)):
        assert refusal(write(f"f.jsonl.{suffix}", packed[:size])).startswith(f"f.jsonl.{suffix}: "), size
    assert "the file seems cut off or damaged" in refusal(write(f"f.jsonl.{suffix}", packed[:-3]))
    # Packed anew and appended, as a log rotation or a parallel packer does.
    assert len(list(read_file(write(f"f.jsonl.{suffix}", packed + packed)))) == 600
    assert "f.jsonl" in refusal(write(f"f.jsonl.{suffix}", packed + packed[:-1]))


def test_a_packed_file_that_is_damaged_is_an_error(write):
    content = b'{"text": "a"}\n' * 1000
    packed = bytearray(gzip.compress(content))
    packed[len(packed) // 2] ^= 0xFF
    assert "cut off or damaged" in refusal(write("f.jsonl.gz", bytes(packed)))


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        # Without the time of day in it: two processes that collect the tests have to agree on their names.
        ("f.jsonl", gzip.compress(b"{}", mtime=0), "the file is packed by gzip; add .gz to its name"),
        ("f.json", "[]".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("f.csv", b"PK\x03\x04...", "the file is a zip archive or a spreadsheet; unpack it, or save it as .csv"),
        ("f.txt", b"PAR1...", "the file is a Parquet file; call it .parquet"),
        ("f.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "the file is a Git LFS pointer and not"),
        ("f.parquet", b"version https://git-lfs.github.com/spec/v1\noid x", "the file is a Git LFS pointer and not"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(write, name, content, wanted):
    assert refusal(write(name, content)).startswith(f"{name}: {wanted}")


def test_a_file_that_is_gone_or_cannot_be_read_is_the_machines_fault(write):
    file = write("f.jsonl", "{}")
    file.path.unlink()
    assert refusal(file, MachineError) == "f.jsonl: cannot be read: No such file or directory"
